"""A training step, simulated: pipeline, tensor-parallel layers, buckets and their overlap together.

What is played is what hvdkit runs: the pipeline's schedule, instruction by instruction; the buckets
that its gradients make, each all-reduced over the data axis as soon as its last gradient is there
and the bucket before it is done; and the schedules of these all-reduces, in all groups at the same
time.  A layer's gradients are ready when the last microbatch's backward has passed it.

With several tensor-parallel ranks a layer's time and parameters are shared out, and its output is
all-reduced among them in forward, its input's gradient in backward, which nothing hides [Shoeybi et
al., Megatron-LM, 2019].  Computation and communication do not slow each other down, and the
optimizer's own time is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from hvdkit.engine.bucketing import Gradient, plan_buckets
from hvdkit.errors import ArgumentError
from hvdkit.parallel.pipeline.instructions import BackwardWeight, Forward, Times
from hvdkit.parallel.pipeline.registry import get
from hvdkit.parallel.pipeline.simulate import Slot, Timeline
from hvdkit.parallel.pipeline.simulate import simulate as play_pipeline
from hvdkit.simulation.groups import Groups, Reduced, transfer_seconds
from hvdkit.simulation.job import Job, Layer
from hvdkit.simulation.network import CALM, Disturbance, Network


@dataclass(frozen=True, slots=True)
class SentBucket:
    """A bucket of one pipeline rank, and its all-reduce, in seconds from the step's begin.

    Args:
        nbytes: that travel.
        ready: when its last gradient is there, in the slowest replica.
        begin, end: of its all-reduce.
        reduced: how it was reduced.
    """

    nbytes: float
    ready: float
    begin: float
    end: float
    reduced: Reduced


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a simulated training step took.

    Args:
        seconds: until the last rank has all its gradients.
        parts: what these are made of, on the rank along the pipeline that is last: ``compute``;
            ``tensor all-reduce``; ``bubble``: it waits, and would even if nothing between stages
            took time; ``stage transfers``: it waits for these; ``exposed gradients``: computing is
            over, and the gradients' all-reduces are not.
        ideal: seconds of a step that computes the same on all ranks, always and alike.
        hidden: seconds of that rank's all-reduces behind which it computed, or waited.
        last: the rank along the pipeline that is last.
        buckets: of that rank.
    """

    seconds: float
    parts: dict[str, float]
    ideal: float
    hidden: float
    last: int
    buckets: tuple[SentBucket, ...]

    @property
    def efficiency(self) -> float:
        """The share of all ranks' time in which they compute."""
        return self.ideal / self.seconds if self.seconds else 1.0

    @property
    def bound_by(self) -> str:
        """The largest part."""
        return max(self.parts, key=self.parts.__getitem__)


def simulate_training(job: Job, network: Network, *, disturbance: Disturbance = CALM) -> Step:
    """Simulate one step of `job`.  Local: no other rank is involved.

    Args:
        job: what is trained, and how.
        network: as many ranks as the job's mesh has, and what messages between them cost.
        disturbance: who is slow: stragglers compute as much slower.

    Raises:
        ArgumentError: numbers do not fit each other, or there is no such algorithm.
    """
    disturbance.check(network.size)
    if network.size != job.size:
        raise ArgumentError(f"the job's mesh has {job.size} ranks, and the network {network.size}")
    return _Simulation(job, network, disturbance).step()


@dataclass(frozen=True, slots=True)
class _Replica:
    """One data-parallel replica, played: with its transfers, and as if these took no time."""

    timeline: Timeline
    at_once: Timeline


class _Simulation:
    def __init__(self, job: Job, network: Network, disturbance: Disturbance) -> None:
        self.job, self.network, self.disturbance = job, network, disturbance
        tensor_lines = job.ranks.reshape(-1, job.tensor)
        data_lines = np.moveaxis(job.ranks, 0, -1).reshape(-1, job.data)
        self.tensor = Groups(network, tensor_lines, disturbance)
        self.data = Groups(network, data_lines, disturbance)
        slow = np.ones(job.size)
        for rank, factor in disturbance.stragglers.items():
            slow[rank] = factor
        self.slow = slow[job.ranks].max(axis=2)  # by replica and rank along the pipeline

    def step(self) -> Step:
        job = self.job
        paces = sorted({tuple(pace) for pace in self.slow.tolist()})
        replicas = [(pace, self._play(pace)) for pace in paces]
        ends = []
        for rank in range(job.pipeline):
            buckets = self._send(rank, replicas)
            computed = max(replica.timeline.rows[rank][-1].end for _, replica in replicas)
            ends.append((max([float(computed), *(bucket.end for bucket in buckets)]), buckets))
        last = max(range(job.pipeline), key=lambda rank: ends[rank][0])
        seconds, buckets = ends[last]
        pace, slowest = max(replicas, key=lambda each: each[1].timeline.rows[last][-1].end)
        parts = self._parts(last, pace, slowest)
        parts["exposed gradients"] = seconds - float(slowest.timeline.rows[last][-1].end)
        busy = sum(bucket.end - bucket.begin for bucket in buckets)
        compute = sum(layer.forward + layer.backward for layer in job.layers)
        return Step(
            seconds=seconds,
            parts=parts,
            ideal=job.microbatches * compute / (job.pipeline * job.tensor),
            hidden=busy - min(busy, parts["exposed gradients"]),
            last=last,
            buckets=buckets,
        )

    def _play(self, pace: Sequence[float]) -> _Replica:
        """Play the pipeline of a replica whose ranks are so many times as slow."""
        job = self.job
        times = [self._times(stage, pace) for stage in range(job.stages)]
        transfers = [self._transfer(stage) for stage in range(job.stages - 1)]
        plan = get(job.schedule).plan(job.pipeline, job.microbatches, job.chunks)
        return _Replica(
            play_pipeline(plan, chunks=job.chunks, times=times, transfer=transfers),
            play_pipeline(plan, chunks=job.chunks, times=times),
        )

    def _times(self, stage: int, pace: Sequence[float]) -> Times:
        """Return how long a stage takes for a microbatch, all-reduces included."""
        factor = pace[stage % self.job.pipeline] / self.job.tensor
        layers = self.job.layers_of(stage)
        backward = sum(layer.backward for layer in layers) * factor
        exchange = sum(self._exchange(layer) for layer in layers)
        return Times(
            forward=sum(layer.forward for layer in layers) * factor + exchange,
            backward_input=backward / 2 + exchange,
            backward_weight=backward / 2,
        )

    def _exchange(self, layer: Layer) -> float:
        """Return the seconds of a layer's all-reduce among tensor-parallel ranks."""
        if self.job.tensor == 1 or not layer.activation:
            return 0.0
        return self.tensor.allreduce(self.job.algorithm, layer.activation).played.seconds

    def _transfer(self, stage: int) -> float:
        """Return the seconds of what passes between a stage and the next, either way."""
        pipeline = self.job.pipeline
        here, there = (self.job.ranks[:, s % pipeline].ravel() for s in (stage, stage + 1))
        nbytes = self.job.layers_of(stage)[-1].activation
        if pipeline == 1:
            return 0.0
        return transfer_seconds(self.network, here, there, nbytes, self.disturbance)

    def _send(
        self, rank: int, replicas: Sequence[tuple[Sequence[float], _Replica]]
    ) -> tuple[SentBucket, ...]:
        """All-reduce the buckets of a rank along the pipeline, one after the other."""
        job = self.job
        if job.data == 1:
            return ()
        ready: dict[str, float] = {}
        layers: dict[str, Layer] = {}
        for pace, replica in replicas:
            for number, layer, at in self._gradients(replica.timeline.rows[rank], pace[rank]):
                key = f"{number} {layer.name}"
                layers[key] = layer
                ready[key] = max(at, ready.get(key, 0.0))
        gradients = [
            Gradient(key, (-(-layer.parameters // job.tensor),), np.dtype(job.dtype))
            for key, layer in layers.items()
        ]
        moments = list(ready.values())
        order = sorted(range(len(gradients)), key=moments.__getitem__)
        sent, free = [], 0.0
        for bucket in plan_buckets(gradients, job.bucket_bytes, order):
            nbytes = bucket.count * bucket.dtype.itemsize * job.compression
            reduced = self.data.allreduce(job.algorithm, nbytes)
            there = max(moments[member] for member in bucket.members)
            begin = max(there, free)
            free = begin + reduced.played.seconds
            sent.append(SentBucket(nbytes, there, begin, free, reduced))
        return tuple(sent)

    def _gradients(
        self, slots: Sequence[Slot], factor: float
    ) -> Iterator[tuple[int, Layer, float]]:
        """Yield the layers of a rank that have parameters, by number, and when each is done."""
        last: dict[int, Slot] = {}
        for slot in slots:
            if not isinstance(slot.instruction, Forward):
                last[slot.instruction.stage] = slot
        for stage, slot in last.items():
            layers = self.job.layers_of(stage)[::-1]
            split = isinstance(slot.instruction, BackwardWeight)
            shares = [
                layer.backward * factor / self.job.tensor
                + (0.0 if split else self._exchange(layer))
                for layer in layers
            ]
            total = sum(shares) or 1.0
            for place, (layer, until) in enumerate(zip(layers, accumulate(shares), strict=True)):
                if layer.parameters:
                    number = self.job.bounds[stage + 1] - 1 - place
                    at = slot.start + (slot.end - slot.start) * until / total
                    yield number, layer, float(at)

    def _parts(self, rank: int, pace: Sequence[float], replica: _Replica) -> dict[str, float]:
        """Return what a rank's time until its last instruction is made of."""
        job = self.job
        layers = [
            layer
            for stage in range(rank, job.stages, job.pipeline)
            for layer in job.layers_of(stage)
        ]
        factor = job.microbatches * pace[rank] / job.tensor
        compute = factor * sum(layer.forward + layer.backward for layer in layers)
        exchange = job.microbatches * sum(2 * self._exchange(layer) for layer in layers)
        end, at_once = (
            float(timeline.rows[rank][-1].end) for timeline in (replica.timeline, replica.at_once)
        )
        return {
            "compute": compute,
            "tensor all-reduce": exchange,
            "bubble": max(0.0, at_once - compute - exchange),
            "stage transfers": end - max(at_once, compute + exchange),
        }
