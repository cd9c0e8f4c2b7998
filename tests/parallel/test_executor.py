"""Every schedule really runs: what a stage gets, is what the stages before it have made of it.

Numbers stand for tensors.  Stage s makes 3x + s of x, and adds what a skip connection brings, times
five; so all gradients are known.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from hvdkit.errors import StallError
from hvdkit.parallel.pipeline.executor import Edge, Executor, edges_of
from hvdkit.parallel.pipeline.instructions import Forward
from hvdkit.transport.base import Topology
from hvdkit.transport.courier import Courier, Loopback
from hvdkit.transport.threads import ThreadTransport, ThreadWorld

from .pipelines import EVERY, identify

SECONDS = 30
LENGTH = 3


class OneNode(ThreadTransport):
    def split_by_node(self):
        return self, Topology(self.rank, self.size, self.rank, self.size, 0, 1)


class Numbers:
    """Computes stages, and notes down the inputs' gradients and how often weights had theirs."""

    def __init__(self, edges, stages):
        self.edges, self.stages = edges, stages
        self.outputs, self.gradients = {}, {}
        self.weights = defaultdict(int)
        self.held, self.most = 0, 0

    def forward(self, stage, microbatch, inputs):
        self.held += 1
        self.most = max(self.most, self.held)
        entering = {edge.label for edge in self.edges if edge.target == stage}
        assert set(inputs) == entering
        x = np.full(LENGTH, float(microbatch)) if stage == 0 else inputs[""][0]
        assert all(bundle[1].dtype == np.int32 for bundle in inputs.values())
        assert all(bundle[1].tolist() == [microbatch] for bundle in inputs.values())
        skipped = sum(5 * bundle[0] for label, bundle in inputs.items() if label)
        y = 3 * x + stage + skipped
        self.outputs[stage, microbatch] = y
        number = np.array([microbatch], np.int32)
        return {edge.label: [y, number] for edge in self.edges if edge.source == stage}

    def backward(self, stage, microbatch, gradients, *, weights):
        assert (stage, microbatch) in self.outputs
        leaving = {edge.label for edge in self.edges if edge.source == stage}
        assert set(gradients) == leaving
        assert all(bundle[1] is None for bundle in gradients.values())
        last = stage == self.stages - 1
        dy = np.full(LENGTH, microbatch + 1.0) if last else np.zeros(LENGTH)
        dy = dy + sum(bundle[0] for bundle in gradients.values())
        self.gradients[stage, microbatch] = 3 * dy
        if weights:
            self.backward_weight(stage, microbatch)
        return {
            edge.label: [(5 if edge.label else 3) * dy, None]
            for edge in self.edges
            if edge.target == stage
        }

    def backward_weight(self, stage, microbatch):
        assert (stage, microbatch) in self.gradients
        self.weights[stage, microbatch] += 1
        self.held -= 1


def oracle(edges, stages, microbatches):
    """Return all outputs and gradients of inputs, computed by the book."""
    outputs, gradients = {}, {}
    for microbatch in range(microbatches):
        for stage in range(stages):
            x = float(microbatch) if stage == 0 else 0.0
            y = 3 * x + stage
            for edge in edges:
                if edge.target == stage:
                    y += (5 if edge.label else 3) * outputs[edge.source, microbatch]
            outputs[stage, microbatch] = y
        of_output = defaultdict(float)
        of_output[stages - 1] = microbatch + 1.0
        for stage in reversed(range(stages)):
            gradients[stage, microbatch] = 3 * of_output[stage]
            for edge in edges:
                if edge.target == stage:
                    of_output[edge.source] += (5 if edge.label else 3) * of_output[stage]
    return outputs, gradients


def run(schedule, ranks, microbatches, chunks, skips=(), kind=ThreadTransport, times=1):
    """Run a schedule on threads, and return each rank's worker."""
    stages = ranks * chunks
    edges = edges_of(stages, skips)
    plan = schedule.plan(ranks, microbatches, chunks)
    world = ThreadWorld(ranks)

    def rank(transport):
        transport = kind(world, transport.rank)
        alone = ranks == 1
        courier = Loopback() if alone else Courier(transport, shared=kind is OneNode)
        worker = Numbers(edges, stages)
        executor = Executor(courier, edges, worker)
        for _ in range(times):
            executor.run(plan[transport.rank])
        left = [key for key, waiting in courier._inbox.items() if waiting]
        assert not left, left
        transport.allgather_object("done")
        if not alone:
            courier.close()
        return worker

    return world.run(rank, timeout=SECONDS)


def check(workers, ranks, microbatches, chunks, skips=(), times=1):
    stages = ranks * chunks
    outputs, gradients = oracle(edges_of(stages, skips), stages, microbatches)
    for rank, worker in enumerate(workers):
        mine = {(s, m) for s in range(rank, stages, ranks) for m in range(microbatches)}
        assert set(worker.outputs) == set(worker.gradients) == set(worker.weights) == mine
        assert set(worker.weights.values()) == {times}
        for key in mine:
            assert worker.outputs[key].tolist() == [outputs[key]] * LENGTH
            assert worker.gradients[key].tolist() == [gradients[key]] * LENGTH


def sizes(schedule):
    for ranks in range(1, 6):
        for microbatches in (1, 2, 4, 7):
            for chunks in (1, 2, 3) if schedule.chunked else (1,):
                yield ranks, microbatches, chunks


@pytest.mark.parametrize("schedule", EVERY, ids=identify)
@pytest.mark.parametrize("ranks", range(1, 6))
def test_every_schedule_runs_to_its_end(schedule, ranks):
    """And holds no more than it promises."""
    for _, microbatches, chunks in (each for each in sizes(schedule) if each[0] == ranks):
        workers = run(schedule, ranks, microbatches, chunks)
        check(workers, ranks, microbatches, chunks)
        for rank, worker in enumerate(workers):
            promised = schedule.memory(rank, ranks, microbatches, chunks).in_flight
            assert worker.most <= promised


@pytest.mark.parametrize("schedule", EVERY, ids=identify)
def test_over_shared_memory(schedule):
    check(run(schedule, 3, 5, 1, kind=OneNode), 3, 5, 1)


#: Of five stages.
SKIPS = {
    "one that jumps": [Edge("a", 0, 3)],
    "to the next stage": [Edge("a", 2, 3)],
    "from the first to the last": [Edge("a", 0, 4)],
    "nested": [Edge("outer", 0, 4), Edge("inner", 1, 3)],
    "crossing": [Edge("a", 0, 3), Edge("b", 1, 4)],
    "two side by side": [Edge("a", 1, 3), Edge("b", 1, 3)],
}


@pytest.mark.parametrize("schedule", EVERY, ids=identify)
@pytest.mark.parametrize("skips", SKIPS.values(), ids=SKIPS)
def test_skip_connections(schedule, skips):
    check(run(schedule, 5, 6, 1, skips), 5, 6, 1, skips)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_skip_connections_between_chunks(ranks):
    """Also from a rank to itself."""
    (schedule,) = (each for each in EVERY if each.chunked)
    skips = [Edge("a", 0, 2 * ranks), Edge("b", ranks, 3 * ranks - 1), Edge("c", 0, ranks)]
    check(run(schedule, ranks, 4, 3, skips), ranks, 4, 3, skips)


@pytest.mark.parametrize("schedule", EVERY, ids=identify)
def test_again_and_again(schedule):
    """One step's messages are not taken for another's, and nothing waits for the others' steps."""
    check(run(schedule, 3, 4, 1, times=5), 3, 4, 1, times=5)


def test_forward_alone():
    ranks, microbatches = 4, 6
    edges = edges_of(ranks, [Edge("a", 1, 3)])
    world = ThreadWorld(ranks)

    def rank(transport):
        courier = Courier(transport, shared=False)
        worker = Numbers(edges, ranks)
        steps = [Forward(transport.rank, microbatch) for microbatch in range(microbatches)]
        Executor(courier, edges, worker).run(steps)
        transport.allgather_object("done")
        courier.close()
        return worker.outputs

    outputs, _ = oracle(edges, ranks, microbatches)
    found = {}
    for part in world.run(rank, timeout=SECONDS):
        found |= {key: value[0] for key, value in part.items()}
    assert found == outputs


def test_what_a_run_that_failed_has_left_is_thrown_away():
    edges = edges_of(2)
    world = ThreadWorld(2)

    class Failing(Numbers):
        def backward(self, stage, microbatch, gradients, *, weights):
            if (stage, microbatch) == (1, 1):
                raise ZeroDivisionError("of stage 1")
            return super().backward(stage, microbatch, gradients, weights=weights)

    (schedule,) = (each for each in EVERY if each.name == "gpipe")
    plan = schedule.plan(2, 4)

    def rank(transport):
        courier = Courier(transport, shared=False, shutdown=0.5)
        with pytest.raises((ZeroDivisionError, StallError)):
            Executor(courier, edges, Failing(edges, 2)).run(plan[transport.rank])
        transport.allgather_object("all have failed")
        worker = Numbers(edges, 2)
        Executor(courier, edges, worker).run(plan[transport.rank])
        transport.allgather_object("done")
        assert not any(courier._inbox.values())
        courier.close()
        return worker

    check(world.run(rank, timeout=SECONDS), 2, 4, 1)


def test_an_error_in_a_stage_ends_its_rank_and_not_the_courier():
    """The others wait for it, for as long as they are told to."""
    edges = edges_of(2)
    world = ThreadWorld(2)

    class Failing(Numbers):
        def forward(self, stage, microbatch, inputs):
            if microbatch == 1:
                raise ZeroDivisionError("of stage 0")
            return super().forward(stage, microbatch, inputs)

    def rank(transport):
        courier = Courier(transport, shared=False, shutdown=0.5)
        worker = (Failing if transport.rank == 0 else Numbers)(edges, 2)
        error = ZeroDivisionError if transport.rank == 0 else StallError
        with pytest.raises(error):
            Executor(courier, edges, worker).run([Forward(transport.rank, m) for m in range(2)])
        transport.allgather_object("done")
        courier.close()

    world.run(rank, timeout=SECONDS)
