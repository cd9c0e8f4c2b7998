"""A schedule's messages, of all ranks together, in rounds: what can be in flight at the same time.

A schedule is a generator for one rank, and thousands of ranks take millions of steps.  Where it
does nothing but arithmetic with its rank, it is run once, with the numbers of all ranks as its
rank::

    ring_allreduce(np.arange(p), p, p)  yields  Exchange(send=(array of p peers, array of p chunks),
                                                         reduce=(array of p peers, ...))

so that one operation of numpy plays a step of all of them (see `evaluation`).  One that branches on
its rank, as a tree does, is run for every rank, and its messages are sorted into rounds (see
`expansion`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: Numbers of ranks, or numbers for ranks.
Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Pairs:
    """Who sends to whom: a rank sends at most once, and receives at most once.

    Args:
        source: the ranks that send.
        destination: the rank that each of them sends to.
    """

    source: Ints
    destination: Ints


@dataclass(frozen=True, eq=False, slots=True)
class Round:
    """Messages that may be in flight together.

    Args:
        pairs: who sends to whom; the same object again where the pairs are the same again.
        units: how many chunks a message carries: one number for all, or one for each.
        reduces: whether they are combined with what the receiver has: for all, or for each.
        entering: the ranks whose next step begins in this round.
    """

    pairs: Pairs
    units: int | Ints
    reduces: bool | NDArray[np.bool_]
    entering: Ints


def placed(some: Iterable[Round], lines: Ints, width: int = 1) -> Iterator[Round]:
    """Yield the rounds of one group as all groups play them side by side.

    Args:
        some: in which the ranks of the group are 0, 1, ...
        lines: ``lines[g, i]`` is rank i of group g.
        width: chunks of the whole message in one of the group's.
    """
    near, far = None, None
    entering, entered = None, None
    for each in some:
        if each.pairs is not near:
            near = each.pairs
            far = Pairs(lines[:, near.source].ravel(), lines[:, near.destination].ravel())
        if each.entering is not entering:
            entering = each.entering
            entered = lines[:, entering].ravel()
        assert far is not None and entered is not None
        yield Round(
            pairs=far,
            units=_repeated(each.units, len(lines)) * width,
            reduces=_repeated(each.reduces, len(lines)),
            entering=entered,
        )


def side_by_side(playing: Sequence[Iterator[Round]]) -> Iterator[Round]:
    """Yield the rounds of several sets of ranks as one: the first of each together, and so on."""
    if len(playing) == 1:
        yield from playing[0]
        return
    for slots in zip_longest(*playing):
        together = [some for some in slots if some is not None]
        yield Round(
            pairs=Pairs(
                np.concatenate([some.pairs.source for some in together]),
                np.concatenate([some.pairs.destination for some in together]),
            ),
            units=np.concatenate([_spread(some.units, some) for some in together]),
            reduces=np.concatenate([_spread(some.reduces, some) for some in together]),
            entering=np.concatenate([some.entering for some in together]),
        )


def without_empty(some: Round) -> Round | None:
    """Return the round without messages that carry nothing; None if it has no other."""
    if isinstance(some.units, int):
        return some if some.units else None
    kept = some.units > 0
    if kept.all():
        return some
    if not kept.any():
        return None
    pairs = Pairs(some.pairs.source[kept], some.pairs.destination[kept])
    active = np.union1d(pairs.source, pairs.destination)
    return replace(
        some,
        pairs=pairs,
        units=some.units[kept],
        reduces=some.reduces if isinstance(some.reduces, bool) else some.reduces[kept],
        entering=np.intersect1d(some.entering, active),
    )


def _repeated(value: Any, times: int) -> Any:
    """Return one group's value, or values, for `times` groups."""
    return np.tile(value, times) if isinstance(value, np.ndarray) else value


def _spread(value: Any, some: Round) -> NDArray[Any]:
    """Return a value for each message of a round."""
    return np.broadcast_to(value, some.pairs.source.shape)
