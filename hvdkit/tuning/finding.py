"""Which tuning a job uses: rank 0 reads the file, and all ranks get what fits from it."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hvdkit.config import NO_TUNING
from hvdkit.errors import ConfigError
from hvdkit.transport.base import Transport
from hvdkit.tuning.file import COMMAND, default_path, load
from hvdkit.tuning.record import Tuning, World


def agree_on_tuning(
    transport: Transport,
    named: Path | None,
    describe: Callable[[], World],
    environ: Mapping[str, str],
) -> Tuning | None:
    """Return what was measured in this world, the same on every rank; None: nothing.  Collective.

    A file that holds nothing for this world is a warning on rank 0.  So it need be on rank 0's
    host only.

    Args:
        transport: among all ranks.
        named: the file, as rank 0's user says; None: where it is written by itself, if it is there.
        describe: returns the world, as rank 0 sees it; collective.
        environ: rank 0's environment.

    Raises:
        ConfigError: on every rank, if the file cannot be read, or is no tuning file.
    """
    named = transport.broadcast_object(named, 0)
    if named == NO_TUNING or transport.size == 1:
        return None
    world = describe()
    found: tuple[Tuning | None, str, str] = (None, "", "")
    if transport.rank == 0:
        found = _find(named, world, environ)
    tuning, warning, error = transport.broadcast_object(found, 0)
    if error:
        raise ConfigError(error)
    if warning and transport.rank == 0:
        warnings.warn(warning, stacklevel=5)
    fitting: Tuning | None = tuning
    return fitting


def _find(
    named: Path | None, world: World, environ: Mapping[str, str]
) -> tuple[Tuning | None, str, str]:
    """Return the tuning, a warning and an error, as far as there are."""
    path = default_path(environ) if named is None else named
    if named is None and not path.exists():
        return None, "", ""
    try:
        entries = load(path)
    except ConfigError as exc:
        return None, "", str(exc)
    fitting = next((entry for entry in entries if entry.world == world), None)
    return fitting, "" if fitting else stale(path, entries, world), ""


def stale(path: Path, entries: Sequence[Tuning], world: World) -> str:
    """Return what to say of a file that holds nothing for `world`."""
    command = COMMAND.format(ranks=sum(world.nodes))
    if path != default_path(os.environ):
        command = f"HVDKIT_TUNING_FILE={path} {command}"
    what_now = f"the defaults are used.  To measure this one: {command}"
    if not entries:
        return f"tuning file {path} is empty; {what_now}"
    nearest = min((entry.world.differences(world) for entry in entries), key=len)
    differ = "\n".join(f"  {line}" for line in nearest)
    return f"tuning file {path} is for another world; {what_now}\n{differ}"


def this_machine() -> str:
    """Return what kind of machine this is: its processor, and how many cores it has."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else model}, {os.cpu_count()} cores"
