"""What can be said of medians of few samples, and of two runs that differ.

Within a run: the interval in which a median is, from the order of the samples alone, whatever their
distribution [David & Nagaraja, Order Statistics, 3rd ed., section 7.1].

From run to run a machine is not the same either, by more than any turn within a run can show.  What
nobody changed, the peers and the roofs, was measured in both runs: how their figures moved shows by
how much figures move without a reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95

#: Of as many unchanged figures at least, the drift from run to run is taken.
FEWEST = 5


def median_interval(
    samples: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the k-th smallest and the k-th largest sample, between which the median is.

    k is the largest for which the confidence, 1 - 2 P(B < k) with B binomial (n, 1/2), is at least
    what is asked for.  With too few samples nothing can be said: from 0 to infinity.
    """
    ordered = sorted(samples)
    n = len(ordered)
    k, outside = 0, 0.0
    while k < n // 2 + 1:
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 1 - confidence:
            break
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (0.0, math.inf)


def paired_ratios(ours: Sequence[float], peers: Sequence[float]) -> tuple[float, ...]:
    """Return the ratios turn by turn, in which what slowed down both cancels."""
    return tuple(a / b for a, b in zip(ours, peers, strict=True))


def drift(changes: Sequence[float]) -> float | None:
    """Return the standard deviation, in logarithms, of figures that should not have changed.

    From the median of their sizes, which a few outliers do not move.  None if they are too few.

    Args:
        changes: new over old.
    """
    if len(changes) < FEWEST:
        return None
    return float(np.median(np.abs(np.log(changes)))) / NormalDist().inv_cdf(0.75)


def shared_confidence(comparisons: int) -> float:
    """Return the confidence of each of many, if all are to be right with 95 % [Bonferroni]."""
    return 1 - (1 - CONFIDENCE) / max(1, comparisons)


def allowance(deviation: float, confidence: float) -> float:
    """Return the factor that a drift of this deviation stays below, with this confidence."""
    return math.exp(NormalDist().inv_cdf(confidence) * deviation)


def slower(old: Sequence[float], new: Sequence[float], *, confidence: float, least: float) -> bool:
    """Return whether `new` is slower than `old` by more than the noise.

    Args:
        old, new: samples; both of seconds, or of ratios to a peer.
        confidence: of the two medians' intervals, which must not overlap.
        least: the factor by which the medians must differ.
    """
    above = median_interval(new, confidence)[0] > median_interval(old, confidence)[1]
    return above and float(np.median(new)) > least * float(np.median(old))
