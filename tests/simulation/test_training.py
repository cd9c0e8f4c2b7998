"""A training step against what can be said of it on paper."""

from __future__ import annotations

import pytest

from hvdkit.errors import ArgumentError
from hvdkit.parallel.pipeline.instructions import Times
from hvdkit.parallel.pipeline.registry import SCHEDULES, get
from hvdkit.schedules.machine import Level, Machine
from hvdkit.simulation.collective import simulate
from hvdkit.simulation.job import Job, Layer
from hvdkit.simulation.network import Disturbance, Network
from hvdkit.simulation.topologies import SharedNic
from hvdkit.simulation.training import simulate_training

A, B = 5e-6, 1e-9
MACHINE = Machine(within=Level(A, B, 0), across=Level(A, B, 0))
BUCKET = 4 * 1_000_000


def layers(count: int, forward: float = 1e-3, activation: float = 0) -> tuple[Layer, ...]:
    return tuple(
        Layer(
            name=f"layer {i}",
            parameters=1_000_000,
            forward=forward,
            backward=2 * forward,
            activation=activation,
        )
        for i in range(count)
    )


def network_of(size: int, ranks_per_node: int = 1) -> Network:
    return Network(
        size=size,
        ranks_per_node=ranks_per_node,
        machine=MACHINE,
        topology=SharedNic(),
        segment_bytes=1e18,
    )


def step_of(job: Job, **disturbance: object):
    network = network_of(job.size)
    step = simulate_training(job, network, disturbance=Disturbance(**disturbance))
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    assert min(step.parts.values()) >= -1e-12
    return step


def ring(p: int, nbytes: float) -> float:
    return 2 * (p - 1) * (A + nbytes / p * B)


def test_one_rank_computes() -> None:
    step = step_of(Job(layers=layers(4), microbatches=3))
    assert step.seconds == pytest.approx(3 * 4 * 3e-3)
    assert step.efficiency == pytest.approx(1)
    assert (step.bound_by, step.buckets) == ("compute", ())


def test_buckets_travel_while_the_layers_before_compute() -> None:
    """A bucket takes longer than the next layer's backward: only the first begins on time."""
    job = Job(layers=layers(4), data=4, bucket_bytes=BUCKET, algorithm="ring")
    step, one = step_of(job), ring(4, BUCKET)
    assert one > 2e-3
    assert [sent.ready for sent in step.buckets] == pytest.approx([6e-3, 8e-3, 10e-3, 12e-3])
    assert step.seconds == pytest.approx(6e-3 + 4 * one)
    assert step.parts["exposed gradients"] == pytest.approx(6e-3 + 4 * one - 12e-3)
    assert step.hidden == pytest.approx(6e-3)
    assert step.efficiency == pytest.approx(12e-3 / step.seconds)


def test_of_fast_all_reduces_only_the_last_is_exposed() -> None:
    job = Job(layers=layers(4, forward=0.1), data=4, bucket_bytes=BUCKET, algorithm="ring")
    step = step_of(job)
    assert step.seconds == pytest.approx(4 * 0.3 + ring(4, BUCKET))


def test_one_bucket_overlaps_nothing() -> None:
    job = Job(layers=layers(4), data=4, bucket_bytes=16_000_064, algorithm="ring")
    assert step_of(job).seconds == pytest.approx(12e-3 + ring(4, 16e6))
    small = Job(
        layers=layers(4), data=4, bucket_bytes=16_000_064, algorithm="ring", compression=0.25
    )
    assert step_of(small).seconds == pytest.approx(12e-3 + ring(4, 4e6))


def test_the_best_algorithm_is_the_fastest_one() -> None:
    network = network_of(8)
    job = Job(layers=layers(1), data=8)
    found = step_of(job).buckets[0]
    by_name = {
        name: simulate(name, found.nbytes, network).seconds
        for name in ("ring", "tree", "recursive_doubling", "halving_doubling", "double_tree")
    }
    assert found.reduced.algorithm == min(by_name, key=by_name.__getitem__)
    assert found.end - found.begin == pytest.approx(min(by_name.values()))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 8), (4, 4)])
def test_the_bubble_is_the_schedules_formula(name: str, stages: int, microbatches: int) -> None:
    chunks = 2 if get(name).chunked else 1
    free = Machine(within=Level(0, 0, 0), across=Level(0, 0, 0))
    job = Job(
        layers=layers(stages * chunks),
        pipeline=stages,
        microbatches=microbatches,
        schedule=name,
        chunks=chunks,
    )
    step = simulate_training(job, Network(size=stages, ranks_per_node=1, machine=free))
    bubble = float(get(name).bubble(stages, microbatches, chunks, Times()))
    assert step.efficiency == pytest.approx(1 - bubble)
    assert step.parts["compute"] == pytest.approx(step.ideal)
    assert step.parts["stage transfers"] == pytest.approx(0)


def test_stages_wait_for_transfers() -> None:
    job = Job(layers=layers(2, activation=1e6), pipeline=2, microbatches=1)
    step = step_of(job)
    assert step.parts["stage transfers"] == pytest.approx(2 * (A + 1e6 * B))
    assert step.parts["bubble"] == pytest.approx(3e-3)
    assert step.seconds == pytest.approx(6e-3 + 2 * (A + 1e6 * B))


def test_tensor_parallel_layers_share_time_and_exchange_activations() -> None:
    job = Job(layers=layers(3, activation=4e6), tensor=2, microbatches=5, algorithm="ring")
    step = step_of(job)
    assert step.parts["compute"] == pytest.approx(5 * 3 * 3e-3 / 2)
    assert step.parts["tensor all-reduce"] == pytest.approx(5 * 3 * 2 * ring(2, 4e6))


def test_groups_along_the_data_axis_share_the_nics() -> None:
    """Two stages on each node: both all-reduce their gradients at the same time."""
    job = Job(layers=layers(2), data=4, pipeline=2, bucket_bytes=BUCKET, algorithm="ring")
    network = network_of(8, ranks_per_node=2)
    sent = simulate_training(job, network).buckets[0]
    assert sent.end - sent.begin == pytest.approx(6 * (A + BUCKET / 4 * 2 * B))


def test_a_straggler_computes_as_much_slower() -> None:
    job = Job(layers=layers(4, forward=0.1), data=2, algorithm="ring", bucket_bytes=BUCKET)
    step = step_of(job, stragglers={1: 3})
    assert step.parts["compute"] == pytest.approx(3 * 4 * 0.3)
    assert step.seconds == pytest.approx(3 * (4 * 0.3 + ring(2, BUCKET)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": layers(3), "pipeline": 4}, "3 layers cannot be split into 4 stages"),
        ({"layers": layers(3), "data": 0}, "data is 0"),
        ({"layers": layers(3), "compression": 2.0}, "a compression to 2"),
        ({"layers": layers(3), "microbatches": 0}, "0 microbatches"),
        ({"layers": layers(3), "schedule": "2f2b"}, "unknown pipeline schedule"),
        ({"layers": layers(4), "pipeline": 2, "chunks": 2}, "choose interleaved"),
    ],
)
def test_jobs_that_cannot_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Job(**wrong)


def test_a_layer_and_a_network_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match="layer x: forward is -1"):
        Layer(name="x", parameters=1, forward=-1, backward=0)
    with pytest.raises(ArgumentError, match="mesh has 1 ranks, and the network 2"):
        simulate_training(Job(layers=layers(1)), Network(size=2))
