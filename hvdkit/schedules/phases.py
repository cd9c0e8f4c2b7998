"""Phases: schedules that groups of ranks run side by side, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hvdkit.schedules.steps import Chunks, Exchange, Schedule, Transfer, chunk_indices


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One schedule, run by every group at the same time, over chunks of the group's own.

    Args:
        steps: the schedule, of a group's ranks and chunks as they are numbered in the group.
        groups: the ranks of each group, in the order in which the schedule numbers them; a rank is
            in one group at the most.
        chunks: ``chunks(group)``: how many the schedule has in a group.
        width: chunks of the whole message in one of the group's.
        held: the group's chunks from this one on are empty.
        apart: chunks of the whole message between the first of one group and that of the next.
    """

    steps: Schedule
    groups: tuple[range, ...]
    chunks: Callable[[range], int]
    width: int
    held: int
    apart: int

    def steps_of(self, rank: int) -> Iterator[Exchange]:
        """Yield the steps of one of all ranks, over chunks of the whole message."""
        for number, group in enumerate(self.groups):
            if rank in group:
                for step in self.steps(group.index(rank), len(group), self.chunks(group)):
                    yield from self._placed(step, number)

    def _placed(self, step: Exchange, number: int) -> Iterator[Exchange]:
        """Yield the step of group `number`, or none if all that it carries is empty."""
        placed = {
            name: self._place(transfer, number)
            for name in ("send", "reduce", "store")
            if (transfer := getattr(step, name)) is not None
        }
        if any(transfer is not None for transfer in placed.values()):
            yield Exchange(**placed)

    def _place(self, transfer: Transfer, number: int) -> Transfer | None:
        peer, chunks = transfer
        first = number * self.apart
        carried: list[int] = []
        for chunk in chunk_indices(chunks):
            if chunk < self.held:
                carried += range(first + chunk * self.width, first + (chunk + 1) * self.width)
        if not carried:
            return None
        placed: Chunks = carried[0] if len(carried) == 1 else tuple(carried)
        return self.groups[number][peer], placed
