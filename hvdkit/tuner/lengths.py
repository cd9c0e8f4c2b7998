"""Measure how long segments and buckets should be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from hvdkit import collectives
from hvdkit.config import BUCKET_BYTES, KIB, MIB, SEGMENT_BYTES, SEGMENT_OVER_SOCKETS
from hvdkit.dtypes import Sum
from hvdkit.tuner.bench import LONGEST_CALL, Bench, elements, nothing
from hvdkit.tuning.estimates import LEAST_GAIN
from hvdkit.tuning.measure import Timing

SEGMENTED_SIZES = (MIB, 4 * MIB, 16 * MIB)
SEGMENTS = (SEGMENT_OVER_SOCKETS, 128 * KIB, 256 * KIB, SEGMENT_BYTES, MIB, 4 * MIB)

#: Which schedules are cut.
SCHEDULES = ("ring", "halving_doubling")

#: Buckets, and how much is sent in them in all, the less where messages are slow.
BUCKETS = (MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, BUCKET_BYTES)
BUCKETED_BYTES = (4 * BUCKET_BYTES, BUCKET_BYTES)

#: A shorter bucket than the best is taken if it is so much slower at the most: more of it overlaps.
NEARLY = 1.05


def best_segments(bench: Bench) -> tuple[tuple[int, int], ...]:
    """Return sizes of messages and the best segments for them.  Collective.

    Measured between the first ranks of the nodes; on one node, between its ranks.
    """
    nodes = bench.context.nodes
    ranks = nodes[0] if len(nodes) == 1 else tuple(node[0] for node in nodes)
    found: list[tuple[int, int]] = []
    with ExitStack() as stack:
        groups = {
            segment: stack.enter_context(bench.messages(ranks, segment)) for segment in SEGMENTS
        }
        slowest = 0.0
        for nbytes in SEGMENTED_SIZES:
            if slowest * 4 > LONGEST_CALL:
                break
            data = elements(nbytes)
            calls: dict[str, Callable[[], object]] = {}
            for segment, group in groups.items():
                for name in SCHEDULES:
                    run = nothing if group is None else partial(group.run_schedule, "allreduce")
                    arguments = () if group is None else (name, data)
                    calls[f"{segment} {name}"] = partial(run, *arguments)
            times = bench.measure(f"segments of {nbytes // MIB} MiB", calls)
            slowest = max(timing.seconds for timing in times.values())
            best = {
                segment: min((times[f"{segment} {name}"] for name in SCHEDULES), key=_seconds)
                for segment in SEGMENTS
            }
            found.append((nbytes, _choose(best, bench.world.group.estimates.usual_segment)))
    return tuple(found)


def _choose(times: dict[int, Timing], usual_segment: int) -> int:
    """Return the best segment; the usual one, if no other is better beyond the noise."""
    usual = times[usual_segment]
    segment = min(times, key=lambda length: times[length].seconds)
    noise = usual.margin + times[segment].margin
    gain = usual.seconds - times[segment].seconds
    return segment if gain > max(noise, LEAST_GAIN * usual.seconds) else usual_segment


def _seconds(timing: Timing) -> float:
    return timing.seconds


def best_bucket(bench: Bench) -> int:
    """Return the shortest bucket that takes hardly longer than the best.  Collective."""
    world = bench.world
    estimate = world.group.estimates.estimate("allreduce", "ring", BUCKETED_BYTES[0])
    slow = estimate is None or estimate.seconds > LONGEST_CALL
    data = world.empty(BUCKETED_BYTES[slow] // 4)

    def reduce_in(bucket: int) -> None:
        """Reduce everything as a training step does, on the lane's thread."""
        step = bucket // data.itemsize
        how: dict[str, Any] = {
            "op": Sum,
            "name": None,
            "prescale": 1.0,
            "postscale": 1.0,
            "algorithm": "auto",
        }
        parts = [data[start : start + step] for start in range(0, data.size, step)]
        handles = [
            world.lane.submit(partial(collectives.allreduce, world.group, part, part, **how))
            for part in parts
        ]
        for handle in handles:
            handle.wait()

    calls = {str(bucket): partial(reduce_in, bucket) for bucket in BUCKETS}
    times = bench.measure("buckets", calls)
    fastest = min(timing.seconds for timing in times.values())
    return min(bucket for bucket in BUCKETS if times[str(bucket)].seconds <= NEARLY * fastest)
