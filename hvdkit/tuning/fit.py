"""Fit alpha, beta and gamma to measured times.

Times range from microseconds to seconds, and are wrong by factors: it is the logarithms of model
over measurement whose squares are summed.  The closed forms are linear in the three, piece by
piece; the least squares of what is linear at hand are solved again and again (Gauss and Newton's
method), each time going half of the way, from where relative errors are least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hvdkit.errors import ArgumentError
from hvdkit.schedules.machine import USUAL, Level

#: Standard errors on either side of an estimate, for 95 % of confidence.
NORMAL_95 = 1.96

_FIRST_ROUNDS = 10
_ROUNDS = 100
_NUDGE = 1e-6


@dataclass(frozen=True, slots=True)
class Observation:
    """What was measured, and what the model says of it.

    Args:
        seconds: measured.
        model: the seconds by the model; linear in the three figures, piece by piece.
    """

    seconds: float
    model: Callable[[Level], float]


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted figures.

    Args:
        level: the estimates.
        margin: of each, half its interval of 95 % confidence.
        error: root of the mean square of the logarithms of model over measurement.
    """

    level: Level
    margin: Level
    error: float


def fit(observations: Sequence[Observation], start: Level) -> Fit:
    """Return the figures that fit best, none of them below 0.

    Args:
        observations: more than three.
        start: where to begin; for a figure that is 0, with what is usual.

    Raises:
        ArgumentError: too few observations to say how far they can be trusted.
    """
    if len(observations) < 4:
        raise ArgumentError(f"{len(observations)} observations are too few to fit three figures")
    measured = np.array([observation.seconds for observation in observations])
    usual = np.array([USUAL.within.alpha, USUAL.within.beta, USUAL.within.gamma])
    scale = np.array([start.alpha, start.beta, start.gamma])
    scale = np.where(scale > 0, scale, usual)
    figures = scale.copy()
    for _ in range(_FIRST_ROUNDS):
        slopes = _slopes(observations, figures, scale) / measured[:, None]
        figures = scale * _least_squares(slopes, np.ones(len(measured)))
    for _ in range(_ROUNDS):
        modelled = _modelled(observations, figures)
        slopes = _slopes(observations, figures, scale) / modelled[:, None]
        found = scale * _least_squares(slopes, 1 + np.log(measured / modelled))
        settled = np.allclose(found, figures, rtol=1e-6, atol=0)
        figures = (figures + found) / 2
        if settled:
            break
    residuals = np.log(_modelled(observations, figures) / measured)
    variance = float(residuals @ residuals) / (len(measured) - 3)
    spread = np.sqrt(np.abs(np.diag(np.linalg.pinv(slopes.T @ slopes))) * variance)
    return Fit(
        level=Level(*figures.tolist()),
        margin=Level(*(NORMAL_95 * spread * scale).tolist()),
        error=float(np.sqrt(np.mean(residuals**2))),
    )


def _modelled(
    observations: Sequence[Observation], figures: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return what the model says, in seconds above 0."""
    level = Level(*figures.tolist())
    return np.array([max(observation.model(level), 1e-12) for observation in observations])


def _slopes(
    observations: Sequence[Observation], figures: NDArray[np.float64], scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return how each prediction grows with each figure, in units of `scale`."""
    slopes = np.empty((len(observations), 3))
    for column in range(3):
        nudge = np.zeros(3)
        nudge[column] = _NUDGE * max(figures[column], scale[column])
        below, above = Level(*figures.tolist()), Level(*(figures + nudge).tolist())
        step = nudge[column] / scale[column]
        slopes[:, column] = [
            (observation.model(above) - observation.model(below)) / step
            for observation in observations
        ]
    return slopes


def _least_squares(slopes: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the best solution without a negative figure: of all that hold some of them at 0."""
    best, best_error = np.zeros(3), float(wanted @ wanted)
    for free in (columns for n in (1, 2, 3) for columns in combinations(range(3), n)):
        part, *_ = np.linalg.lstsq(slopes[:, free], wanted, rcond=None)
        if (part < 0).any():
            continue
        residuals = slopes[:, free] @ part - wanted
        error = float(residuals @ residuals)
        if error < best_error:
            best, best_error = np.zeros(3), error
            best[list(free)] = part
    return best
