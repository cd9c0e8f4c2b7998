"""Reduce-scatter: the combination of all ranks' arrays, each rank left with its rows of it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray

from hvdkit.collectives.group import Group
from hvdkit.collectives.reduction import plan_reduction
from hvdkit.collectives.repeat import Remember, Repeat
from hvdkit.collectives.scheduled import run_schedule
from hvdkit.dtypes import exported


@lru_cache
def rows_per_rank(rows: int, size: int) -> tuple[int, ...]:
    """Return how many rows each rank is left with: the first ranks get one more of the rest."""
    return tuple(rows // size + (rank < rows % size) for rank in range(size))


def reducescatter(
    group: Group,
    source: NDArray[Any],
    *,
    op: object,
    name: str | None,
    prescale: float,
    postscale: float,
    algorithm: str,
    remember: Remember | None = None,
) -> NDArray[Any]:
    """Return this rank's rows of the combination of all ranks' `source`; blocking.

    Args:
        group: the ranks.
        source: C-contiguous, of at least one dimension; equal shape and dtype on all ranks.
        op, name, prescale, postscale, algorithm: as for `allreduce`.
        remember: told how the call is made again.

    Returns:
        New array of shape ``(rows, *source.shape[1:])``, `rows` as `rows_per_rank` says.

    Raises:
        MismatchError: on every rank, if ranks disagree.
        ArgumentError, UnsupportedError: bad argument, dtype or algorithm.
        PeerError: another rank died.
    """
    plan = plan_reduction(
        group,
        "reducescatter",
        source,
        op=op,
        name=name,
        prescale=prescale,
        postscale=postscale,
        algorithm=algorithm,
    )
    rows = rows_per_rank(source.shape[0], group.size)
    width = math.prod(source.shape[1:])
    counts = tuple([n * width for n in rows])
    out = group.results.empty((rows[group.rank], *source.shape[1:]), source.dtype)
    began = group.begin(plan.call)
    if plan.algorithm == "shm":
        assert group.arena is not None
        arguments = (exported(source), exported(out), counts, *plan.native)
        while group.arena_call(group.arena.native.reducescatter, *arguments):
            group.settle(plan.call)
        group.record(plan.call, plan.algorithm, source.nbytes, began)
        if remember is not None:
            bound = group.arena.native.bind("reducescatter", counts, *plan.native)
            again = group.settling(plan.call)
            remember(Repeat(plan.call, source.dtype, source.nbytes, bound, again, out.shape))
        return out
    group.agree(plan.call)
    data = source.reshape(-1).copy()
    plan.begin(group, data)
    flat = out.reshape(-1)
    if plan.algorithm == "mpi":
        group.library(source.size).library_reducescatter(data, flat, counts, plan.op)
    else:
        run_schedule(group, "reducescatter", plan.algorithm, data, counts=counts, op=plan.op)
        start = sum(counts[: group.rank])
        flat[:] = data[start : start + flat.size]
    plan.finish(group, flat)
    group.record(plan.call, plan.algorithm, source.nbytes, began)
    return out
