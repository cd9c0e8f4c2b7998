"""Measure how long segments and buckets should be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit import collectives
from hvdkit.collectives.scheduled import run_schedule
from hvdkit.config import BUCKET_BYTES, KIB, MIB, SEGMENT_BYTES, SEGMENT_OVER_SOCKETS
from hvdkit.dtypes import Sum
from hvdkit.tuner.bench import LONGEST_CALL, Bench, elements, nothing
from hvdkit.tuning.estimates import LEAST_GAIN
from hvdkit.tuning.measure import Timing

SEGMENTED_SIZES = (MIB, 4 * MIB, 16 * MIB)
SEGMENTS = (SEGMENT_OVER_SOCKETS, 128 * KIB, 256 * KIB, SEGMENT_BYTES, MIB, 4 * MIB)

#: Which schedules are cut.
SCHEDULES = ("ring", "halving_doubling")

#: Buckets, and how much is sent in them in all, the less where messages are slow.  The longest
#: bucket holds it all, so that it hides nothing.
BUCKETS = (MIB, 4 * MIB, 8 * MIB, 16 * MIB, BUCKET_BYTES, 64 * MIB)
BUCKETED_BYTES = (64 * MIB, BUCKET_BYTES)

#: Seconds for all turns of all buckets: the choice is one for every step.
BUCKETS_BUDGET = 1.5

#: Bytes that backward goes over again and again, and of gradients for which it does.
COMPUTED_BYTES, COMPUTED_FOR = 64 * KIB, 256 * KIB


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
                    run = nothing if group is None else partial(run_schedule, group, "allreduce")
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
    """Return the bucket that is the best alone, and while backward computes.  Collective.

    Backward takes as long as its gradients travel, which is where buckets make the most of a
    difference: where cores are idle or the network works by itself, the shorter hide more of it;
    where every core computes, nothing can be hidden, and each bucket costs its start.
    """
    world = bench.world
    estimate = world.group.estimates.estimate("allreduce", "ring", BUCKETED_BYTES[0])
    slow = estimate is None or estimate.seconds > LONGEST_CALL
    data = world.empty(BUCKETED_BYTES[slow] // 4)
    alone = _buckets(bench, "buckets", data, nothing)
    passes = np.zeros(COMPUTED_BYTES // 4, np.float32)

    def compute() -> None:
        np.add(passes, passes, out=passes)

    once = bench.measure("backward", {"compute": compute})["compute"].seconds
    seconds = alone[BUCKET_BYTES].seconds * COMPUTED_FOR / data.nbytes
    repeats = max(1, round(seconds / once))

    def backward() -> None:
        for _ in range(repeats):
            compute()

    return _least_behind(alone, _buckets(bench, "buckets during backward", data, backward))


def _buckets(
    bench: Bench, label: str, data: NDArray[np.float32], compute: Callable[[], object]
) -> dict[int, Timing]:
    """Return the timing of a step by the bytes of a bucket.  Collective.

    Args:
        bench: which measures.
        label: what is measured.
        data: the gradients.
        compute: called for every `COMPUTED_FOR` bytes of gradients before these are there.
    """
    world = bench.world
    how: dict[str, Any] = {"op": Sum, "name": None, "prescale": 1.0, "postscale": 1.0}

    def step(bucket: int) -> None:
        """Reduce everything as a training step does, on the lane's thread."""
        handles = []
        length = bucket // data.itemsize
        for start in range(0, data.size, length):
            part = data[start : start + length]
            for _ in range(0, part.nbytes, COMPUTED_FOR):
                compute()
            reduce = partial(collectives.allreduce, world.group, part, part, **how)
            handles.append(world.lane.submit(partial(reduce, algorithm="auto")))
        for handle in handles:
            handle.wait()

    calls = {str(bucket): partial(step, bucket) for bucket in BUCKETS}
    found = bench.measure(label, calls, budget=BUCKETS_BUDGET)
    return {bucket: found[str(bucket)] for bucket in BUCKETS}


def _least_behind(*measurements: dict[int, Timing]) -> int:
    """Return the bucket that is behind the best of any measurement by the least.

    The usual one, if no other is better beyond the noise.
    """
    best = [min(timing.seconds for timing in found.values()) for found in measurements]
    pairs = list(zip(measurements, best, strict=True))
    behind = {b: max(found[b].seconds / first for found, first in pairs) for b in BUCKETS}
    noise = {b: max(found[b].margin / first for found, first in pairs) for b in BUCKETS}
    bucket = min(behind, key=lambda length: behind[length])
    gain = behind[BUCKET_BYTES] - behind[bucket]
    return bucket if gain > max(LEAST_GAIN, noise[bucket] + noise[BUCKET_BYTES]) else BUCKET_BYTES
