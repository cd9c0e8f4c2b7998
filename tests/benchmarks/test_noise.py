"""The median's interval, the drift between runs, and what is slower than both allow."""

import math

import numpy as np
import pytest
from noise import (
    allowance,
    drift,
    median_interval,
    paired_ratios,
    shared_confidence,
    slower,
)


@pytest.mark.parametrize(("n", "k"), [(6, 1), (9, 2), (11, 2), (21, 6), (50, 18), (100, 40)])
def test_interval_has_the_ranks_of_the_tables(n, k):
    """Of the sign test's tables at 95 %, e.g. Conover, Practical Nonparametric Statistics."""
    samples = list(range(1, n + 1))
    assert median_interval(samples[::-1]) == (k, n + 1 - k)


@pytest.mark.parametrize("n", [6, 9, 21])
@pytest.mark.parametrize("draw", ["exponential", "standard_normal", "standard_cauchy"])
def test_interval_has_the_median_as_often_as_it_says(n, draw):
    rng = np.random.default_rng(n)
    median = {"exponential": math.log(2)}.get(draw, 0.0)
    inside = 0
    for _ in range(2000):
        low, high = median_interval(getattr(rng, draw)(size=n))
        inside += low <= median <= high
    assert inside / 2000 > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_of_too_few_samples_nothing_is_known(n):
    assert median_interval([1.0] * n) == (0.0, math.inf)


def test_an_interval_grows_with_the_confidence():
    samples = np.random.default_rng(0).random(21)
    narrow, wide = (median_interval(samples, c) for c in (0.5, 0.9999))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_many_comparisons_share_the_error():
    assert shared_confidence(1) == pytest.approx(0.95)
    assert shared_confidence(100) == pytest.approx(0.9995)


def test_drift_is_the_deviation_whatever_a_few_outliers():
    changes = np.exp(0.1 * np.random.default_rng(0).standard_normal(1001))
    changes[:50] = 40.0
    assert drift(changes) == pytest.approx(0.1, rel=0.15)
    assert drift([1.0] * 4) is None


def test_allowance_is_that_of_the_normal_distribution():
    assert allowance(0.1, 0.975) == pytest.approx(math.exp(0.196), rel=1e-3)
    assert allowance(0.0, 0.99) == 1.0


def test_what_slows_both_down_cancels_turn_by_turn():
    slow = np.linspace(1, 3, 9)
    assert paired_ratios(2.0 * slow, 4.0 * slow) == pytest.approx([0.5] * 9)


def test_slower_needs_both_the_interval_and_the_factor():
    samples = np.linspace(0.99, 1.01, 21)
    assert slower(samples, 1.2 * samples, confidence=0.99, least=1.1)
    assert not slower(samples, 1.2 * samples, confidence=0.99, least=1.3)
    assert not slower(1.2 * samples, samples, confidence=0.99, least=1.1)
    wide = np.linspace(0.2, 1.8, 21)
    assert not slower(wide, 1.2 * wide, confidence=0.99, least=1.1)
