"""Measure every algorithm at every size, on all ranks, as users call it.

Each is measured twice, on other buffers at another time: some are fast in one run and slow in the
next, which the turns of a single run do not show.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import numpy as np

from hvdkit.collectives.pick import ways
from hvdkit.config import KIB, MIB
from hvdkit.dtypes import Sum
from hvdkit.tuner.bench import LONGEST_CALL, Bench, elements
from hvdkit.tuning.measure import Timing
from hvdkit.tuning.record import Cell, Grid

SIZES = (4, 64, *(KIB << shift for shift in (0, *range(2, 12))), 4 * MIB, 16 * MIB, 64 * MIB)

#: What is measured where ranks share no memory; where they do, only an all-reduce has a choice.
KINDS = ("allreduce", "allgather", "reducescatter", "broadcast")


def measure_grid(bench: Bench) -> Grid:
    """Return the times by collective, algorithm and size.  Collective."""
    kinds = KINDS if bench.world.group.arena is None else KINDS[:1]
    grid = {}
    for kind in kinds:
        first = _upwards(bench, kind)
        second = {nbytes: _measure(bench, kind, nbytes) for nbytes in reversed(first)}
        grid[kind] = _cells(first, second)
    return grid


def _upwards(bench: Bench, kind: str) -> dict[int, dict[str, Timing]]:
    """Return the timings by size, up to the one of which a call would take too long."""
    found: dict[int, dict[str, Timing]] = {}
    before, fastest = 0, 0.0
    for nbytes in SIZES:
        if before and fastest * nbytes / before > LONGEST_CALL:
            break
        found[nbytes] = _measure(bench, kind, nbytes)
        before, fastest = nbytes, min(timing.seconds for timing in found[nbytes].values())
    return found


def _measure(bench: Bench, kind: str, nbytes: int) -> dict[str, Timing]:
    calls = {name: _call(bench, kind, name, nbytes) for name in _names(bench, kind, nbytes)}
    return bench.measure(f"{kind}, {nbytes:,} bytes", calls)


def _cells(
    first: dict[int, dict[str, Timing]], second: dict[int, dict[str, Timing]]
) -> dict[str, tuple[Cell, ...]]:
    """Return both by algorithm; where they differ, by so much they are uncertain.

    Not so far as all differ alike: a machine that was slower the second time was so for all.
    """
    cells: defaultdict[str, list[Cell]] = defaultdict(list)
    for nbytes, timings in first.items():
        slower = {name: second[nbytes][name].seconds / one.seconds for name, one in timings.items()}
        usual = float(np.median(list(slower.values())))
        for name, one in timings.items():
            other = second[nbytes][name]
            seconds = (one.seconds + other.seconds) / 2
            apart = seconds * abs(math.log(slower[name] / usual)) / 2
            margin = max(apart, math.hypot(one.margin, other.margin) / 2)
            cells[name].append(Cell(nbytes, seconds, margin))
    return {name: tuple(found) for name, found in cells.items()}


def _names(bench: Bench, kind: str, nbytes: int) -> tuple[str, ...]:
    """Return what auto may choose from, and the MPI library's own as a peer."""
    group = bench.world.group
    found = ways(
        kind,
        nbytes,
        group.size,
        no_arena=group.no_arena,
        no_hierarchy=group.no_hierarchy,
    )
    if group.estimates.per_node == 1:
        found = tuple(name for name in found if name != "hierarchical")
    return (*found, "mpi") if bench.context.kind == "mpi" else found


def _call(bench: Bench, kind: str, name: str, nbytes: int) -> Callable[[], object]:
    """Return a call of a collective on a message of `nbytes` as the formulas count them."""
    world = bench.world
    if kind == "allgather":
        return partial(world.allgather, elements(nbytes // world.size), None, name)
    data = elements(nbytes)
    if kind == "reducescatter":
        return partial(world.reducescatter, data, Sum, None, 1.0, 1.0, name)
    if kind == "broadcast":
        return partial(world.broadcast, data, 0, None, name, True)
    return partial(world.allreduce, data, Sum, None, 1.0, 1.0, name, True)
