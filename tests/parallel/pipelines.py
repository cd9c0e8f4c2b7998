"""What the tests run over: every schedule and its sizes, and schedules written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hvdkit.parallel.pipeline.instructions import Instruction, Schedule
from hvdkit.parallel.pipeline.registry import SCHEDULES, PipelineSchedule

RANKS = range(1, 9)
MICROBATCHES = range(1, 33)
CHUNKS = range(1, 5)

EVERY = list(SCHEDULES.values())


def identify(schedule: PipelineSchedule) -> str:
    return schedule.name


def chunk_counts(schedule: PipelineSchedule) -> range:
    return CHUNKS if schedule.chunked else range(1, 2)


def scripted(*by_rank: list[Instruction]) -> Schedule:
    """A schedule written out by hand, a list of instructions for each rank."""
    return lambda rank, _ranks, _microbatches, _chunks: iter(by_rank[rank])


def with_fault(
    steps: Schedule, rank: int, spoil: Callable[[list[Instruction]], list[Instruction]]
) -> Schedule:
    """The same schedule, but for one rank whose instructions `spoil` changes."""

    def faulty(this: int, ranks: int, microbatches: int, chunks: int) -> Iterator[Instruction]:
        instructions = list(steps(this, ranks, microbatches, chunks))
        return iter(spoil(instructions) if this == rank else instructions)

    return faulty
