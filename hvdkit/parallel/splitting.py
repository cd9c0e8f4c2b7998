"""The search behind `hvdkit.parallel.partition`: the best contiguous split of layers into stages.

The linear-partition problem, solved by dynamic programming over suffixes [Skiena, The Algorithm
Design Manual, 2nd ed., section 8.5; PipeDream's partitioner is of the same form: Narayanan et al.,
SOSP 2019, section 3.1].  Split n layers into k stages: O(k n^2) time, a row of n at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

#: ``value(stage, starts)[a, end]``: what a stage of the layers ``starts[a]`` to ``end - 1`` counts
#: for; infinity where it may not be.
Value = Callable[[int, Indices], Floats]

#: ``in_flight(stage, stages)``: microbatches whose activations a stage holds at once, at most.
InFlight = Callable[[int, int], int]

#: What the search for stages that share a rank's memory may look at before it gives up.
MOST_NODES = 20_000


@dataclass(frozen=True)
class Problem:
    """Layers to be split, and what the stages can take.

    Args:
        costs: of each layer.
        resident: bytes of each layer, however many microbatches are in flight.
        activations: bytes of each layer for each microbatch in flight.
        speeds: of each stage.
        in_flight: of each stage, microbatches.
        limits: of each stage, the bytes that its rank has; None: no limit.
        ranks: stage s is on rank s % ranks.
    """

    costs: tuple[float, ...]
    resident: tuple[int, ...]
    activations: tuple[int, ...]
    speeds: tuple[float, ...]
    in_flight: tuple[int, ...]
    limits: tuple[float, ...] | None
    ranks: int

    @property
    def stages(self) -> int:
        return len(self.speeds)

    @cached_property
    def cost_before(self) -> Floats:
        return np.concatenate([[0.0], np.cumsum(self.costs, dtype=np.float64)])

    @cached_property
    def bytes_before(self) -> tuple[Indices, ...]:
        """For each stage, the bytes that layers 0 to i - 1 would need on it."""
        resident, activations = np.array(self.resident), np.array(self.activations)
        return tuple(
            np.concatenate([[0], np.cumsum(resident + flight * activations, dtype=np.int64)])
            for flight in self.in_flight
        )

    def nbytes(self, bounds: tuple[int, ...]) -> list[int]:
        """Return the bytes of each stage of a split."""
        return [
            int(before[bounds[stage + 1]] - before[bounds[stage]])
            for stage, before in enumerate(self.bytes_before)
        ]

    def fits(self, bounds: tuple[int, ...]) -> bool:
        """Return whether the stages of every rank fit within its limit together."""
        if self.limits is None:
            return True
        nbytes = self.nbytes(bounds)
        return all(
            sum(nbytes[rank :: self.ranks]) <= self.limits[rank]
            for rank in range(min(self.ranks, self.stages))
        )


@dataclass(frozen=True)
class Split:
    """Where the stages begin and end, and whether no other split is better."""

    bounds: tuple[int, ...]
    proven: bool = True


def best(problem: Problem) -> Split | None:
    """Return the split with the least slowest stage, or None where none fits.

    Among equals it has the least sum of squared stage times, and among those the shortest first
    stages.  Where several stages share a rank's memory, the problem is a knapsack as well: then
    the search is by branch and bound, takes any of the equals, and may end without a proof.
    """
    alone = _fastest(problem, 1)
    if alone is None or problem.fits(alone):
        return None if alone is None else Split(alone)
    share = -(-problem.stages // problem.ranks)
    return _branch_and_bound(problem, _fastest(problem, share))


def nearest(problem: Problem) -> tuple[int, ...]:
    """Return the split whose stages exceed their limits by the least factor, or need least."""

    def excess(stage: int, starts: Indices) -> Floats:
        assert problem.limits is not None
        before = problem.bytes_before[stage]
        return _nonempty((before - before[starts, None]) / problem.limits[stage], starts)

    return _walk(problem, excess, np.maximum, _sweep(problem, excess, np.maximum))


def ranks_that_fit(problem: Problem, in_flight: InFlight, limit: float) -> int | None:
    """Return how many ranks of `limit` bytes would do, more than there are, or None.

    They are the fewest where each has one stage; with several a rank only those splits are tried
    that are best by stages, or by equal shares of memory.  A stage more may also mean microbatches
    more in flight, so that no number follows from another.
    """
    each = problem.stages // problem.ranks
    for ranks in range(problem.ranks + 1, len(problem.costs) // each + 1):
        stages = each * ranks
        wider = replace(
            problem,
            speeds=(1.0,) * stages,
            in_flight=tuple(in_flight(stage, stages) for stage in range(stages)),
            limits=(limit,) * stages,
            ranks=ranks,
        )
        if _some_split_fits(wider):
            return ranks
    return None


def _some_split_fits(problem: Problem) -> bool:
    if not _may_fit(problem):
        return False
    for share in (1, -(-problem.stages // problem.ranks)):
        bounds = _fastest(problem, share)
        if bounds is not None and problem.fits(bounds):
            return True
    return False


def _may_fit(problem: Problem) -> bool:
    """Return whether stages that may be empty reach the last layer: cheap, and necessary."""
    assert problem.limits is not None
    reached = 0
    for before, limit in zip(problem.bytes_before, problem.limits, strict=True):
        end = int(np.searchsorted(before, before[reached] + limit, side="right")) - 1
        reached = max(reached, end)
    return reached == len(problem.costs)


def _fastest(problem: Problem, share: int) -> tuple[int, ...] | None:
    """Return the best split whose stages each fit into 1/`share` of their limit, if there is one.

    Two passes: the first finds the time of the slowest stage, the second balances the others.
    """

    def times(stage: int, starts: Indices) -> Floats:
        return _times(problem, stage, starts, share)

    slowest = _sweep(problem, times, np.maximum)[0, 0]
    if slowest == np.inf:
        return None

    def squares(stage: int, starts: Indices) -> Floats:
        time = times(stage, starts)
        time[time > slowest] = np.inf
        return np.square(time, out=time)

    return _walk(problem, squares, np.add, _sweep(problem, squares, np.add))


def _times(problem: Problem, stage: int, starts: Indices, share: int) -> Floats:
    """Return stage times, infinity where a stage is empty or does not fit."""
    before = problem.cost_before
    times = (before - before[starts, None]) / problem.speeds[stage]
    if problem.limits is not None:
        memory = problem.bytes_before[stage]
        room = memory[starts] + problem.limits[stage] / share
        times[memory > room[:, None]] = np.inf
    return _nonempty(times, starts)


def _nonempty(values: Floats, starts: Indices) -> Floats:
    values[np.arange(values.shape[1]) <= starts[:, None]] = np.inf
    return values


def _sweep(problem: Problem, value: Value, join: np.ufunc) -> Floats:
    """Return ``table[s, i]``: the least joined value of stages s and on over layers i and on."""
    layers, stages = len(problem.costs), problem.stages
    table = np.full((stages + 1, layers + 1), np.inf)
    table[stages, layers] = 0
    for stage in reversed(range(stages)):
        # Every stage has a layer, those before and those after it too.
        starts = np.arange(stage, layers - stages + stage + 1) if stage else np.zeros(1, np.int64)
        joined = value(stage, starts)
        table[stage, starts] = join(joined, table[stage + 1], out=joined).min(axis=1)
    return table


def _walk(problem: Problem, value: Value, join: np.ufunc, table: Floats) -> tuple[int, ...]:
    """Return the bounds that lead to ``table[0, 0]``, each stage as short as it may be."""
    bounds = [0]
    for stage in range(problem.stages):
        row = join(value(stage, np.array(bounds[-1:]))[0], table[stage + 1])
        bounds.append(int(row.argmin()))
    return tuple(bounds)


class _Search:
    """Depth first, the most promising end of a stage first, within what is left of each rank."""

    def __init__(self, problem: Problem, found: tuple[int, ...] | None) -> None:
        self.problem = problem
        self.found = found
        self.least = np.inf if found is None else _slowest(problem, found)
        self.nodes = 0
        self.after = _sweep(problem, lambda s, starts: _times(problem, s, starts, 1), np.maximum)

    def visit(self, bounds: list[int], left: list[float], slowest: float) -> None:
        """Look for better splits that begin with `bounds`, `left` bytes being free on each rank."""
        stage, start = len(bounds) - 1, bounds[-1]
        if stage == self.problem.stages:
            self.found, self.least = tuple(bounds), slowest
            return
        rank = stage % self.problem.ranks
        memory = self.problem.bytes_before[stage]
        times = _times(self.problem, stage, np.array([start]), 1)[0]
        times[memory > memory[start] + left[rank]] = np.inf
        promise = np.maximum(np.maximum(times, slowest), self.after[stage + 1])
        for end in np.argsort(promise, kind="stable"):
            if promise[end] >= self.least or self.nodes >= MOST_NODES:
                return
            self.nodes += 1
            rest = list(left)
            rest[rank] -= float(memory[end] - memory[start])
            self.visit([*bounds, int(end)], rest, max(slowest, float(times[end])))


def _branch_and_bound(problem: Problem, found: tuple[int, ...] | None) -> Split | None:
    assert problem.limits is not None
    search = _Search(problem, found)
    search.visit([0], list(problem.limits[: problem.ranks]), 0.0)
    proven = search.nodes < MOST_NODES or search.least <= search.after[0, 0]
    return None if search.found is None else Split(search.found, proven)


def _slowest(problem: Problem, bounds: tuple[int, ...]) -> float:
    cost: Any = np.diff(problem.cost_before[list(bounds)]) / problem.speeds
    return float(cost.max())
