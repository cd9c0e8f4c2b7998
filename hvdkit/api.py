"""The convenience functions: ``import hvdkit as hvd``.  A thin face of one `Context`."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hvdkit import collectives
from hvdkit.collectives.explaining import Explanation
from hvdkit.config import Config
from hvdkit.context import Context
from hvdkit.dtypes import Average
from hvdkit.endings import LastWords
from hvdkit.engine.communicator import Communicator
from hvdkit.errors import ArgumentError, NotInitializedError
from hvdkit.process_sets import ProcessSet

_context: Context | None = None
_last_words: LastWords | None = None


def init(comm: Any = None, process_sets: Sequence[ProcessSet] | str | None = None) -> None:
    """Join the job.  Collective, blocking; starts MPI if nobody has.  Again: does nothing.

    From here on an uncaught exception on one rank ends the whole job, after its traceback; so does
    an exit with another status than 0, by ``sys.exit``, ``exit`` or ``quit``.

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
    global _context, _last_words  # noqa: PLW0603  (the one place that holds the state)
    if _context is not None:
        if comm is not None or process_sets:
            raise ArgumentError("hvdkit is initialised already; call shutdown() before init(...)")
        return
    known = () if process_sets is None or isinstance(process_sets, str) else process_sets
    _context = Context(comm, Config.from_environment(os.environ), known)
    if _context.group.size > 1:
        _last_words = LastWords(_context)
        _last_words.install()
    atexit.register(_leave, os.getpid())


def shutdown() -> None:
    """Leave the job.  Collective; ``init()`` may follow.  Does nothing when not initialised."""
    global _context, _last_words  # noqa: PLW0603
    if _context is None:
        return
    leaving, _context = _context, None
    if _last_words is not None:
        _last_words.remove()
        _last_words = None
    atexit.unregister(_leave)
    leaving.close()


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
    return _context is not None


def context() -> Context:
    """Return the state behind these functions.  Local.

    Raises:
        NotInitializedError: ``init()`` was not called.
    """
    if _context is None:
        raise NotInitializedError("hvdkit is not initialised: call hvd.init() first")
    return _context


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


def allreduce(
    x: Any,
    op: object = Average,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    algorithm: str = "auto",
    process_set: ProcessSet | None = None,
) -> NDArray[Any]:
    """Return the combination of all ranks' `x`, bitwise the same on all.  Collective, blocking.

    Args:
        x: an array, or anything that numpy reads as one; equal shape and dtype on all ranks.
        op: `Average`, `Sum`, `Min`, `Max` or `Product`.  Integer averages truncate toward zero.
        name: named in errors; ranks must give the same one.
        prescale_factor: multiplies each contribution first.
        postscale_factor: multiplies the result last.
        algorithm: ``"auto"``, ``"shm"`` (the node's shared memory), ``"hierarchical"`` (that of
            several nodes, and messages between them), ``"gathered"`` (small arrays over messages,
            in one go), ``"mpi"`` (the MPI library's own) or a schedule: ``"ring"``, ``"tree"``,
            ``"double_tree"``, ``"recursive_doubling"``, ``"halving_doubling"``.
        process_set: whose ranks take part; None: all ranks.

    Returns:
        New array of `x`'s shape and dtype.  float16 and bfloat16 add in float32.

    Raises:
        MismatchError: on every rank, showing what each had, if ranks disagree.
        ArgumentError: unknown op or algorithm; lists the known ones.
        UnsupportedError: dtype that is not supported, or has no such op.
        PeerError: another rank died.
        NotInitializedError: ``init()`` was not called.
    """
    among = (_context or context()).world if process_set is None else communicator(process_set)
    return among.allreduce(x, op, name, prescale_factor, postscale_factor, algorithm)


def allreduce_(
    x: NDArray[Any],
    op: object = Average,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    algorithm: str = "auto",
    process_set: ProcessSet | None = None,
) -> NDArray[Any]:
    """Replace `x` by the combination of all ranks' `x`, and return it; else as `allreduce`."""
    among = (_context or context()).world if process_set is None else communicator(process_set)
    return among.allreduce(x, op, name, prescale_factor, postscale_factor, algorithm, True)


def allgather(
    x: Any,
    name: str | None = None,
    algorithm: str = "auto",
    process_set: ProcessSet | None = None,
) -> NDArray[Any]:
    """Return all ranks' `x` joined along the first dimension, in rank order.  Collective, blocking.

    Args:
        x: an array; its first dimension may differ between ranks.  A scalar counts as one row.
        name: named in errors.
        algorithm: ``"auto"``, ``"shm"``, ``"mpi"``, ``"ring"`` or ``"bruck"``.
        process_set: whose ranks take part; None: all ranks.

    Raises:
        MismatchError, ArgumentError, UnsupportedError, PeerError: as `allreduce`.
    """
    return communicator(process_set).allgather(x, name, algorithm)


def reducescatter(
    x: Any,
    op: object = Average,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    algorithm: str = "auto",
    process_set: ProcessSet | None = None,
) -> NDArray[Any]:
    """Return this rank's rows of the combination of all ranks' `x`.  Collective, blocking.

    Args:
        x: an array of at least one dimension; equal shape and dtype on all ranks.  Its rows are
            shared out in order; the first ranks get one more where they do not divide.
        op, name, prescale_factor, postscale_factor: as `allreduce`.
        algorithm: ``"auto"``, ``"shm"``, ``"mpi"``, ``"ring"`` or ``"recursive_halving"``.
        process_set: whose ranks take part; None: all ranks.

    Raises:
        MismatchError, ArgumentError, UnsupportedError, PeerError: as `allreduce`.
    """
    among = communicator(process_set)
    return among.reducescatter(x, op, name, prescale_factor, postscale_factor, algorithm)


def broadcast(
    x: Any,
    root_rank: int = 0,
    name: str | None = None,
    algorithm: str = "auto",
    process_set: ProcessSet | None = None,
) -> NDArray[Any]:
    """Return the root's `x` on every rank, as a new array.  Collective, blocking.

    Args:
        x: an array; equal shape and dtype on all ranks.
        root_rank: the rank whose `x` it is, counted among all ranks.
        name: named in errors.
        algorithm: ``"auto"``, ``"shm"``, ``"mpi"``, ``"binomial"`` or ``"chain"``.
        process_set: whose ranks take part; None: all ranks.

    Raises:
        MismatchError, ArgumentError, UnsupportedError, PeerError: as `allreduce`.
    """
    return communicator(process_set).broadcast(x, root_rank, name, algorithm)


def broadcast_(
    x: NDArray[Any],
    root_rank: int = 0,
    name: str | None = None,
    algorithm: str = "auto",
    process_set: ProcessSet | None = None,
) -> NDArray[Any]:
    """Replace `x` by the root's, and return it; else as `broadcast`."""
    among = communicator(process_set)
    return among.broadcast(x, root_rank, name, algorithm, True)


def alltoall(
    x: Any,
    splits: Sequence[int] | None = None,
    name: str | None = None,
    algorithm: str = "auto",
    process_set: ProcessSet | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[np.int64]]:
    """Send rows of `x` to every rank, and return the rows received.  Collective, blocking.

    Args:
        x: an array; the rows for rank 0 come first, then those for rank 1, and so on.
        splits: how many rows go to each rank; None: equally many.
        name: named in errors.
        algorithm: ``"auto"``, ``"shm"``, ``"mpi"`` or ``"pairwise"``.
        process_set: whose ranks take part; None: all ranks.

    Returns:
        The rows received, in rank order; with `splits` also how many came from each rank.

    Raises:
        ArgumentError: `splits` do not fit `x`; the other ranks get a MismatchError that says so.
        MismatchError, UnsupportedError, PeerError: as `allreduce`.
    """
    among = communicator(process_set)
    if splits is None:
        return among.alltoall_evenly(x, name, algorithm)
    return among.alltoall(x, splits, name, algorithm)


def barrier(
    name: str | None = None, algorithm: str = "auto", process_set: ProcessSet | None = None
) -> None:
    """Return when every rank has called.  Collective, blocking.

    Args:
        name: named in errors.
        algorithm: ``"auto"``, ``"shm"``, ``"mpi"`` or ``"dissemination"``.
        process_set: whose ranks take part; None: all ranks.

    Raises:
        MismatchError, ArgumentError, PeerError: as `allreduce`.
    """
    communicator(process_set).barrier(name=name, algorithm=algorithm)


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet | None = None,
) -> Any:
    """Return the root's picklable `obj` on every rank.  Collective, blocking."""
    return communicator(process_set).broadcast_object(obj, root_rank, name=name)


def allgather_object(
    obj: Any, name: str | None = None, process_set: ProcessSet | None = None
) -> list[Any]:
    """Return every rank's picklable `obj`, in rank order.  Collective, blocking."""
    return communicator(process_set).allgather_object(obj, name=name)


def join() -> int:
    """Take part in the others' calls, having no more data, until every rank joins.  Collective.

    Until then the others can all-reduce, to which this rank adds nothing (averages are still over
    all ranks), and wait at barriers; for other collectives they get an error.

    Returns:
        The rank that joined last.
    """
    return context().join()


def add_process_set(process_set: ProcessSet | Iterable[int]) -> ProcessSet:
    """Make a process set of use, and return it.  Collective among all ranks, blocking.

    Args:
        process_set: a `ProcessSet`, or a list of ranks.

    Raises:
        ArgumentError: ranks that there are not, or the set is there already; the other ranks get
            a MismatchError that says so.
        MismatchError: ranks gave different sets.
    """
    return context().add_process_set(process_set)


def remove_process_set(process_set: ProcessSet) -> bool:
    """Let go of a process set; return whether it was one.  Collective among all ranks, blocking.

    The set of all ranks stays.
    """
    return context().remove_process_set(process_set)


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


def empty(shape: Sequence[int] | int, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Return a zeroed array in the memory that the node's ranks share.  Collective.

    Such an array is all-reduced in place without staging, which is the fastest way there is.
    Where ranks share no memory it is an ordinary array.
    """
    return context().world.empty(shape, dtype)
