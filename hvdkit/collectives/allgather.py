"""All-gather: every rank ends with the arrays of all ranks, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.collectives.learning import ask_from_now_on, with_lengths
from hvdkit.collectives.pick import pick
from hvdkit.collectives.repeat import Remember, Repeat
from hvdkit.collectives.scheduled import run_schedule
from hvdkit.dtypes import check_supported, exported
from hvdkit.errors import HvdkitError
from hvdkit.transport.device import Memory


@dataclass(frozen=True)
class _Layout:
    """What follows from the lengths of all ranks."""

    shape: tuple[int, ...]
    counts: tuple[int, ...]
    algorithm: str


def allgather(
    group: Group,
    source: Memory,
    *,
    name: str | None,
    algorithm: str,
    allocate: Callable[[tuple[int, ...], np.dtype[Any]], Any] | None = None,
    remember: Remember | None = None,
) -> NDArray[Any]:
    """Return all ranks' `source` concatenated along the first dimension, in rank order; blocking.

    Args:
        group: the ranks.
        source: C-contiguous; the first dimension may differ between ranks, the others and the
            dtype may not.  A scalar counts as one row.
        name: for messages and the check.
        algorithm: a schedule's name, ``"shm"``, ``"mpi"`` or ``"auto"``.
        allocate: makes the result; for ``"mpi"`` it may be on a device, as `source` may.  None: as
            the group does.
        remember: told how the call is made again, once that is known.

    Raises:
        MismatchError: on every rank, if ranks disagree.
        ArgumentError, UnsupportedError: unknown algorithm, unsupported dtype.
    """
    if source.ndim == 0:
        source = source.reshape(1)
    row = source.shape[1:]
    key = ("allgather", source.dtype, row, name, algorithm)
    call: Call | None = group.recall(key)
    if call is None:
        try:
            check_supported(source.dtype)
            pick("allgather", algorithm, 0, no_arena=group.no_arena)
        except HvdkitError as exc:
            group.refuse("allgather", name, exc)
        call = Call(
            "allgather",
            name,
            (
                ("dtype", source.dtype.name),
                ("shape", f"({', '.join(['any', *map(str, row)])})"),
                ("algorithm", algorithm),
            ),
        )
        group.keep(key, call)

    began = group.begin(call)

    def lay_out(lengths: NDArray[np.int64]) -> _Layout:
        rows = lengths[:, 0]
        width = math.prod(row) * source.itemsize
        return _Layout(
            shape=(int(rows.sum()), *row),
            counts=tuple((rows * width).tolist()),
            algorithm=pick(
                "allgather",
                algorithm,
                int(rows.sum()) * width,
                no_arena=group.no_arena,
                estimates=group.estimates,
            ),
        )

    def transfer(layout: _Layout, signature: int) -> NDArray[Any] | None:
        out: NDArray[Any] = (allocate or group.results.empty)(layout.shape, source.dtype)
        counts = layout.counts
        if layout.algorithm == "shm":
            assert group.arena is not None and isinstance(source, np.ndarray)
            arguments = (exported(source), exported(out), counts, signature)
            if group.arena_call(group.arena.native.allgather, *arguments):
                return None
            group.record(call, "shm", out.nbytes, began)
            return out
        mine, everything = source.reshape(-1).view(np.uint8), out.reshape(-1).view(np.uint8)
        if layout.algorithm == "mpi":
            group.library(everything.nbytes).library_allgather(mine, everything, counts)
        else:
            assert isinstance(mine, np.ndarray)
            start = sum(counts[: group.rank])
            everything[start : start + mine.size] = mine
            run_schedule(group, "allgather", layout.algorithm, everything, counts=counts)
        group.record(call, layout.algorithm, out.nbytes, began)
        return out

    def again(other: NDArray[Any]) -> NDArray[Any]:
        ask_from_now_on(group, call)
        return allgather(group, other, name=name, algorithm=algorithm)

    def learnt(layout: _Layout, signature: int) -> None:
        assert group.arena is not None and remember is not None
        bound = group.arena.native.bind("allgather", layout.counts, signature)
        nbytes = sum(layout.counts)
        remember(Repeat(call, source.dtype, nbytes, bound, again, layout.shape))

    return with_lengths(
        group,
        call,
        (source.shape[0],),
        lay_out,
        transfer,
        in_arena=group.arena is not None and algorithm in ("auto", "shm"),
        learnt=None if remember is None else learnt,
    )
