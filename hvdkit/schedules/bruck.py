"""Bruck's all-gather: as few steps as recursive doubling, for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from hvdkit.schedules.cost import Cost, log2_ceil
from hvdkit.schedules.steps import Exchange


def bruck_allgather(rank: int, size: int, _chunks: int) -> Iterator[Exchange]:
    """Send all that is held to the rank 1, 2, 4, ... to the left.  [Bruck et al. 1997]

    Bruck, Ho, Kipnis, Upfal & Weathersby, "Efficient algorithms for all-to-all communications in
    multiport message-passing systems", IEEE Transactions on Parallel and Distributed Systems 8
    (1997).  The paper keeps a rank's own block first and rotates at the end; chunks
    that bear their names need no rotation.

    Before the step of distance d a rank holds the d chunks from its own on, cyclically; in the
    last step it sends only as many as are missing.

    Steps ceil(log2 p), bytes sent a rank n(p-1)/p: both are the bound.  p = 3::

        step   from 0    from 1    from 2
        1      0→2 c0=   1→0 c1=   2→1 c2=
        2      0→1 c0=   1→2 c1=   2→0 c2=
    """
    distance = 1
    while distance < size:
        left, right = (rank - distance) % size, (rank + distance) % size
        count = min(distance, size - distance)
        mine = tuple((rank + i) % size for i in range(count))
        theirs = tuple((right + i) % size for i in range(count))
        yield Exchange(send=(left, mine), store=(right, theirs))
        distance *= 2


def bruck_allgather_cost(size: int, _chunks: int) -> Cost:
    """Return ceil(log2 p) steps and n(p-1)/p bytes."""
    return Cost(log2_ceil(size), Fraction(size - 1, size))
