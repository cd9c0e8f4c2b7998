"""Schedules played in time."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest

from hvdkit.errors import ArgumentError, ScheduleError
from hvdkit.parallel.pipeline.instructions import Backward, Forward, Times
from hvdkit.parallel.pipeline.registry import PipelineSchedule, get
from hvdkit.parallel.pipeline.simulate import Slot, simulate

from .pipelines import EVERY, chunk_counts, identify


def test_two_ranks_and_one_microbatch() -> None:
    timeline = simulate(get("gpipe").plan(2, 1), times=Times(2, 3, 1))
    assert timeline.rows == (
        (Slot(Forward(0, 0), 0, 2), Slot(Backward(0, 0), 8, 12)),
        (Slot(Forward(1, 0), 2, 4), Slot(Backward(1, 0), 4, 8)),
    )
    assert timeline.makespan == 12
    assert timeline.bubble == Fraction(1, 2)


def test_a_transfer_delays_the_receiver_but_not_the_sender() -> None:
    timeline = simulate(get("gpipe").plan(2, 2), transfer=10)
    assert [slot.start for slot in timeline.rows[0]][:2] == [0, 1]
    assert [slot.start for slot in timeline.rows[1]] == [11, 12, 13, 15]
    assert timeline.rows[0][2].start == 25


def test_each_two_stages_may_have_a_transfer_of_their_own() -> None:
    plan = get("gpipe").plan(3, 1)
    assert simulate(plan, transfer=[10, 100]).makespan == 3 + 110 + 110 + 6
    with pytest.raises(ArgumentError, match="between 2 stages, but the schedule has 3"):
        simulate(plan, transfer=[10])
    with pytest.raises(ArgumentError, match="transfer lasts -1"):
        simulate(plan, transfer=[10, -1])


def test_a_transfer_within_a_rank_takes_no_time() -> None:
    plan = get("interleaved").plan(1, 4, 3)
    assert simulate(plan, chunks=3, transfer=10) == simulate(plan, chunks=3)


def test_the_slowest_stage_sets_the_pace() -> None:
    times = [Times(1, 1, 1), Times(4, 4, 4), Times(1, 1, 1)]
    timeline = simulate(get("1f1b").plan(3, 32), times=times)
    assert 32 * 12 <= timeline.makespan <= 32 * 12 + 2 * 3
    busy = [sum(slot.end - slot.start for slot in row) for row in timeline.rows]
    assert busy == [96, 384, 96]


def test_times_by_chunk() -> None:
    times = [Times(stage, 0, 0) for stage in range(4)]
    timeline = simulate(get("interleaved").plan(2, 1, 2), chunks=2, times=times)
    assert timeline.makespan == 0 + 1 + 2 + 3


def test_fractions_and_ints_stay_exact() -> None:
    timeline = simulate(get("1f1b").plan(3, 7), times=Times(Fraction(1, 3), Fraction(1, 7), 1))
    assert timeline.makespan == 9 * (Fraction(1, 3) + Fraction(1, 7) + 1)
    assert isinstance(simulate(get("zb-h1").plan(3, 7)).makespan, int)


def test_floats_are_taken_as_well() -> None:
    timeline = simulate(get("1f1b").plan(4, 8), times=Times(0.1, 0.1, 0.1), transfer=0.0)
    assert float(timeline.bubble) == pytest.approx(3 / 11)


def test_no_time_at_all_is_no_bubble() -> None:
    for schedule in EVERY:
        assert simulate(schedule.plan(3, 2), times=Times(0, 0, 0)).bubble == 0
        assert schedule.bubble(1, 2, 1, Times(0, 0, 0)) == 0


@pytest.mark.parametrize("schedule", EVERY, ids=identify)
def test_no_rank_does_two_things_at_once_nor_anything_too_early(schedule: PipelineSchedule) -> None:
    for chunks in chunk_counts(schedule)[:3]:
        plan = schedule.plan(4, 6, chunks)
        timeline = simulate(plan, chunks=chunks, times=Times(2, 3, 1), transfer=1)
        ends = {}
        for instructions, row in zip(plan, timeline.rows, strict=True):
            assert [slot.instruction for slot in row] == list(instructions)
            for before, after in pairwise(row):
                assert before.end <= after.start
            ends.update({slot.instruction: slot.end for slot in row})
        for row in timeline.rows:
            for slot in row:
                stage, microbatch = slot.instruction.stage, slot.instruction.microbatch
                if isinstance(slot.instruction, Forward) and stage > 0:
                    assert slot.start >= ends[Forward(stage - 1, microbatch)] + 1


def test_wrong_arguments() -> None:
    plan = get("1f1b").plan(2, 2)
    with pytest.raises(ArgumentError, match="times for 3 stages, but the schedule has 2"):
        simulate(plan, times=[Times()] * 3)
    with pytest.raises(ArgumentError, match="transfer lasts -1; it must last 0 or more"):
        simulate(plan, transfer=-1)
    for wrong in (-2, float("nan")):
        with pytest.raises(ArgumentError, match=f"backward_weight lasts {wrong}; it must"):
            Times(1, 1, wrong)


def test_a_plan_that_cannot_go_on() -> None:
    with pytest.raises(ScheduleError, match="waits for the gradient of the input of stage 1"):
        simulate([[Forward(0, 0), Backward(0, 0)], [Forward(1, 0)]])
