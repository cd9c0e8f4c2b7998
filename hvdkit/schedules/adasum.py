"""The transfers of Adasum: vector halving and distance doubling, nearest ranks first.

Maleki et al., "Scaling distributed training with adaptive summation", MLSys 2021.  It is the
reduce-scatter and all-gather of Rabenseifner (ICCS 2004), in an order in which the nearest ranks,
which are the likeliest to share a node, exchange the longest messages.

Adasum is not associative, so the order is part of the result::

    p = 4    (0 + 1) + (2 + 3)
    p = 6    ((0 + 4) + (1 + 5)) + (2 + 3)

The paper has p a power of two.  Here rank q + i, with q the largest power of two that is at most p,
hands its vector to rank i first, and gets the result at the end; ranks 0 to q - 1 then go on in the
paper's order, whatever p is.
"""

from __future__ import annotations

from collections.abc import Iterator

from hvdkit.schedules.cost import log2_floor
from hvdkit.schedules.steps import Exchange


def vector_halving(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
    """Halve the vector at distances 1, 2, 4, ...; double it on the way back.  [Maleki et al. 2021]

    q chunks.  Of two partners, the lower rank keeps the first half of what both have.  After the
    exchange at distance d, each aligned group of 2d ranks holds one combined vector, in 2d blocks.

    Steps 2 log2 p, twice the bound, or 2 floor(log2 p) + 2 if p is no power of two; bytes sent a
    rank 2n(q-1)/q, which is the bound if p = q, and n more by a rank that was handed a vector.
    p = 3::

        step   from 0      from 1      from 2
        1                              2→0 c0-1+
        2      0→1 c1+     1→0 c0+
        3      0→1 c0=     1→0 c1=
        4      0→2 c0-1=
    """
    vector = range(chunks)
    core_size = 1 << log2_floor(size)
    if rank >= core_size:
        yield Exchange(send=(rank - core_size, vector))
        yield Exchange(store=(rank - core_size, vector))
        return
    surplus = rank + core_size
    if surplus < size:
        yield Exchange(reduce=(surplus, vector))
    block, halvings = vector, []
    for distance in (1 << k for k in range(log2_floor(size))):
        peer, middle = rank ^ distance, len(block) // 2
        lower, upper = block[:middle], block[middle:]
        block, theirs = (lower, upper) if rank < peer else (upper, lower)
        yield Exchange(send=(peer, theirs), reduce=(peer, block))
        halvings.append((peer, block, theirs))
    for peer, mine, theirs in reversed(halvings):
        yield Exchange(send=(peer, mine), store=(peer, theirs))
    if surplus < size:
        yield Exchange(send=(surplus, vector))
