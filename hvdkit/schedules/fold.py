"""Folding: how an algorithm for a power of two serves any number of ranks.

With q the largest power of two that is at most p, and r = p - q, the first 2r ranks form r pairs
(0, 1), (2, 3), ...  The even rank of a pair hands its vector to the odd one, which takes part in
both names; when all is done the odd rank hands the result back.  Two steps more, if r > 0.

Rabenseifner, "Optimization of collective reduction operations", ICCS 2004; Thakur, Rabenseifner &
Gropp, "Optimization of collective communication operations in MPICH", International Journal of
High Performance Computing Applications 19 (2005).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hvdkit.schedules.cost import log2_floor


@dataclass(frozen=True, slots=True)
class Fold:
    """The place of one rank among p ranks folded to q.

    Args:
        core_size: q.
        pairs: r.
        core: this rank's number among the q, or None for the even rank of a pair, which sits out.
        partner: the other rank of the pair, or None for a rank that is in none.
    """

    core_size: int
    pairs: int
    core: int | None
    partner: int | None

    @classmethod
    def of(cls, rank: int, size: int) -> Fold:
        """Return the place of `rank` among `size`."""
        core_size = 1 << log2_floor(size)
        pairs = size - core_size
        if rank >= 2 * pairs:
            return cls(core_size, pairs, core=rank - pairs, partner=None)
        core = rank // 2 if rank % 2 else None
        return cls(core_size, pairs, core=core, partner=rank ^ 1)

    def rank_of(self, core: int) -> int:
        """Return the rank that bears the number `core` among the q."""
        return 2 * core + 1 if core < self.pairs else core + self.pairs

    def first_rank_of(self, core: int) -> int:
        """Return the lowest rank that `core` stands for: its own, or that of its pair.

        The ranks for which cores a to b - 1 stand are first_rank_of(a) to first_rank_of(b) - 1.
        """
        return core + min(core, self.pairs)

    def distances(self) -> Iterator[int]:
        """Yield q/2, q/4, ... 1: the distances of the partners in recursive halving."""
        distance = self.core_size // 2
        while distance:
            yield distance
            distance //= 2
