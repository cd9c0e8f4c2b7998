"""How times are measured: in turns, so that a machine that changes its speed changes it for all.

After a warm-up all candidates take turns, in another order each time, as what one leaves in the
caches is found by the next; a turn is as many calls as fill some milliseconds, behind a barrier.  A
turn's time is that of the slowest rank, and the median over the turns counts.  What a few turns
show to be far behind the best takes no more of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvdkit.tuning.fit import NORMAL_95

#: Turns of what may be the best, and of what is not.
TURNS = 11
FIRST_TURNS = 3

#: A candidate that takes so many times as long as the best is not among the best.
FAR_BEHIND = 3.0

#: Seconds of a turn, where a call is that short, and of all the turns of all candidates.  In much
#: less, the first call of a turn counts too much, as no rank expects it after those before it (see
#: `hvdkit.collectives.frames`).
TURN_SECONDS = 4e-3
BUDGET = 0.5
MOST_CALLS = 500

#: Turns before those that count, in which ranks learn what to expect; one where a call takes so
#: many times as long as a turn.
WARM_UPS = 6
LONG = 10

#: Of a normal distribution: standard deviation over interquartile range, and standard error of the
#: median over that of the mean.
_DEVIATION = 1 / 1.349
_OF_MEDIAN = 1.253


@dataclass(frozen=True, slots=True)
class Timing:
    """The seconds of a call: the median, and half its interval of 95 % confidence."""

    seconds: float
    margin: float


@dataclass(frozen=True, slots=True)
class Ranks:
    """What measuring needs of the ranks.  Both are collective.

    Args:
        barrier: returns when all ranks have called it.
        slowest: returns, element by element, the largest of all ranks.
    """

    barrier: Callable[[], object]
    slowest: Callable[[NDArray[np.float64]], NDArray[np.float64]]


def measure(
    calls: Mapping[str, Callable[[], object]],
    ranks: Ranks,
    *,
    turns: int = TURNS,
    budget: float = BUDGET,
) -> dict[str, Timing]:
    """Return the timing of each of `calls`, of which all ranks have as many.  Collective.

    Args:
        calls: the candidates.
        ranks: which measure.
        turns: of each candidate at most.
        budget: seconds for all of them, from the fourth turn on.
    """
    repeats = {name: _warm_up(call, ranks) for name, call in calls.items()}
    first = min(FIRST_TURNS, turns)
    times = _turns(calls, repeats, ranks, first)
    best = min((float(np.median(seconds)) for seconds in times.values()), default=0.0)
    near = {
        name: call
        for name, call in calls.items()
        if float(np.median(times[name])) <= FAR_BEHIND * best
    }
    a_turn = sum(float(np.median(times[name])) * repeats[name] for name in near)
    more = _turns(near, repeats, ranks, min(turns - first, int(budget / max(a_turn, 1e-6))))
    return {name: timing(np.concatenate([times[name], more.get(name, [])])) for name in calls}


def timing(seconds: NDArray[np.float64]) -> Timing:
    """Return the timing that the seconds of some turns show."""
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    error = _OF_MEDIAN * _DEVIATION * (high - low) / np.sqrt(len(seconds))
    return Timing(float(middle), float(NORMAL_95 * error))


def _warm_up(call: Callable[[], object], ranks: Ranks) -> int:
    """Return how many calls make a turn: the same on all ranks.

    The first calls are slow, and would make turns short: what they show is how many to try next.
    """
    repeats = 1
    for _ in range(WARM_UPS):
        ranks.barrier()
        seconds = float(ranks.slowest(np.array([_time(call, repeats)]))[0])
        repeats = int(np.clip(TURN_SECONDS / max(seconds, 1e-7), 1, MOST_CALLS))
        if seconds > LONG * TURN_SECONDS:
            break
    return repeats


def _turns(
    calls: Mapping[str, Callable[[], object]], repeats: Mapping[str, int], ranks: Ranks, turns: int
) -> dict[str, NDArray[np.float64]]:
    """Return the seconds of each call in every turn, on the slowest rank."""
    if not turns or not calls:
        return {}
    times = np.empty((len(calls), turns))
    names, orders = list(calls), np.random.default_rng(0)  # the same on all ranks
    for turn in range(turns):
        for number in orders.permutation(len(names)):
            name = names[number]
            ranks.barrier()
            times[number, turn] = _time(calls[name], repeats[name])
    return dict(zip(calls, ranks.slowest(times), strict=True))


def _time(call: Callable[[], object], repeats: int) -> float:
    """Return this rank's seconds a call."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats
