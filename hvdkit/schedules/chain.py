"""The pipelined chain: a broadcast whose time hardly depends on the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from hvdkit.schedules.cost import Cost
from hvdkit.schedules.steps import Exchange


def chain_broadcast(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
    """Pass segments down the chain 0, 1, ... p-1, each once it is there.  [Pješivac-Grbović 2007]

    Pješivac-Grbović et al., "Performance analysis of MPI collective operations", Cluster
    Computing 10 (2007): the broadcast there called pipeline.

    Steps p-2+s over s chunks, where ceil(log2 p) is the bound for one; bytes sent a rank n, which
    is the bound.  p = 3, s = 2::

        step   from 0    from 1    from 2
        1      0→1 c0=
        2      0→1 c1=   1→2 c0=
        3                1→2 c1=
    """
    if rank == 0 and size > 1:
        for chunk in range(chunks):
            yield Exchange(send=(1, chunk))
    elif rank == size - 1 and rank > 0:
        for chunk in range(chunks):
            yield Exchange(store=(rank - 1, chunk))
    elif rank > 0:
        yield Exchange(store=(rank - 1, 0))
        for chunk in range(1, chunks):
            yield Exchange(send=(rank + 1, chunk - 1), store=(rank - 1, chunk))
        yield Exchange(send=(rank + 1, chunks - 1))


def chain_broadcast_cost(size: int, chunks: int) -> Cost:
    """Return p-2+s steps over s chunks, and n bytes; nothing for one rank."""
    if size == 1:
        return Cost(0, Fraction(0))
    return Cost(size - 2 + chunks, Fraction(1))
