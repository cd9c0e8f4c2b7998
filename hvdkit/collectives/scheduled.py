"""Schedules on a group's arrays: laid out, once where chunks are even, and run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.group import Group
from hvdkit.collectives.prepared import PreparedSchedule
from hvdkit.collectives.program import Move, bounds_of, even_bounds, lay_out
from hvdkit.dtypes import DTYPE_CODES, ReduceOp
from hvdkit.schedules import registry


def run_schedule(
    group: Group,
    kind: str,
    algorithm: str,
    target: NDArray[Any],
    *,
    counts: Sequence[int] | None = None,
    source: NDArray[Any] | None = None,
    source_counts: Sequence[int] | None = None,
    op: ReduceOp = ReduceOp.SUM,
    root: int = 0,
) -> None:
    """Run a schedule over 1-D `target`, blocking.  Collective.

    Args:
        group: the ranks.
        kind, algorithm: as the registry has them.
        target: where the result goes, cut evenly or into `counts` elements a chunk.
        counts: None: evenly.
        source: of the same dtype, what is sent, if not `target`: `source_counts` a chunk.
        source_counts: of `source`.
        op: what reduces.
        root: of a broadcast.
    """
    if counts is not None:
        moves = _lay_out(group, kind, algorithm, target, counts, source_counts, root)
    elif source is None and group.estimates.is_short(target.nbytes):
        _run_short(group, kind, algorithm, target, op, root)
        return
    else:
        moves = _moves(group, kind, algorithm, target, root)
    group.executor.run(moves, target, source=source, op=op, recorder=group.tracer)


def prepare_schedule(
    group: Group, kind: str, algorithm: str, count: int, dtype: np.dtype[Any], root: int = 0
) -> PreparedSchedule:
    """Return a schedule on `count` elements, which are cut evenly.  Local."""
    found = registry.get(kind, algorithm)
    return PreparedSchedule(found, count, dtype, group.executor, root=root)


def _run_short(
    group: Group, kind: str, algorithm: str, target: NDArray[Any], op: ReduceOp, root: int
) -> None:
    like = (kind, algorithm, target.size, target.dtype, root)
    schedule = group.prepared.get(like, lambda: prepare_schedule(group, *like))
    recipe = (DTYPE_CODES[target.dtype], int(op), 1.0, 1, 1.0, 1)
    schedule.run(recipe, target, target, group.tracer)


def _moves(
    group: Group, kind: str, algorithm: str, target: NDArray[Any], root: int
) -> tuple[Move, ...]:
    """Return the moves of a schedule that cuts a message evenly."""
    key = (kind, algorithm, target.size, target.itemsize, root)
    moves = group.recall(key)
    if moves is None:
        moves = _lay_out(group, kind, algorithm, target, None, None, root)
        group.keep(key, moves)
    return cast("tuple[Move, ...]", moves)


def _lay_out(
    group: Group,
    kind: str,
    algorithm: str,
    target: NDArray[Any],
    counts: Sequence[int] | None,
    source_counts: Sequence[int] | None,
    root: int,
) -> tuple[Move, ...]:
    found = registry.get(kind, algorithm)
    # Counts, and so the bytes of `target`, may differ between ranks; messages may not.
    segment = (
        group.segment_bytes if counts is not None else group.estimates.segment_bytes(target.nbytes)
    )
    chunks = found.chunks(group.size, max(1, -(-target.nbytes // segment)))
    return lay_out(
        found.steps((group.rank - root) % group.size, group.size, chunks),
        group.size,
        even_bounds(target.size, chunks) if counts is None else bounds_of(counts),
        source=None if source_counts is None else bounds_of(source_counts),
        longest=max(1, segment // target.itemsize),
        root=root,
    )
