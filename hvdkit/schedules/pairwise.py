"""The pairwise all-to-all: every message goes straight to where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from hvdkit.schedules.cost import Cost
from hvdkit.schedules.steps import Exchange


def pairwise_alltoall(rank: int, size: int, _chunks: int) -> Iterator[Exchange]:
    """In step k send to the rank k to the right, receive from the rank k to the left.

    Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in MPICH",
    International Journal of High Performance Computing Applications 19 (2005): the form for any
    number of ranks.  Input and output are separate buffers: `send` names the input's chunk by its
    destination, `store` the output's by its source.  The rank's own chunk is copied outside of the
    schedule.

    Steps p-1, where ceil(log2 p) is the bound; bytes sent a rank n(p-1)/p, which is the bound.
    p = 3::

        step   from 0      from 1      from 2
        1      0→1 c1=c0   1→2 c2=c1   2→0 c0=c2
        2      0→2 c2=c0   1→0 c0=c1   2→1 c1=c2
    """
    for k in range(1, size):
        right, left = (rank + k) % size, (rank - k) % size
        yield Exchange(send=(right, right), store=(left, left))


def pairwise_alltoall_cost(size: int, _chunks: int) -> Cost:
    """Return p-1 steps and n(p-1)/p bytes."""
    return Cost(size - 1, Fraction(size - 1, size))
