"""Measure every algorithm at every size, on all ranks, as users call it.

Each is measured twice, on other buffers at another time, and all-reduces that may be the fastest
then a third time: some are fast in one look and slow in the next, which the turns of a single look
do not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
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

#: What takes so many times as long as the fastest, in two looks, may still be as fast.
CLOSE = 1.5

#: The timings of some algorithms, by size and by name.
Look = dict[int, dict[str, Timing]]


def measure_grid(bench: Bench) -> Grid:
    """Return the times by collective, algorithm and size.  Collective."""
    kinds = KINDS if bench.world.group.arena is None else KINDS[:1]
    grid = {}
    for kind in kinds:
        first = _upwards(bench, kind)
        looks = [first, _look(bench, kind, {n: first[n] for n in reversed(first)})]
        if kind == "allreduce":
            looks.append(_look(bench, kind, {n: _contenders(looks, n) for n in first}))
        grid[kind] = _cells(looks)
    return grid


def _upwards(bench: Bench, kind: str) -> Look:
    """Return the timings by size, up to the one of which a call would take too long."""
    found: Look = {}
    before, fastest = 0, 0.0
    for nbytes in SIZES:
        if before and fastest * nbytes / before > LONGEST_CALL:
            break
        found[nbytes] = _measure(bench, kind, nbytes, _names(bench, kind, nbytes))
        before, fastest = nbytes, min(timing.seconds for timing in found[nbytes].values())
    return found


def _look(bench: Bench, kind: str, names: dict[int, Collection[str]]) -> Look:
    """Return the timings of these algorithms by size, measured in the order of the sizes."""
    return {nbytes: _measure(bench, kind, nbytes, some) for nbytes, some in names.items() if some}


def _measure(bench: Bench, kind: str, nbytes: int, names: Collection[str]) -> dict[str, Timing]:
    calls = {name: _call(bench, kind, name, nbytes) for name in names}
    return bench.measure(f"{kind}, {nbytes:,} bytes", calls)


def _contenders(looks: Sequence[Look], nbytes: int) -> list[str]:
    """Return what auto may choose and what may be the fastest; nothing if only one may."""
    seconds = {
        name: math.prod(look[nbytes][name].seconds for look in looks) ** (1 / len(looks))
        for name in looks[0][nbytes]
        if name != "mpi"
    }
    close = [name for name in seconds if seconds[name] <= CLOSE * min(seconds.values())]
    return close if len(close) > 1 else []


def _cells(looks: Sequence[Look]) -> dict[str, tuple[Cell, ...]]:
    """Return the medians of the looks by algorithm; where these differ, they are uncertain.

    Not so far as all differ alike: a machine that was slower in a look was so for all.
    """
    cells: dict[str, list[Cell]] = {}
    for nbytes, timings in looks[0].items():
        here = [look[nbytes] for look in looks if nbytes in look]
        slower = [_slower(some, timings) for some in here]
        usual = float(np.mean(slower))
        for name in timings:
            seen = [(some[name], by) for some, by in zip(here, slower, strict=True) if name in some]
            logs = [math.log(one.seconds / by) for one, by in seen]
            seconds = math.exp(float(np.median(logs))) * usual
            apart = seconds * (max(logs) - min(logs)) / 2 / math.sqrt(len(logs) - 1)
            margin = max(apart, math.hypot(*(one.margin for one, _ in seen)) / len(seen))
            cells.setdefault(name, []).append(Cell(nbytes, seconds, margin))
    return {name: tuple(found) for name, found in cells.items()}


def _slower(some: dict[str, Timing], first: dict[str, Timing]) -> float:
    """Return how many times as long as in the first look things take, as a median."""
    return float(np.median([one.seconds / first[name].seconds for name, one in some.items()]))


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
