"""The ring: every rank sends to its right neighbour and receives from its left, all at once.

Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", Journal
of Parallel and Distributed Computing 69 (2009).  One chunk a rank: chunks == size.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from hvdkit.schedules.cost import Cost
from hvdkit.schedules.steps import Exchange


def ring_allreduce(rank: int, size: int, _chunks: int) -> Iterator[Exchange]:
    """Reduce-scatter, then all-gather, around a ring.  [Patarasuk & Yuan 2009]

    Steps 2(p-1), where ceil(log2 p) is the bound; bytes sent a rank 2n(p-1)/p, which is the bound.
    p = 3 (c0+ is reduced into chunk 0, c0= replaces it)::

        step   from 0    from 1    from 2
        1      0→1 c0+   1→2 c1+   2→0 c2+
        2      0→1 c2+   1→2 c0+   2→0 c1+
        3      0→1 c1=   1→2 c2=   2→0 c0=
        4      0→1 c0=   1→2 c1=   2→0 c2=
    """
    right, left = (rank + 1) % size, (rank - 1) % size
    for k in range(size - 1):  # reduce-scatter
        yield Exchange(send=(right, (rank - k) % size), reduce=(left, (rank - k - 1) % size))
    for k in range(size - 1):  # all-gather
        yield Exchange(send=(right, (rank + 1 - k) % size), store=(left, (rank - k) % size))


def ring_allreduce_cost(size: int, _chunks: int) -> Cost:
    """Return 2(p-1) steps and 2n(p-1)/p bytes."""
    return Cost(2 * (size - 1), Fraction(2 * (size - 1), size))


def ring_reducescatter(rank: int, size: int, _chunks: int) -> Iterator[Exchange]:
    """Pass partial sums around a ring until each has met all ranks.  [Patarasuk & Yuan 2009]

    Chunk r sets out from rank r + 1, so that it ends at rank r.

    Steps p-1, where ceil(log2 p) is the bound; bytes sent a rank n(p-1)/p, which is the bound.
    p = 3::

        step   from 0    from 1    from 2
        1      0→1 c2+   1→2 c0+   2→0 c1+
        2      0→1 c1+   1→2 c2+   2→0 c0+
    """
    right, left = (rank + 1) % size, (rank - 1) % size
    for k in range(size - 1):
        yield Exchange(send=(right, (rank - k - 1) % size), reduce=(left, (rank - k - 2) % size))


def ring_allgather(rank: int, size: int, _chunks: int) -> Iterator[Exchange]:
    """Pass every rank's chunk on around a ring.  [Patarasuk & Yuan 2009, the second phase]

    Steps p-1, where ceil(log2 p) is the bound; bytes sent a rank n(p-1)/p, which is the bound.
    p = 3::

        step   from 0    from 1    from 2
        1      0→1 c0=   1→2 c1=   2→0 c2=
        2      0→1 c2=   1→2 c0=   2→0 c1=
    """
    right, left = (rank + 1) % size, (rank - 1) % size
    for k in range(size - 1):
        yield Exchange(send=(right, (rank - k) % size), store=(left, (rank - k - 1) % size))


def ring_half_cost(size: int, _chunks: int) -> Cost:
    """Return p-1 steps and n(p-1)/p bytes: one trip around, as reduce-scatter or all-gather."""
    return Cost(size - 1, Fraction(size - 1, size))
