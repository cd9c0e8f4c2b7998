"""The dissemination barrier: after step k every rank has heard of 2**k others."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from hvdkit.schedules.cost import Cost, log2_ceil
from hvdkit.schedules.steps import Exchange


def dissemination_barrier(rank: int, size: int, _chunks: int) -> Iterator[Exchange]:
    """Tell the rank 1, 2, 4, ... to the right who has come.  [Hensgen, Finkel & Manber 1988]

    "Two algorithms for barrier synchronization", International Journal of Parallel Programming 17
    (1988).  For sizes that are no power of two a rank is heard of more than once.

    Steps ceil(log2 p), which is the bound; tokens sent a rank ceil(log2 p), where 1 is the bound.
    p = 3::

        step   from 0    from 1    from 2
        1      0→1 c0+   1→2 c0+   2→0 c0+
        2      0→2 c0+   1→0 c0+   2→1 c0+
    """
    distance = 1
    while distance < size:
        yield Exchange(send=((rank + distance) % size, 0), reduce=((rank - distance) % size, 0))
        distance *= 2


def dissemination_barrier_cost(size: int, _chunks: int) -> Cost:
    """Return ceil(log2 p) steps and as many tokens."""
    return Cost(log2_ceil(size), Fraction(log2_ceil(size)))
