"""What launchers tell ranks that are to connect by themselves: their rank, and where to meet."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from hvdkit.errors import LauncherError
from hvdkit.transport.slurm import expand_hosts

#: What torchrun sets, and users who start ranks by hand.
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

#: Among which the port is that the tasks of a Slurm step agree on: below those that systems give
#: to whoever asks for any.
_PORTS = range(10_000, 32_000)


@dataclass(frozen=True)
class Meeting:
    """What a launcher has told this process: its rank, and where the ranks meet."""

    launcher: str
    mark: str
    """The variable with the rank."""
    rank: int
    size: int
    address: str
    port: int
    store: str
    """Who holds it: "http", the launcher's rendezvous server; "torch", torchrun; "own", rank 0."""
    scope: str = ""
    """Tells attempts to run the same job apart, where they use the same store."""


def agent_meetings(environ: Mapping[str, str]) -> list[Meeting]:
    """Return what launchers have told that do nothing but start ranks; at most one each.

    Raises:
        LauncherError: a variable is missing or does not parse.
    """
    found = []
    if environ.get("HVDKIT_RENDEZVOUS_ADDR"):
        place = ("HVDKIT_RENDEZVOUS_ADDR", "HVDKIT_RENDEZVOUS_PORT")
        found.append(_meeting("hvdrun --tcp", environ, ("HVDKIT_RANK", "HVDKIT_SIZE", *place)))
    if environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR") and environ.get("HOROVOD_RANK"):
        place = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
        names = ("HOROVOD_RANK", "HOROVOD_SIZE", *place)
        found.append(_meeting("horovodrun in Gloo mode", environ, names))
    if environ.get("TORCHELASTIC_RUN_ID") and environ.get("RANK"):
        attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        shared = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        found.append(
            _meeting(
                "torchrun",
                environ,
                TORCH_VARIABLES,
                store="torch" if shared else "own",
                scope=f"{environ['TORCHELASTIC_RUN_ID']}.{attempt}",
            )
        )
    return found


def meeting_by_hand(environ: Mapping[str, str]) -> Meeting | None:
    """Return what a user has set as torchrun does, if all of it is there."""
    if not all(environ.get(name) for name in TORCH_VARIABLES):
        return None
    launcher = f"whoever set {', '.join(TORCH_VARIABLES)}"
    return _meeting(launcher, environ, TORCH_VARIABLES, store="own")


def slurm_meeting(environ: Mapping[str, str]) -> Meeting | None:
    """Return where the tasks of a Slurm step can meet: on its first host.

    The port follows from the job and the step; ``HVDKIT_RENDEZVOUS_PORT`` sets another.
    """
    if not (environ.get("SLURM_PROCID") and environ.get("SLURM_STEP_NUM_TASKS")):
        return None
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    try:
        host = expand_hosts(listed)[0]
    except ValueError as exc:
        raise LauncherError(f"SLURM_STEP_NODELIST: {exc}") from exc
    step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    port = _PORTS[zlib.crc32(step.encode()) % len(_PORTS)]
    place = {"_HOST": host, "_PORT": str(port)}
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "_HOST", "_PORT")
    return _meeting("srun", {**environ, **place}, names, store="own", scope=step)


def _meeting(
    launcher: str,
    environ: Mapping[str, str],
    names: tuple[str, str, str, str],
    *,
    store: str = "http",
    scope: str = "",
) -> Meeting:
    """Read a rank, a size, an address and a port."""
    rank_name, size_name, address_name, port_name = names
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise LauncherError(
            f"{rank_name}={environ.get(rank_name)} says that {launcher} started this process, but "
            f"{' and '.join(missing)} is not set; start the script with the launcher, or without "
            "its variables"
        )
    if store == "own" and environ.get("HVDKIT_RENDEZVOUS_PORT"):
        port_name = "HVDKIT_RENDEZVOUS_PORT"
    for name in (rank_name, size_name, port_name):
        if not environ[name].isdigit():
            raise LauncherError(f"{name}={environ[name]!r}: expected a whole number")
    rank, size, port = (int(environ[name]) for name in (rank_name, size_name, port_name))
    if rank >= size or not 0 < port < 1 << 16:
        raise LauncherError(
            f"{launcher} says {rank_name}={rank}, {size_name}={size}, {port_name}={port}: "
            "ranks are 0 to size - 1, ports 1 to 65535"
        )
    return Meeting(launcher, rank_name, rank, size, environ[address_name], port, store, scope)
