"""All-to-all: every rank sends each rank its own rows."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.collectives.learning import ask_from_now_on, with_lengths
from hvdkit.collectives.pick import pick
from hvdkit.collectives.repeat import Remember, Repeat
from hvdkit.collectives.scheduled import run_schedule
from hvdkit.dtypes import check_supported, exported
from hvdkit.errors import ArgumentError, HvdkitError

#: The rows received, and how many came from each rank.
Received: TypeAlias = tuple[NDArray[Any], NDArray[np.int64]]


@dataclass(frozen=True)
class _Layout:
    """What follows from the splits of all ranks; lengths in bytes."""

    rows: NDArray[np.int64]
    shape: tuple[int, ...]
    outgoing: tuple[int, ...]
    incoming: tuple[int, ...]
    largest_pair: int
    largest_rank: int
    algorithm: str


def alltoall(
    group: Group,
    source: NDArray[Any],
    splits: Sequence[int] | None,
    *,
    name: str | None,
    algorithm: str,
    remember: Remember | None = None,
) -> Received:
    """Send `splits[r]` rows of `source` to each rank r; blocking.

    Args:
        group: the ranks.
        source: C-contiguous, of at least one dimension; the rows for rank 0 first, then for rank
            1, and so on.  All but the first dimension, and the dtype, are equal on all ranks.
        splits: rows for each rank; None: equally many.
        name: for messages and the check.
        algorithm: a schedule's name, ``"shm"``, ``"mpi"`` or ``"auto"``.
        remember: told how the call is made again, for the received rows alone, once that is known.

    Returns:
        The received rows in rank order, and how many came from each rank.

    Raises:
        MismatchError: on every rank, if ranks disagree or one could not make the call.
        ArgumentError, UnsupportedError: splits that do not fit, unknown algorithm, bad dtype.
    """
    row = source.shape[1:]
    key = ("alltoall", source.dtype, row, name, algorithm)
    call: Call | None = group.recall(key)
    try:
        if call is None:
            check_supported(source.dtype)
            pick("alltoall", algorithm, 0, no_arena=group.no_arena)
        mine = check_splits(source.shape, splits, group.size)
    except HvdkitError as exc:
        group.refuse("alltoall", name, exc)
    if call is None:
        call = Call(
            "alltoall",
            name,
            (
                ("dtype", source.dtype.name),
                ("shape", f"({', '.join(['any', *map(str, row)])})"),
                ("algorithm", algorithm),
            ),
        )
        group.keep(key, call)

    began = group.begin(call)

    def lay_out(matrix: NDArray[np.int64]) -> _Layout:
        width = math.prod(row) * source.itemsize
        rows = matrix[:, group.rank].copy()
        total = int(matrix.sum()) * width
        return _Layout(
            rows=rows,
            shape=(int(rows.sum()), *row),
            outgoing=tuple(n * width for n in mine),
            incoming=tuple((rows * width).tolist()),
            largest_pair=int(matrix.max()) * width,
            largest_rank=int(max(matrix.sum(0).max(), matrix.sum(1).max())) * width,
            algorithm=pick("alltoall", algorithm, total, no_arena=group.no_arena),
        )

    def transfer(layout: _Layout, signature: int) -> Received | None:
        out = group.results.empty(layout.shape, source.dtype)
        if layout.algorithm == "shm":
            assert group.arena is not None
            lengths = (layout.outgoing, layout.incoming, layout.largest_pair)
            arguments = (exported(source), exported(out), *lengths, signature)
            if group.arena_call(group.arena.native.alltoall, *arguments):
                return None
        else:
            sent, received = source.reshape(-1).view(np.uint8), out.reshape(-1).view(np.uint8)
            _exchange(group, sent, received, layout)
        group.record(call, layout.algorithm, source.nbytes, began)
        return out, layout.rows.copy()

    def again(other: NDArray[Any]) -> NDArray[Any]:
        ask_from_now_on(group, call)
        return alltoall(group, other, splits, name=name, algorithm=algorithm)[0]

    def learnt(layout: _Layout, signature: int) -> None:
        assert group.arena is not None and remember is not None
        lengths = (layout.outgoing, layout.incoming, layout.largest_pair)
        bound = group.arena.native.bind("alltoall", *lengths, signature)
        remember(Repeat(call, source.dtype, source.nbytes, bound, again, layout.shape))

    return with_lengths(
        group,
        call,
        mine,
        lay_out,
        transfer,
        in_arena=group.arena is not None and algorithm in ("auto", "shm"),
        learnt=None if remember is None else learnt,
    )


def _exchange(
    group: Group, sent: NDArray[np.uint8], received: NDArray[np.uint8], layout: _Layout
) -> None:
    """Exchange bytes over messages."""
    outgoing, incoming = layout.outgoing, layout.incoming
    if layout.algorithm == "mpi":
        library = group.library(layout.largest_rank)
        library.library_alltoall(sent, received, outgoing, incoming)
        return
    # What a rank sends to itself, the schedule leaves out.
    begin, start = sum(incoming[: group.rank]), sum(outgoing[: group.rank])
    own = outgoing[group.rank]
    received[begin : begin + own] = sent[start : start + own]
    run_schedule(
        group,
        "alltoall",
        layout.algorithm,
        received,
        counts=incoming,
        source=sent,
        source_counts=outgoing,
    )


def check_splits(shape: Sequence[int], splits: Sequence[int] | None, size: int) -> list[int]:
    """Return the rows for each rank.

    Raises:
        ArgumentError: `splits` has not one entry a rank, has a negative one, or does not sum up
            to the rows; or, without splits, the rows cannot be shared out equally.
    """
    if not shape:
        raise ArgumentError("alltoall needs an array of at least one dimension")
    if splits is None:
        if shape[0] % size:
            raise ArgumentError(
                f"{shape[0]} rows cannot be shared equally among {size} ranks; give splits"
            )
        return [shape[0] // size] * size
    try:
        rows = [operator.index(n) for n in splits]
    except TypeError:
        raise ArgumentError(f"splits {splits!r} are not whole numbers, one a rank") from None
    if len(rows) != size:
        raise ArgumentError(f"splits has {len(rows)} entries for {size} ranks")
    if min(rows) < 0:
        raise ArgumentError(f"splits {rows} has a negative entry")
    if sum(rows) != shape[0]:
        raise ArgumentError(
            f"splits {rows} sum up to {sum(rows)}, but the array has {shape[0]} rows"
        )
    return rows
