"""A pipeline schedule played in time: when each instruction starts and ends on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from hvdkit.errors import ArgumentError
from hvdkit.parallel.pipeline.instructions import Instruction, Result, Time, Times, inputs, result
from hvdkit.parallel.pipeline.verify import Plan, play


@dataclass(frozen=True, slots=True)
class Slot:
    """An instruction, and when it starts and ends."""

    instruction: Instruction
    start: Time
    end: Time


@dataclass(frozen=True, slots=True)
class Timeline:
    """What each rank does when, from time 0.

    Args:
        rows: the slots of each rank, in order.
        makespan: when the last instruction of all ends.
    """

    rows: tuple[tuple[Slot, ...], ...]
    makespan: Time

    @property
    def bubble(self) -> Fraction:
        """The share of all ranks' time until the makespan in which they idle."""
        total = len(self.rows) * Fraction(self.makespan)
        busy = sum(slot.end - slot.start for row in self.rows for slot in row)
        return 1 - Fraction(busy) / total if total else Fraction(0)


def simulate(
    plan: Plan,
    *,
    chunks: int = 1,
    times: Times | Sequence[Times] | None = None,
    transfer: Time | Sequence[Time] = 0,
) -> Timeline:
    """Run every instruction as soon as its rank is free and what it needs has come.

    Args:
        plan: the instructions of every rank.
        chunks: stages a rank.
        times: how long the stages take: all alike, or each by itself, as many as there are stages;
            without it, one unit for each of `Times`' three.
        transfer: what passes between ranks arrives so much later; ranks compute meanwhile.  One for
            all, or one for each stage but the last: between it and the stage after it.

    The times are exact where the durations are int or Fraction.

    Raises:
        ArgumentError: `times` are not as many as stages, or `transfer` is negative, or not one for
            each two stages.
        ScheduleError: ranks wait for one another, or for what never comes.
    """
    ranks = len(plan)
    stages = ranks * chunks
    by_stage = _by_stage(Times() if times is None else times, stages)
    between = _between(transfer, stages)
    free: list[Time] = [0] * ranks
    came: dict[Result, Time] = {}
    rows: list[list[Slot]] = [[] for _ in range(ranks)]
    for rank, instruction in play(plan, stages):
        start = free[rank]
        for needed in inputs(instruction, stages):
            delay: Time = 0
            if needed.stage % ranks != rank:
                delay = between[min(needed.stage, instruction.stage)]
            start = max(start, came[needed] + delay)
        free[rank] = end = start + by_stage[instruction.stage].of(instruction)
        rows[rank].append(Slot(instruction, start, end))
        computed = result(instruction)
        if computed is not None:
            came[computed] = end
    return Timeline(tuple(map(tuple, rows)), max(free))


def _by_stage(times: Times | Sequence[Times], stages: int) -> Sequence[Times]:
    if isinstance(times, Times):
        return [times] * stages
    if len(times) != stages:
        raise ArgumentError(f"times for {len(times)} stages, but the schedule has {stages}")
    return times


def _between(transfer: Time | Sequence[Time], stages: int) -> Sequence[Time]:
    between = transfer if isinstance(transfer, Sequence) else [transfer] * (stages - 1)
    if len(between) != stages - 1:
        raise ArgumentError(
            f"transfers between {len(between) + 1} stages, but the schedule has {stages}"
        )
    for each in (transfer,) if not isinstance(transfer, Sequence) else between:
        if not each >= 0:
            raise ArgumentError(f"transfer lasts {each}; it must last 0 or more")
    return between
