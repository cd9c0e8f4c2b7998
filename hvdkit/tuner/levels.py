"""Measure what the levels of a machine cost: schedules alone, without what a call adds to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from hvdkit import collectives
from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.collectives.program import even_bounds
from hvdkit.collectives.scheduled import run_schedule
from hvdkit.config import KIB, MIB, SEGMENT_BYTES
from hvdkit.dtypes import Sum
from hvdkit.schedules.all_pairs import all_pairs_flights
from hvdkit.schedules.machine import AT_ONCE, Level, Machine
from hvdkit.schedules.timing import gathering_alphas, predict
from hvdkit.tuner.bench import LONGEST_CALL, Bench, elements, nothing
from hvdkit.tuning.fit import Fit, Observation, fit
from hvdkit.tuning.record import USUAL_LEVELS, Levels

#: Bytes of the messages, and of what is only reduced.
SIZES = (256, 4 * KIB, 32 * KIB, 256 * KIB, 2 * MIB)
REDUCED_SIZES = (64 * KIB, 512 * KIB)

#: Schedules: of more bytes, of fewer steps, without reduction.
SCHEDULES = (
    ("allreduce", "ring"),
    ("allreduce", "recursive_doubling"),
    ("allreduce", "halving_doubling"),
    ("allgather", "ring"),
)

#: Schedules of as many messages: one after the other, and most beside another.
_OVERLAPS = ("ring", "all_pairs")

_CHECK = "check"


@dataclass(frozen=True, slots=True)
class _Model:
    """The seconds of a collective by the model, as `fit` wants them."""

    kind: str
    name: str
    nbytes: int
    size: int
    segment_bytes: int = SEGMENT_BYTES

    def __call__(self, level: Level) -> float:
        return predict(
            self.kind,
            self.name,
            self.nbytes,
            self.size,
            machine=Machine(level, level),
            segment_bytes=self.segment_bytes,
        )


@dataclass(frozen=True, slots=True)
class _Reduce:
    """The seconds in which a rank reduces what is there."""

    nbytes: int

    def __call__(self, level: Level) -> float:
        return self.nbytes * level.gamma


@dataclass(frozen=True, slots=True)
class _Messages:
    """What messages among some ranks cost: the fit to schedules, the level, `Levels.check`."""

    fit: Fit
    level: Level
    check: float


def measure_levels(bench: Bench) -> tuple[Levels, dict[str, Fit]]:
    """Return the levels, and how well each was fitted, by name.  Collective."""
    nodes = bench.context.nodes
    node, leaders = max(nodes, key=len), tuple(ranks[0] for ranks in nodes)
    reduced = list(_reduced(bench))
    levels = replace(USUAL_LEVELS, memory=None)
    fits: dict[str, Fit] = {}
    if len(node) > 1:
        found = _messages(bench, "within a node", node, reduced)
        fits["within"], check = found.fit, (found.check, levels.check[1])
        levels = replace(levels, within=found.level, check=check)
        shared = list(_shared(bench, node))
        if shared:
            fits["memory"] = fit([*shared, *reduced], levels.within)
            levels = replace(levels, memory=fits["memory"].level)
    if len(leaders) > 1:
        found = _messages(bench, "across nodes", leaders, reduced)
        fits["across"], check = found.fit, (levels.check[0], found.check)
        levels = replace(levels, across=found.level, check=check)
    return levels, fits


def _reduced(bench: Bench) -> Iterator[Observation]:
    """Yield how long it takes to reduce, all ranks at once."""
    kernels = bench.context.kernels
    for nbytes in REDUCED_SIZES:
        out, incoming = elements(nbytes), elements(nbytes)
        call = partial(kernels.reduce, out, incoming, Sum, incoming_first=False)
        found = bench.measure(f"reducing {nbytes // KIB} KiB", {"reduce": call})["reduce"]
        yield Observation(found.seconds, _Reduce(nbytes))


def _messages(
    bench: Bench, label: str, ranks: Sequence[int], reduced: list[Observation]
) -> _Messages:
    """Return what messages among `ranks` cost."""
    observations = list(reduced)
    segment_bytes = bench.world.group.estimates.usual_segment
    with bench.messages(ranks, segment_bytes) as group:
        call = Call("tune", None)
        check = nothing if group is None else partial(group.differs, call)
        found = bench.measure(f"check {label}", {_CHECK: check})[_CHECK]
        slowest = 0.0
        for nbytes in SIZES:
            if slowest * 8 > LONGEST_CALL:
                break
            calls = {" ".join(way): _schedule(group, *way, nbytes) for way in SCHEDULES}
            times = bench.measure(f"messages {label}, {nbytes:,} bytes", calls)
            slowest = max(timing.seconds for timing in times.values())
            for (kind, name), timing in zip(SCHEDULES, times.values(), strict=True):
                model = _Model(kind, name, nbytes, len(ranks), segment_bytes)
                observations.append(Observation(timing.seconds, model))
        calls = {name: _schedule(group, "allreduce", name, SIZES[0]) for name in _OVERLAPS}
        overlaps = bench.measure(f"messages {label} at once", calls)
    fitted = fit(observations, USUAL_LEVELS.within)
    one_by_one, at_once = (overlaps[name].seconds for name in _OVERLAPS)
    share = share_at_once(one_by_one, at_once, fitted.level, len(ranks))
    level = replace(fitted.level, at_once=share)
    return _Messages(fitted, level, found.seconds / gathering_alphas(len(ranks), share))


def share_at_once(one_by_one: float, at_once: float, level: Level, size: int) -> float:
    """Return what a message costs beside another one, of alpha, from 0 to 1.

    Args:
        one_by_one: seconds of an all-reduce of `SIZES[0]` bytes in a ring.
        at_once: by all pairs, of as many messages and bytes.
        level: what was fitted to other schedules, for the time on the way.
        size: number of ranks.
    """
    messages, flights = 2 * (size - 1), all_pairs_flights(size)
    silent = replace(level, alpha=0.0)
    carried = predict("allreduce", "ring", SIZES[0], size, machine=Machine(silent, silent))
    if messages == flights or one_by_one <= carried:
        return AT_ONCE  # of two ranks no message is beside another; or alpha is lost in noise
    alphas = messages * (at_once - carried) / (one_by_one - carried)
    return min(max((alphas - flights) / (messages - flights), 0.0), 1.0)


def _schedule(group: Group | None, kind: str, name: str, nbytes: int) -> Callable[[], object]:
    if group is None:
        return nothing
    data = elements(nbytes)
    bounds = even_bounds(data.size, group.size)
    counts = [stop - start for start, stop in pairwise(bounds)] if kind == "allgather" else None
    return partial(run_schedule, group, kind, name, data, counts=counts)


def _shared(bench: Bench, ranks: Sequence[int]) -> Iterator[Observation]:
    """Yield the times of collectives in the memory of a node; none if it shares none."""
    everyone = len(ranks) == bench.world.size
    process_set = None if everyone else bench.context.process_sets.add(ranks)
    if process_set is None:
        group: Group | None = bench.world.group
    else:
        inside = process_set.included()
        group = process_set.communicator().group if inside else None
    there = group is not None and group.arena is not None
    if any(bench.world.allgather_object(there)):
        for nbytes in SIZES:
            calls = {"shm": _in_memory(group, nbytes)}
            found = bench.measure(f"shared memory, {nbytes:,} bytes", calls)["shm"]
            yield Observation(found.seconds, _Model("allreduce", "shm", nbytes, len(ranks)))
    if process_set is not None:
        bench.context.process_sets.remove(process_set)


def _in_memory(group: Group | None, nbytes: int) -> Callable[[], object]:
    """Return an all-reduce in shared memory, for ranks that are in the group."""
    if group is None:
        return nothing
    data = elements(nbytes)
    how: dict[str, Any] = {"prescale": 1.0, "postscale": 1.0, "op": Sum, "name": None}
    return partial(collectives.allreduce, group, data, data, algorithm="shm", **how)
