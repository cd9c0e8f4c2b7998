"""Every pipeline schedule that hvdkit knows, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from hvdkit.errors import ArgumentError
from hvdkit.parallel.pipeline.gpipe import gpipe, gpipe_bubble, gpipe_memory
from hvdkit.parallel.pipeline.instructions import Instruction, Memory, Schedule, Times
from hvdkit.parallel.pipeline.interleaved import (
    interleaved,
    interleaved_bubble,
    interleaved_memory,
)
from hvdkit.parallel.pipeline.one_f_one_b import (
    one_f_one_b,
    one_f_one_b_bubble,
    one_f_one_b_memory,
)
from hvdkit.parallel.pipeline.zero_bubble import zb_h1, zb_h1_bubble, zb_h1_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSchedule:
    """A schedule and what it promises.

    Args:
        name: ``"1f1b"``, ...
        steps: ``steps(rank, ranks, microbatches, chunks)`` yields the instructions of one rank.
        bubble: ``bubble(ranks, microbatches, chunks, times)`` is the idle share of the time where
            all stages take the same times and transfers none.
        memory: ``memory(rank, ranks, microbatches, chunks)`` is the most that a rank holds.
        source: the paper.
        chunked: whether a rank may have several stages.
        splits_backward: whether the gradients of input and weights are computed one by one.
    """

    name: str
    steps: Schedule
    bubble: Callable[[int, int, int, Times], Fraction]
    memory: Callable[[int, int, int, int], Memory]
    source: str
    chunked: bool = False
    splits_backward: bool = False

    def plan(
        self, ranks: int, microbatches: int, chunks: int = 1
    ) -> tuple[tuple[Instruction, ...], ...]:
        """Return the instructions of every rank.

        Raises:
            ArgumentError: a number is less than 1, or there are chunks that the schedule cannot
                use.
        """
        self.check(ranks, microbatches, chunks)
        return tuple(tuple(self.steps(rank, ranks, microbatches, chunks)) for rank in range(ranks))

    def check(self, ranks: int, microbatches: int, chunks: int = 1) -> None:
        """Raise ArgumentError unless the schedule can be made for these numbers."""
        for count, name in ((ranks, "rank"), (microbatches, "microbatch"), (chunks, "chunk")):
            if count < 1:
                plural = "microbatches" if name == "microbatch" else f"{name}s"
                raise ArgumentError(f"{self.name} with {count} {plural}: it needs at least one")
        if chunks > 1 and not self.chunked:
            raise ArgumentError(
                f"{self.name} has one chunk of layers a rank, not {chunks}; choose interleaved "
                f"for several"
            )


_KNOWN = (
    PipelineSchedule(
        name="gpipe",
        steps=gpipe,
        bubble=gpipe_bubble,
        memory=gpipe_memory,
        source="Huang et al. 2019",
    ),
    PipelineSchedule(
        name="1f1b",
        steps=one_f_one_b,
        bubble=one_f_one_b_bubble,
        memory=one_f_one_b_memory,
        source="Narayanan et al. 2021",
    ),
    PipelineSchedule(
        name="interleaved",
        steps=interleaved,
        bubble=interleaved_bubble,
        memory=interleaved_memory,
        source="Narayanan et al. 2021",
        chunked=True,
    ),
    PipelineSchedule(
        name="zb-h1",
        steps=zb_h1,
        bubble=zb_h1_bubble,
        memory=zb_h1_memory,
        source="Qi et al. 2024",
        splits_backward=True,
    ),
)

#: ``SCHEDULES[name]``
SCHEDULES: dict[str, PipelineSchedule] = {known.name: known for known in _KNOWN}


def get(name: str) -> PipelineSchedule:
    """Return the schedule `name`.

    Raises:
        ArgumentError: no such schedule; the message lists the known ones.
    """
    if name not in SCHEDULES:
        raise ArgumentError(
            f"unknown pipeline schedule {name!r}; the known ones are {', '.join(SCHEDULES)}"
        )
    return SCHEDULES[name]
