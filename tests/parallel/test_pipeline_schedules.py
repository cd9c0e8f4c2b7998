"""Every schedule is proved at every size, holds what its paper says, and idles as it says."""

from __future__ import annotations

import inspect
from fractions import Fraction

import pytest

from hvdkit.errors import ArgumentError
from hvdkit.parallel.pipeline.draw import draw_text, plan
from hvdkit.parallel.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Memory,
    Times,
)
from hvdkit.parallel.pipeline.registry import SCHEDULES, PipelineSchedule, get
from hvdkit.parallel.pipeline.simulate import simulate
from hvdkit.parallel.pipeline.verify import verify

from .pipelines import EVERY, MICROBATCHES, RANKS, chunk_counts, identify

HALF = Fraction(1, 2)
UNEVEN_TIMES = [Times(1, 1, 2), Times(3, 2, 1), Times(1, 3, 2), Times(7, 3, 11), Times(1, 2, 0)]


@pytest.mark.parametrize("schedule", EVERY, ids=identify)
def test_is_correct_and_holds_what_its_paper_says(schedule: PipelineSchedule) -> None:
    for chunks in chunk_counts(schedule):
        for ranks in RANKS:
            for microbatches in MICROBATCHES:
                report = verify(schedule.steps, ranks, microbatches, chunks)
                sizes = (ranks, microbatches, chunks)
                assert report.memory == tuple(schedule.memory(r, *sizes) for r in range(ranks))
                boundaries = (ranks * chunks - 1) if ranks > 1 else 0
                assert report.messages == 2 * boundaries * microbatches, sizes


def test_the_papers_bounds_on_memory() -> None:
    assert get("gpipe").memory(0, 4, 8, 1) == Memory(8, 8)
    assert get("1f1b").memory(0, 4, 8, 1) == Memory(4, 4)  # p on the first rank ...
    assert get("1f1b").memory(3, 4, 8, 1) == Memory(1, 1)  # ... and 1 on the last
    for rank in range(4):  # (p-r) M_B + r M_W
        assert get("zb-h1").memory(rank, 4, 8, 1) == Memory(4 - rank, 4)
    # L(1 + (p-1)/(pv)) layers on the first rank [Korthikanti et al. 2023]: pv + p-1 stages.
    assert get("interleaved").memory(0, 4, 8, 3) == Memory(4 * 3 + 3, 4 * 3 + 3)


@pytest.mark.parametrize("times", [Times(), *UNEVEN_TIMES], ids=str)
@pytest.mark.parametrize("schedule", EVERY, ids=identify)
def test_idles_as_its_formula_says(schedule: PipelineSchedule, times: Times) -> None:
    for chunks in chunk_counts(schedule):
        for ranks in RANKS:
            for microbatches in (1, 2, 3, 4, 5, 7, 8, 11, 16):
                sizes = (ranks, microbatches, chunks)
                timeline = simulate(schedule.plan(*sizes), chunks=chunks, times=times)
                assert timeline.bubble == schedule.bubble(*sizes, times), sizes


def test_the_papers_formulas_for_the_bubble() -> None:
    f, b, w = 5, 7, 3
    times = Times(f, b, w)
    for p in RANKS:
        for m in range(p, 33):
            assert get("gpipe").bubble(p, m, 1, times) == Fraction(p - 1, m + p - 1)
            assert get("1f1b").bubble(p, m, 1, times) == Fraction(p - 1, m + p - 1)
            for v in (1, 2, 3, 4):
                bubble = get("interleaved").bubble(p, m, v, times)
                assert bubble == Fraction(p - 1, v * m + p - 1)
            idle = (p - 1) * (f + b - w)
            assert get("zb-h1").bubble(p, m, 1, times) == Fraction(idle, m * (f + b + w) + idle)


def test_zb_h1_idles_a_third_as_long_as_1f1b() -> None:
    idle = {}
    for name in ("1f1b", "zb-h1"):
        timeline = simulate(get(name).plan(4, 8))
        idle[name] = timeline.makespan - 8 * 3
    assert idle == {"1f1b": 9, "zb-h1": 3}


def test_interleaved_with_one_chunk_idles_as_1f1b() -> None:
    for ranks in RANKS:
        for microbatches in (1, 3, 8, 13):
            times = Times()
            assert get("interleaved").bubble(ranks, microbatches, 1, times) == (
                get("1f1b").bubble(ranks, microbatches, 1, times)
            )


@pytest.mark.parametrize("schedule", EVERY, ids=identify)
def test_the_table_in_its_docstring_is_what_it_does(schedule: PipelineSchedule) -> None:
    documented = [
        line.strip()
        for line in (inspect.getdoc(schedule.steps) or "").splitlines()
        if line.strip().startswith("rank ")
    ]
    times = Times(1, HALF, HALF) if schedule.chunked else Times()
    chunks = 2 if schedule.chunked else 1
    drawn = draw_text(plan(schedule, 3, 4, chunks=chunks, times=times)).splitlines()
    assert documented == [line for line in drawn if line.startswith("rank ")]


def test_1f1b_warms_up_alternates_and_drains() -> None:
    assert list(SCHEDULES["1f1b"].plan(3, 3)[1]) == [
        Forward(1, 0),
        Forward(1, 1),
        Backward(1, 0),
        Forward(1, 2),
        Backward(1, 1),
        Backward(1, 2),
    ]


def test_zb_h1_puts_the_weights_of_rank_r_r_microbatches_later() -> None:
    last = SCHEDULES["zb-h1"].plan(2, 3)[1]
    assert [i for i in last if not isinstance(i, Forward)] == [
        BackwardInput(1, 0),
        BackwardInput(1, 1),
        BackwardWeight(1, 0),
        BackwardInput(1, 2),
        BackwardWeight(1, 1),
        BackwardWeight(1, 2),
    ]


def test_a_rank_owns_every_ranks_th_stage() -> None:
    stages = {instruction.stage for instruction in SCHEDULES["interleaved"].plan(3, 3, 2)[1]}
    assert stages == {1, 4}


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("gpipe", (0, 4, 1), "gpipe with 0 ranks: it needs at least one"),
        ("1f1b", (4, 0, 1), "1f1b with 0 microbatches: it needs at least one"),
        ("interleaved", (4, 8, 0), "interleaved with 0 chunks: it needs at least one"),
        ("zb-h1", (4, 8, 2), "zb-h1 has one chunk of layers a rank, not 2; choose interleaved"),
    ],
)
def test_numbers_that_make_no_schedule(
    name: str, sizes: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        get(name).plan(*sizes)


def test_a_name_that_is_not_known() -> None:
    with pytest.raises(
        ArgumentError, match="'1f2b'; the known ones are gpipe, 1f1b, interleaved, "
    ):
        get("1f2b")
