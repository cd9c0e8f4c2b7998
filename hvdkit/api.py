"""The job that this process is in, from `init` to `shutdown`: its ranks, sets, timeline, counters.

A thin face of one `Context`, the only one; `hvdkit.array_collectives` are the collectives over it.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from typing import Any

from hvdkit import collectives
from hvdkit.collectives.explaining import Explanation
from hvdkit.config import Config
from hvdkit.context import Context
from hvdkit.endings import LastWords
from hvdkit.engine.communicator import Communicator
from hvdkit.errors import ArgumentError, ConfigError, LauncherError, NotInitializedError
from hvdkit.logs import begin_logging, end_logging
from hvdkit.process_sets import ProcessSet

#: What `context` returns; None outside a job.
current: Context | None = None
_last_words: LastWords | None = None


def init(comm: Any = None, process_sets: Sequence[ProcessSet] | str | None = None) -> None:
    """Join the job.  Collective, blocking; starts MPI if nobody has.  Again: does nothing.

    From here on an uncaught exception on one rank ends the whole job, after its traceback; so does
    an exit with another status than 0, by ``sys.exit``, ``exit`` or ``quit``; and, in a script that
    was not started by ``python -m`` or ``-c``, by a SystemExit that it raises itself.

    Args:
        comm: an mpi4py intracommunicator, which is duplicated, or a list of ranks; None: all.
        process_sets: to be known from the start, as if added in this order; None: none.
            Horovod's ``"dynamic"``, that sets may be added later, is always so.

    Raises:
        LauncherError: MPI is missing, or sees one process where the launcher started more; or this
            is a worker process of a rank.
        ConfigError: an environment variable does not parse.
        MismatchError: the ranks' environments differ.
        ArgumentError: already initialised, and `comm` given.
    """
    global current, _last_words  # noqa: PLW0603  (the one place that holds the state)
    if current is not None:
        if comm is not None or process_sets:
            raise ArgumentError("hvdkit is initialised already; call shutdown() before init(...)")
        return
    known = () if process_sets is None or isinstance(process_sets, str) else process_sets
    try:
        current = Context(comm, Config.from_environment(os.environ), known)
    except (ConfigError, LauncherError) as exc:
        # What is wrong lies outside of this program, and stands in the message, with its cause.
        raise exc.with_traceback(None) from None
    begin_logging(current)
    if current.group.size > 1:
        _last_words = LastWords(current)
        _last_words.install()
    atexit.register(_leave, os.getpid())


def shutdown() -> None:
    """Leave the job.  Collective; ``init()`` may follow.  Does nothing when not initialised."""
    global current, _last_words  # noqa: PLW0603
    if current is None:
        return
    leaving, current = current, None
    if _last_words is not None:
        _last_words.remove()
        _last_words = None
    atexit.unregister(_leave)
    leaving.close()
    end_logging()


def _leave(process: int) -> None:
    """Leave the job when the interpreter ends; or end it, if this rank has failed.

    A process that was forked from this one is no rank, and has nothing to leave.
    """
    if os.getpid() != process:
        return
    if _last_words is not None:
        _last_words.at_exit()
    shutdown()


def is_initialized() -> bool:
    """Return whether ``init()`` was called, and ``shutdown()`` not yet.  Local."""
    return current is not None


def context() -> Context:
    """Return the state behind these functions.  Local.

    Raises:
        NotInitializedError: ``init()`` was not called.
    """
    if current is None:
        raise NotInitializedError("hvdkit is not initialised: call hvd.init() first")
    return current


def communicator(process_set: ProcessSet | None = None) -> Communicator:
    """Return what does the collectives of `process_set`; None: of all ranks.  Local.

    Raises:
        NotInitializedError: ``init()`` was not called.
        ArgumentError: the set is not known, or this rank is not in it.
    """
    here = context()
    return here.world if process_set is None else process_set.communicator()


def alone(process_set: ProcessSet) -> bool:
    """Return whether this rank has no other to combine gradients with, in or outside a set.  Local.

    Raises:
        ArgumentError: the set is not known.
        NotInitializedError: ``init()`` was not called.
    """
    if process_set.included() is None:
        communicator(process_set)  # raises the error that says so
    return not process_set.included() or process_set.size() == 1


def rank() -> int:
    """Return this process's number, 0 to ``size() - 1``.  Local."""
    return context().topology.rank


def size() -> int:
    """Return the number of processes.  Local."""
    return context().topology.size


def local_rank() -> int:
    """Return this process's number among those of its node.  Local."""
    return context().topology.local_rank


def local_size() -> int:
    """Return the number of processes on this node.  Local."""
    return context().topology.local_size


def cross_rank() -> int:
    """Return the number of this node, among those that have this local rank.  Local."""
    return context().topology.cross_rank


def cross_size() -> int:
    """Return the number of nodes that have this local rank.  Local."""
    return context().topology.cross_size


def add_process_set(process_set: ProcessSet | Iterable[int]) -> ProcessSet:
    """Make a process set of use, and return it.  Collective among all ranks, blocking.

    Args:
        process_set: a `ProcessSet`, or a list of ranks.

    Raises:
        ArgumentError: ranks that there are not, or the set is there already; the other ranks get
            a MismatchError that says so.
        MismatchError: ranks gave different sets.
    """
    return context().process_sets.add(process_set)


def remove_process_set(process_set: ProcessSet) -> bool:
    """Let go of a process set; return whether it was one.  Collective among all ranks, blocking.

    The set of all ranks stays.
    """
    return context().process_sets.remove(process_set)


def start_timeline(file_path: str | os.PathLike[str], mark_cycles: bool = False) -> None:
    """Begin to record what every rank does, until `stop_timeline`.  Collective, blocking.

    Args:
        file_path: of the one file that rank 0 writes in the end: Chrome trace events, which
            https://ui.perfetto.dev opens.  Until then each rank has a part beside it.
        mark_cycles: without effect, for there are no cycles; Horovod's scripts pass it.

    Raises:
        ArgumentError: a timeline is being written already, or a file cannot be.
    """
    del mark_cycles
    context().start_timeline(os.fspath(file_path))


def stop_timeline() -> None:
    """End the recording, and write the file.  Collective, blocking.

    Raises:
        ArgumentError: none is being written.
    """
    context().stop_timeline()


def stats() -> dict[str, dict[str, Any]]:
    """Return what this rank has done: operations, bytes and seconds.  Local.

    Returns:
        ``{"allreduce": {"total": {...}, "float32": {"shm": {"operations": 3, "bytes": 12,
        "seconds": 0.1}}}, ...}``: by kind, dtype and algorithm.  Seconds include the waiting.
    """
    return context().recording.stats.snapshot()


def explain(
    nbytes: int, kind: str = "allreduce", process_set: ProcessSet | None = None
) -> Explanation:
    """Return what ``"auto"`` picks for a message, and how long each algorithm would take.  Local.

    Args:
        nbytes: of the message: of the array of an all-reduce, reduce-scatter or broadcast, of the
            result of an all-gather, of all that a rank has to send of an all-to-all.
        kind: the collective: ``"allreduce"``, ``"allgather"``, ...
        process_set: whose ranks take part; None: all ranks.

    Returns:
        What prints as a table.  Times are measured or fitted if ``hvdkit tune`` was here.

    Raises:
        ArgumentError: no such collective, or no number of bytes.
    """
    return collectives.explain(communicator(process_set).group, nbytes, kind)
