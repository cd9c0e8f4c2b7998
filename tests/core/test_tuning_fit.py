"""Fitting alpha, beta and gamma, and the medians that they are fitted to."""

import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from hvdkit.errors import ArgumentError
from hvdkit.schedules.machine import AT_ONCE, Level, Machine
from hvdkit.schedules.timing import in_flights, predict
from hvdkit.tuner.levels import SIZES, share_at_once
from hvdkit.tuning.fit import Observation, fit
from hvdkit.tuning.measure import Ranks, measure, timing

KIB, MIB = 1024, 1024 * 1024
START = Level(2e-6, 1e-10, 5e-11)
WAYS = (
    ("allreduce", "ring"),
    ("allreduce", "recursive_doubling"),
    ("allreduce", "halving_doubling"),
    ("allgather", "ring"),
)


def model(kind, name, nbytes, size):
    def seconds(level):
        return predict(kind, name, nbytes, size, machine=Machine(level, level))

    return seconds


def observed(level, *, size=4, noise=0.0, seed=0):
    """What a machine of that level would show: several segments at the largest sizes."""
    random = np.random.default_rng(seed)
    models = [
        model(kind, name, nbytes, size)
        for kind, name in WAYS
        for nbytes in (256, 4 * KIB, 32 * KIB, 256 * KIB, 8 * MIB)
    ]
    models += [lambda level, n=nbytes: n * level.gamma for nbytes in (64 * KIB, MIB)]
    return [Observation(m(level) * float(np.exp(random.normal(0, noise))), m) for m in models]


@pytest.mark.parametrize(
    "true",
    [
        Level(2e-6, 1e-10, 5e-11),
        Level(40e-6, 8e-9, 3e-11),  # a slow network: reducing hides behind it
        Level(15e-6, 1e-10, 4e-10),  # slow reduction: the network hides behind that
    ],
)
def test_figures_without_noise_are_recovered(true):
    found = fit(observed(true), START)
    assert found.level.alpha == pytest.approx(true.alpha, rel=1e-3)
    assert found.level.beta == pytest.approx(true.beta, rel=1e-3)
    assert found.level.gamma == pytest.approx(true.gamma, rel=2e-2)
    assert found.error < 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_recovered_from_noise(seed):
    true = Level(15e-6, 2e-10, 1e-10)
    found = fit(observed(true, noise=0.1, seed=seed), START)
    for part in ("alpha", "beta", "gamma"):
        assert getattr(found.level, part) == pytest.approx(getattr(true, part), rel=0.5)
    assert found.error == pytest.approx(0.1, rel=0.5)


def test_the_margins_are_those_of_95_percent():
    true = Level(15e-6, 2e-10, 1e-10)
    inside = 0
    for seed in range(100):
        found = fit(observed(true, noise=0.1, seed=seed), START)
        inside += abs(found.level.alpha - true.alpha) <= found.margin.alpha
    assert 85 <= inside <= 100


def test_no_figure_is_below_0():
    """Reduction that takes no time, and noise, would make gamma negative."""
    for seed in range(10):
        found = fit(observed(Level(15e-6, 2e-10, 1e-14), noise=0.2, seed=seed), START)
        assert min(found.level.alpha, found.level.beta, found.level.gamma) >= 0


def test_too_few_observations():
    with pytest.raises(ArgumentError, match="3 observations are too few"):
        fit(observed(START)[:3], START)


# Medians


def test_a_timing_is_the_median_and_its_margin():
    found = timing(np.array([1.0, 2.0, 3.0, 4.0, 100.0]))
    assert found.seconds == 3.0
    # 1.96 standard errors of a normal distribution's median, whose quartiles are 2 and 4.
    assert found.margin == pytest.approx(1.96 * 1.253 * (2 / 1.349) / np.sqrt(5), rel=1e-3)


def test_the_margin_holds_the_median_95_times_in_100():
    random = np.random.default_rng(0)
    samples = [timing(random.normal(10.0, 1.0, 25)) for _ in range(400)]
    inside = sum(abs(found.seconds - 10.0) <= found.margin for found in samples)
    assert 0.90 <= inside / 400 <= 0.99


def test_candidates_take_turns_and_the_slowest_rank_counts():
    made = []
    ranks = Ranks(barrier=lambda: made.append("|"), slowest=lambda seconds: seconds + 1e-3)
    calls = {name: partial(made.append, name) for name in ("a", "b")}
    found = measure(calls, ranks, turns=11)
    assert [name for name, timing in found.items() if timing.seconds > 1e-3] == ["a", "b"]
    turns = "".join(part[0] for part in "".join(made).split("|") if part)
    assert turns[:12] == "aaaaaabbbbbb"  # warmed up
    assert len(turns) == 12 + 2 * 11
    assert {turns[at : at + 2] for at in range(12, len(turns), 2)} == {"ab", "ba"}


def test_slow_first_calls_do_not_make_turns_short():
    made = []

    def call():
        """Be slow until ranks would have learnt what comes."""
        made.append(1)
        time.sleep(1e-4 if len(made) > 3 else 1e-3)

    measure({"call": call}, Ranks(lambda: None, lambda seconds: seconds), turns=1)
    assert len(made) > 20


@pytest.mark.parametrize("start", [Level(2e-6, 1e-10, 0.0), Level(0.0, 0.0, 0.0)])
def test_figures_that_another_fit_found_to_be_0_are_a_place_to_begin(start):
    true = Level(2e-6, 1e-10, 5e-11)
    found = fit(observed(true), start)
    assert found.level.alpha == pytest.approx(true.alpha, rel=1e-2)
    assert found.level.beta == pytest.approx(true.beta, rel=1e-2)
    assert found.level.gamma == pytest.approx(true.gamma, rel=5e-2)


@pytest.mark.parametrize("size", [3, 4, 5, 10])
@pytest.mark.parametrize(("share", "found"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0), (1.5, 1.0)])
def test_what_a_message_costs_beside_another_is_found_by_all_pairs_and_a_ring(size, share, found):
    """Whatever alpha was fitted: schedules that the fit saw may take longer than these."""
    level = Level(30e-6, 8e-9, 1e-10, at_once=share)
    machine = Machine(level, level)
    ring = predict("allreduce", "ring", SIZES[0], size, machine=machine)
    seen = in_flights(machine, size)
    all_pairs = predict("allreduce", "all_pairs", SIZES[0], size, machine=seen)
    fitted = replace(level, alpha=2 * level.alpha)
    assert share_at_once(ring, all_pairs, fitted, size) == pytest.approx(found)


def test_two_ranks_have_no_message_beside_another():
    assert share_at_once(1.0, 1.0, Level(30e-6, 8e-9, 1e-10), 2) == AT_ONCE
