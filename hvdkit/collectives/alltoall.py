"""All-to-all: every rank sends each rank its own rows."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.collectives.learning import with_lengths
from hvdkit.collectives.pick import pick
from hvdkit.dtypes import check_supported
from hvdkit.errors import ArgumentError, HvdkitError


def alltoall(
    group: Group,
    source: NDArray[Any],
    splits: Sequence[int] | None,
    *,
    name: str | None,
    algorithm: str,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Send `splits[r]` rows of `source` to each rank r; blocking.

    Args:
        group: the ranks.
        source: C-contiguous, of at least one dimension; the rows for rank 0 first, then for rank
            1, and so on.  All but the first dimension, and the dtype, are equal on all ranks.
        splits: rows for each rank; None: equally many.
        name: for messages and the check.
        algorithm: a schedule's name, ``"shm"``, ``"mpi"`` or ``"auto"``.

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
    sent = source.reshape(-1).view(np.uint8)
    width = math.prod(row) * source.itemsize
    outgoing = [n * width for n in mine]

    def transfer(
        matrix: NDArray[np.int64], signature: int
    ) -> tuple[NDArray[Any], NDArray[np.int64]] | None:
        rows = matrix[:, group.rank].copy()
        incoming = (rows * width).tolist()
        out = np.empty((int(rows.sum()), *row), source.dtype)
        received = out.reshape(-1).view(np.uint8)
        way = pick("alltoall", algorithm, int(matrix.sum()) * width, no_arena=group.no_arena)
        if way == "shm":
            assert group.arena is not None
            status = group.arena_call(
                group.arena.native.alltoall,
                sent,
                received,
                tuple(outgoing),
                tuple(incoming),
                int(matrix.max()) * width,
                signature,
            )
            return None if status else (out, rows)
        if way == "mpi":
            largest = int(max(matrix.sum(0).max(), matrix.sum(1).max())) * width
            group.library(largest).library_alltoall(sent, received, outgoing, incoming)
        else:
            # What a rank sends to itself, the schedule leaves out.
            begin, start = sum(incoming[: group.rank]), sum(outgoing[: group.rank])
            own = outgoing[group.rank]
            received[begin : begin + own] = sent[start : start + own]
            group.run_schedule(
                "alltoall", way, received, counts=incoming, source=sent, source_counts=outgoing
            )
        return out, rows

    in_arena = group.arena is not None and algorithm in ("auto", "shm")
    return with_lengths(group, call, mine, transfer, in_arena=in_arena)


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
