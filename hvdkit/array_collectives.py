"""The collectives on arrays, each a call that returns when it is done: ``hvd.allreduce(x)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hvdkit import api
from hvdkit.api import communicator, context
from hvdkit.dtypes import Average
from hvdkit.process_sets import ProcessSet


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
            ``"double_tree"``, ``"recursive_doubling"``, ``"halving_doubling"``, ``"all_pairs"``.
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
    # A call less than `communicator` takes, which a short message notices.
    among = (api.current or context()).world if process_set is None else communicator(process_set)
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
    among = (api.current or context()).world if process_set is None else communicator(process_set)
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


def empty(shape: Sequence[int] | int, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Return a zeroed array in the memory that the node's ranks share.  Collective.

    Such an array is all-reduced in place without staging, which is the fastest way there is.
    Where ranks share no memory it is an ordinary array.
    """
    return context().world.empty(shape, dtype)
