"""A schedule run once for all ranks, where its generator takes an array of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from hvdkit.schedules.steps import Schedule, Transfer, chunk_indices
from hvdkit.simulation.rounds import Ints, Pairs, Round, without_empty

#: What a generator that cannot take an array may raise: arrays have no truth and are no index.
_REFUSALS = (AttributeError, IndexError, TypeError, ValueError)


@lru_cache(maxsize=64)
def takes_arrays(steps: Schedule, size: int, chunks: int) -> bool:
    """Return whether the generator, given all ranks as an array, yields what it yields for each.

    Every message must have both its ends in the same step.  What the array's steps are for some
    ranks (the first and last ones, and those around the middle) is held against what the generator
    yields for these ranks alone.
    """
    everyone: Any = np.arange(size)
    near = {0, 1, 2, 3, size // 2 - 1, size // 2, size - 2, size - 1}
    alone = {rank: steps(rank, size, chunks) for rank in near if 0 <= rank < size}
    matched: tuple[object, object] = (None, None)
    try:
        for step in steps(everyone, size, chunks):
            if step.send is None or step.receive is None:
                return False
            to: Any = step.send[0]
            source: Any = step.receive[0]
            if (to is not matched[0] or source is not matched[1]) and (
                source[to] != everyone
            ).any():
                return False
            matched = to, source
            for rank, one in alone.items():
                own = next(one, None)
                if own is None or not (
                    _same(step.send, own.send, rank)
                    and _same(step.reduce, own.reduce, rank)
                    and _same(step.store, own.store, rank)
                ):
                    return False
    except _REFUSALS:
        return False
    return all(next(one, None) is None for one in alone.values())


def evaluate(steps: Schedule, size: int, chunks: int, held: int) -> Iterator[Round]:
    """Yield the rounds of a schedule that `takes_arrays`, each of them a step of every rank.

    Args:
        steps, size, chunks: the schedule, and what it is run for.
        held: chunks from this one on are empty.
    """
    everyone: Any = np.arange(size)
    pairs = Pairs(everyone, everyone)
    for step in steps(everyone, size, chunks):
        assert step.send is not None
        to: Any = step.send[0]
        if to is not pairs.destination:
            pairs = Pairs(everyone, to)
        units = _units(step.send[1], chunks, held)
        some = without_empty(Round(pairs, units, step.reduce is not None, everyone))
        if some is not None:
            yield some


def _units(carried: Any, chunks: int, held: int) -> int | Ints:
    """Return how many chunks that are not empty the message of each rank carries."""
    several = isinstance(carried, tuple | range)
    if held >= chunks:
        return len(carried) if several else 1
    return sum(
        (np.asarray(chunk) < held).astype(np.int64) for chunk in (carried if several else [carried])
    )


def _same(everyones: Transfer | None, ones: Transfer | None, rank: int) -> bool:
    """Return whether a transfer of all ranks is, for one of them, what it alone has."""
    if everyones is None or ones is None:
        return everyones is ones
    if _of(everyones[0], rank) != ones[0]:
        return False
    carried = everyones[1]
    if isinstance(carried, tuple | range):
        return tuple(_of(chunk, rank) for chunk in carried) == chunk_indices(ones[1])
    return chunk_indices(ones[1]) == (_of(carried, rank),)


def _of(number: Any, rank: int) -> int:
    return int(number[rank]) if isinstance(number, np.ndarray) else int(number)
