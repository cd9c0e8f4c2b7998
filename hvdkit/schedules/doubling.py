"""Recursive doubling and halving: pairs of ranks at distances 1, 2, 4, ... exchange what they have.

Thakur, Rabenseifner & Gropp, "Optimization of collective communication operations in MPICH",
International Journal of High Performance Computing Applications 19 (2005).  The tables show p = 3,
in which ranks 0 and 1 are folded to one (see `fold`); q is the largest power of two with q <= p.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from hvdkit.schedules.cost import Cost, log2_floor
from hvdkit.schedules.fold import Fold
from hvdkit.schedules.steps import Exchange


def recursive_doubling(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
    """Exchange whole vectors at distances 1, 2, 4, ...  [Thakur et al. 2005]

    Steps log2 p, which is the bound, or floor(log2 p) + 2 if p is no power of two; bytes sent a
    rank n log2 p, or n (floor(log2 p) + 1), where 2n(p-1)/p is the bound.  p = 3::

        step   from 0    from 1    from 2
        1      0→1 c0+
        2                1→2 c0+   2→1 c0+
        3                1→0 c0=
    """
    vector = range(chunks)
    fold = Fold.of(rank, size)
    if fold.core is None:
        yield Exchange(send=(rank + 1, vector))
        yield Exchange(store=(rank + 1, vector))
        return
    if fold.partner is not None:
        yield Exchange(reduce=(fold.partner, vector))
    for distance in reversed([*fold.distances()]):
        peer = fold.rank_of(fold.core ^ distance)
        yield Exchange(send=(peer, vector), reduce=(peer, vector))
    if fold.partner is not None:
        yield Exchange(send=(fold.partner, vector))


def recursive_doubling_cost(size: int, _chunks: int) -> Cost:
    """Return floor(log2 p) steps and n floor(log2 p) bytes; if folded, 2 steps and n more."""
    folded = _is_folded(size)
    return Cost(log2_floor(size) + 2 * folded, Fraction(log2_floor(size) + folded))


def halving_doubling(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
    """Reduce-scatter by recursive halving, all-gather by recursive doubling.  [Rabenseifner 2004]

    The algorithm is Rabenseifner's ("Optimization of collective reduction operations", ICCS 2004,
    also in Thakur et al. 2005), over q chunks.

    Steps 2 log2 p, twice the bound, or 2 floor(log2 p) + 2 if p is no power of two; bytes sent a
    rank 2n(p-1)/p, which is the bound, or 2n(q-1)/q + n, at most 25/16 of the bound.
    p = 3::

        step   from 0      from 1      from 2
        1      0→1 c0-1+
        2                  1→2 c1+     2→1 c0+
        3                  1→2 c0=     2→1 c1=
        4                  1→0 c0-1=
    """
    vector = range(chunks)
    fold = Fold.of(rank, size)
    if fold.core is None:
        yield Exchange(send=(rank + 1, vector))
        yield Exchange(store=(rank + 1, vector))
        return
    if fold.partner is not None:
        yield Exchange(reduce=(fold.partner, vector))
    for distance in fold.distances():  # halving: of a block of 2 * distance chunks keep my half
        peer = fold.core ^ distance
        theirs, mine = _block(peer, distance), _block(fold.core, distance)
        yield Exchange(send=(fold.rank_of(peer), theirs), reduce=(fold.rank_of(peer), mine))
    for distance in reversed([*fold.distances()]):  # doubling: the same exchanges backwards
        peer = fold.core ^ distance
        theirs, mine = _block(peer, distance), _block(fold.core, distance)
        yield Exchange(send=(fold.rank_of(peer), mine), store=(fold.rank_of(peer), theirs))
    if fold.partner is not None:
        yield Exchange(send=(fold.partner, vector))


def halving_doubling_cost(size: int, _chunks: int) -> Cost:
    """Return 2 log2 q steps and 2n(q-1)/q bytes; if folded, 2 steps and n more."""
    folded = _is_folded(size)
    core = 1 << log2_floor(size)
    return Cost(2 * log2_floor(size) + 2 * folded, Fraction(2 * (core - 1), core) + folded)


def recursive_halving(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
    """Halve the block still to be reduced, at distances q/2, q/4, ... 1.  [Thakur et al. 2005]

    One chunk a rank.  A core rank stands for its pair's two chunks until the end.

    Steps log2 p, which is the bound, or floor(log2 p) + 2 if p is no power of two; bytes sent a
    rank n(p-1)/p, which is the bound, or n (by the ranks that are folded away).  p = 3::

        step   from 0      from 1      from 2
        1      0→1 c0-2+
        2                  1→2 c2+     2→1 c0-1+
        3                  1→0 c0=
    """
    fold = Fold.of(rank, size)
    if fold.core is None:
        yield Exchange(send=(rank + 1, range(chunks)))
        yield Exchange(store=(rank + 1, rank))
        return
    if fold.partner is not None:
        yield Exchange(reduce=(fold.partner, range(chunks)))
    for distance in fold.distances():
        peer = fold.core ^ distance
        theirs, mine = (
            range(fold.first_rank_of(block.start), fold.first_rank_of(block.stop))
            for block in (_block(peer, distance), _block(fold.core, distance))
        )
        yield Exchange(send=(fold.rank_of(peer), theirs), reduce=(fold.rank_of(peer), mine))
    if fold.partner is not None:
        yield Exchange(send=(fold.partner, fold.partner))


def recursive_halving_cost(size: int, _chunks: int) -> Cost:
    """Return log2 p steps and n(p-1)/p bytes; if folded, floor(log2 p) + 2 steps and n bytes."""
    if _is_folded(size):
        return Cost(log2_floor(size) + 2, Fraction(1))
    return Cost(log2_floor(size), Fraction(size - 1, size))


def _is_folded(size: int) -> bool:
    return size != 1 << log2_floor(size)


def _block(core: int, length: int) -> range:
    """Return the aligned block of `length` that holds `core`."""
    first = core - core % length
    return range(first, first + length)
