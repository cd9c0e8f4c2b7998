"""The binomial tree: the ranks that know, or the partial sums that are left, double or halve.

Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in MPICH",
International Journal of High Performance Computing Applications 19 (2005).
The whole vector travels in each message, however many chunks it is counted in.

Rank r's parent is r without its lowest bit; its children are r + m for each power of two m below
that bit.  The subtree of r is the ranks r to r + lowest bit - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from hvdkit.schedules.cost import Cost, log2_ceil
from hvdkit.schedules.steps import Exchange


def binomial_broadcast(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
    """Send the vector down a binomial tree, largest subtree first.  [Thakur et al. 2005]

    Steps ceil(log2 p), which is the bound; bytes sent by the root n ceil(log2 p), where n is the
    bound.  p = 4::

        step   from 0    from 1    from 2    from 3
        1      0→2 c0=
        2      0→1 c0=             2→3 c0=
    """
    vector = range(chunks)
    parent, children = _family(rank, size)
    if parent is not None:
        yield Exchange(store=(parent, vector))
    for child in reversed(children):
        yield Exchange(send=(child, vector))


def binomial_broadcast_cost(size: int, _chunks: int) -> Cost:
    """Return ceil(log2 p) steps and n ceil(log2 p) bytes."""
    return Cost(log2_ceil(size), Fraction(log2_ceil(size)))


def tree_allreduce(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
    """Reduce up a binomial tree to rank 0, then broadcast down it.  [Thakur et al. 2005]

    Steps 2 ceil(log2 p), twice the bound; bytes sent by the busiest rank n ceil(log2 p), where
    2n(p-1)/p is the bound.  p = 4::

        step   from 0    from 1    from 2    from 3
        1                1→0 c0+             3→2 c0+
        2                          2→0 c0+
        3      0→2 c0=
        4      0→1 c0=             2→3 c0=
    """
    vector = range(chunks)
    parent, children = _family(rank, size)
    for child in children:
        yield Exchange(reduce=(child, vector))
    if parent is not None:
        yield Exchange(send=(parent, vector))
    yield from binomial_broadcast(rank, size, chunks)


def tree_allreduce_cost(size: int, _chunks: int) -> Cost:
    """Return 2 ceil(log2 p) steps and n ceil(log2 p) bytes."""
    return Cost(2 * log2_ceil(size), Fraction(log2_ceil(size)))


def _family(rank: int, size: int) -> tuple[int | None, list[int]]:
    """Return the parent of `rank` (None for the root) and its children, smallest subtree first."""
    lowest_bit = rank & -rank
    children = []
    mask = 1
    while rank + mask < size and (mask < lowest_bit or rank == 0):
        children.append(rank + mask)
        mask *= 2
    return (rank - lowest_bit if rank else None), children
