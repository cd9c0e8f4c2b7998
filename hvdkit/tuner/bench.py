"""What all measurements share: the ranks, a group of some of them, buffers that were touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.group import Group
from hvdkit.context import Context
from hvdkit.dtypes import Max
from hvdkit.tuning.measure import BUDGET, Ranks, Timing, measure

#: No size is measured of which one call may take longer, in seconds.
LONGEST_CALL = 0.4


class Bench:
    """Where a context's ranks measure.  Everything is collective among all of them.

    Args:
        context: of the job.
        say: told what is measured next.
        turns: of each candidate.
    """

    def __init__(self, context: Context, say: Callable[[str], None], *, turns: int) -> None:
        self.context = context
        self.world = context.world
        self._say = say
        self._turns = turns
        self._ranks = Ranks(
            barrier=self.world.barrier,
            slowest=lambda seconds: self.world.allreduce(seconds, Max),
        )

    def measure(
        self, label: str, calls: Mapping[str, Callable[[], object]], *, budget: float = BUDGET
    ) -> dict[str, Timing]:
        """Return the timing of each of `calls`, which every rank makes, or leaves to others."""
        self._say(label)
        return measure(calls, self._ranks, turns=self._turns, budget=budget)

    @contextmanager
    def messages(self, ranks: Sequence[int], segment_bytes: int) -> Iterator[Group | None]:
        """Give a group of `ranks` that share no memory; None to the ranks that are not in it."""
        if self.world.rank not in ranks:
            yield None
            return
        group = Group(
            self.context.part(ranks),
            self.context.kernels,
            "messages are measured",
            segment_bytes=segment_bytes,
            spin=self.world.group.executor.backoff.spin,
        )
        yield group
        group.close()


def elements(nbytes: int) -> NDArray[np.float32]:
    """Return zeros of float32, whose sum is zeros however often it is taken."""
    zeros = np.empty(max(1, nbytes // 4), np.float32)
    zeros[:] = 0  # else all pages may be one
    return zeros


def nothing() -> None:
    """Stand for a call that other ranks make."""
