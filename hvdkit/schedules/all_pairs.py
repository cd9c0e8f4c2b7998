"""All pairs: every rank sums one chunk of everyone's, straight from them, and tells it everyone.

Cowan, Maleki, Musuvathi, Saarikivi & Xiong, "MSCCLang: Microsoft Collective Communication
Language", ASPLOS 2023, where it is what short messages take on GPUs that are all linked.
One chunk a rank: chunks == size.
"""

from __future__ import annotations

from collections.abc import Iterator

from hvdkit.schedules.flights import MOST_AT_ONCE
from hvdkit.schedules.steps import Exchange


def all_pairs_allreduce(rank: int, size: int, _chunks: int) -> Iterator[Exchange]:
    """Reduce-scatter, then all-gather, straight between any two ranks.  [Cowan et al. 2023]

    The steps of a half need nothing of each other: whoever can have several messages under way
    waits twice, for as many as that are.

    Steps 2(p-1), where ceil(log2 p) is the bound; bytes sent a rank 2n(p-1)/p, which is the bound.
    p = 3 (c0+ is reduced into chunk 0, c0= replaces it)::

        step   from 0    from 1    from 2
        1      0→1 c1+   1→2 c2+   2→0 c0+
        2      0→2 c2+   1→0 c0+   2→1 c1+
        3      0→1 c0=   1→2 c1=   2→0 c2=
        4      0→2 c0=   1→0 c1=   2→1 c2=
    """
    for k in range(1, size):  # reduce-scatter
        right, left = (rank + k) % size, (rank - k) % size
        yield Exchange(send=(right, right), reduce=(left, rank))
    for k in range(1, size):  # all-gather
        right, left = (rank + k) % size, (rank - k) % size
        yield Exchange(send=(right, rank), store=(left, left))


def all_pairs_flights(size: int) -> int:
    """Return in how many flights a rank's steps are, as `hvdkit.schedules.flights` has them."""
    return 2 * -(-(size - 1) // MOST_AT_ONCE)
