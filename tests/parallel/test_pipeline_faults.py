"""Faults planted in every schedule must be caught, and the message must name the instruction."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from hvdkit.errors import ScheduleError
from hvdkit.parallel.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
)
from hvdkit.parallel.pipeline.registry import PipelineSchedule, get
from hvdkit.parallel.pipeline.verify import play, verify

from .pipelines import EVERY, chunk_counts, identify, scripted, with_fault

SIZES = [(ranks, microbatches) for ranks in (1, 2, 3, 4) for microbatches in (1, 2, 3, 5)]


def assert_caught(
    schedule: PipelineSchedule,
    spoil: Callable[[list[Instruction], int], list[Instruction]],
    named: Callable[[Instruction], str],
) -> None:
    """Spoil every instruction of every rank, one at a time; `named` is a part of the message."""
    for ranks, microbatches in SIZES:
        for chunks in chunk_counts(schedule)[:2]:
            for rank, instructions in enumerate(schedule.plan(ranks, microbatches, chunks)):
                for number, instruction in enumerate(instructions):
                    faulty = with_fault(schedule.steps, rank, lambda here, n=number: spoil(here, n))
                    with pytest.raises(ScheduleError, match=re.escape(named(instruction))) as exc:
                        verify(faulty, ranks, microbatches, chunks)
                    assert f"rank {rank}" in str(exc.value)


@pytest.mark.parametrize("schedule", EVERY, ids=identify)
def test_a_missing_instruction(schedule: PipelineSchedule) -> None:
    assert_caught(
        schedule,
        lambda here, number: here[:number] + here[number + 1 :],
        lambda gone: (
            f"{type(gone).__name__}(stage={gone.stage}, microbatch={gone.microbatch}) is "
            if not isinstance(gone, Backward)
            else f"Backward or BackwardInput(stage={gone.stage}, microbatch={gone.microbatch}) is "
        ),
    )


@pytest.mark.parametrize("schedule", EVERY, ids=identify)
def test_a_doubled_instruction(schedule: PipelineSchedule) -> None:
    assert_caught(schedule, lambda here, n: [*here, here[n]], lambda twice: f"{twice} computes ")


@pytest.mark.parametrize("schedule", EVERY, ids=identify)
def test_a_forward_swapped_with_its_backward(schedule: PipelineSchedule) -> None:
    def swap(here: list[Instruction]) -> list[Instruction]:
        first = here[0]
        back = next(
            number
            for number, other in enumerate(here)
            if isinstance(other, (Backward, BackwardInput))
            and (other.stage, other.microbatch) == (first.stage, first.microbatch)
        )
        return [here[back], *here[1:back], first, *here[back + 1 :]]

    for ranks, microbatches in SIZES:
        with pytest.raises(
            ScheduleError,
            match=r"rank 0, instruction 0: Backward(Input)?\(stage=0, microbatch=0\) needs "
            "the output of stage 0, microbatch 0, which the rank has not computed before",
        ):
            verify(with_fault(schedule.steps, 0, swap), ranks, microbatches)


def test_a_weight_gradient_before_the_inputs() -> None:
    steps = scripted([Forward(0, 0), BackwardWeight(0, 0), BackwardInput(0, 0)])
    with pytest.raises(
        ScheduleError, match=r"instruction 1: BackwardWeight.* needs the gradient of"
    ):
        verify(steps, 1, 1)


def test_a_weight_gradient_after_a_backward_that_has_computed_it() -> None:
    steps = scripted([Forward(0, 0), Backward(0, 0), BackwardWeight(0, 0)])
    with pytest.raises(
        ScheduleError,
        match=r"instruction 2: BackwardWeight\(stage=0, microbatch=0\) computes the gradient of "
        "the weights again after instruction 1",
    ):
        verify(steps, 1, 1)


def test_a_cycle_of_ranks_that_wait() -> None:
    steps = scripted(
        [Forward(0, 0), Backward(0, 0), Forward(0, 1), Backward(0, 1)],
        [Forward(1, 0), Forward(1, 1), Backward(1, 0), Backward(1, 1)],
    )
    with pytest.raises(ScheduleError) as exc:
        verify(steps, 2, 2)
    zero = (
        "  rank 0, instruction 1: Backward(stage=0, microbatch=0) waits for the gradient of the "
        "input of stage 1, microbatch 0 from rank 1"
    )
    assert str(exc.value).splitlines() == [
        "deadlock: each of these ranks waits for the next",
        zero,
        "  rank 1, instruction 1: Forward(stage=1, microbatch=1) waits for the output of stage 0, "
        "microbatch 1 from rank 0",
        zero,
    ]


def test_a_result_that_never_comes() -> None:
    with pytest.raises(
        ScheduleError, match=r"Forward.* from rank 0, which has ended after 0 instr"
    ):
        list(play([[], [Forward(1, 0)]], 2))


def test_messages_that_would_be_taken_for_one_another() -> None:
    """Both ranks get through, but the second receive would get the first message."""
    steps = scripted(
        [Forward(0, 0), Forward(0, 1), Backward(0, 0), Backward(0, 1)],
        [Forward(1, 1), Forward(1, 0), Backward(1, 0), Backward(1, 1)],
    )
    with pytest.raises(
        ScheduleError,
        match="message 0 from rank 0 to rank 1 carries the output of stage 0, microbatch 0, where "
        "the receiver first needs the output of stage 0, microbatch 1",
    ):
        verify(steps, 2, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Forward(1, 0), "stage 1 is on rank 1"),
        (Forward(2, 0), "the stages are 0 to 1"),
        (Forward(0, 3), "the microbatches are 0 to 1"),
        (Forward(0, -1), "the microbatches are 0 to 1"),
    ],
)
def test_another_ranks_work_or_nobodys(wrong: Instruction, message: str) -> None:
    faulty = with_fault(get("gpipe").steps, 0, lambda here: [wrong, *here])
    with pytest.raises(ScheduleError, match=re.escape(f"instruction 0: {wrong}: {message}")):
        verify(faulty, 2, 2)
