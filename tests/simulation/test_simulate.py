"""Who is slow, what a time is made of, and numbers that make no sense."""

from __future__ import annotations

import numpy as np
import pytest

from hvdkit.errors import ArgumentError
from hvdkit.schedules.machine import Level, Machine
from hvdkit.simulation.collective import names, simulate
from hvdkit.simulation.network import Disturbance, Network
from hvdkit.simulation.topologies import Crossbar, FatTree, SharedNic, Torus, nearly_square

A, B, G = 7e-6, 3e-9, 1e-9
MACHINE = Machine(within=Level(2e-6, 1e-10, 5e-11), across=Level(A, B, G))
N = 1e5


def network(size: int, per_node: int = 1, topology: object = None) -> Network:
    return Network(
        size=size,
        ranks_per_node=per_node,
        machine=MACHINE,
        topology=Crossbar() if topology is None else topology,
    )


@pytest.mark.parametrize("straggler", [0, 3, 7])
def test_a_ring_goes_at_the_stragglers_pace(straggler: int) -> None:
    slow = simulate("ring", N, network(8), disturbance=Disturbance(stragglers={straggler: 2.5}))
    assert slow.seconds == pytest.approx(2.5 * 7 * (2 * A + N / 8 * (2 * B + G)), rel=1e-9)
    assert slow.parts["stragglers"] == pytest.approx(slow.seconds * 1.5 / 2.5, rel=1e-9)
    assert slow.bound_by == "stragglers"


def test_of_a_message_between_two_stragglers_the_slower_one_counts() -> None:
    both = Disturbance(stragglers={0: 2, 1: 3})
    slow = simulate("recursive_doubling", N, network(2), disturbance=both)
    assert slow.seconds == pytest.approx(3 * (A + N * (B + G)), rel=1e-9)


def test_jitter_is_drawn_from_the_seed() -> None:
    def played(jitter: float, seed: int = 0) -> float:
        disturbance = Disturbance(jitter=jitter, seed=seed)
        outcome = simulate("ring", N, network(16), disturbance=disturbance)
        assert sum(outcome.parts.values()) == pytest.approx(outcome.seconds, rel=1e-9)
        return outcome.seconds

    assert played(0.1, seed=1) == played(0.1, seed=1) != played(0.1, seed=2)
    assert played(0) < played(0.01) < played(0.5)


def test_one_message_is_late_by_the_jitter_on_the_average() -> None:
    late = [
        simulate(
            "binomial",
            N,
            network(2),
            collective="broadcast",
            disturbance=Disturbance(jitter=0.2, seed=seed),
        ).seconds
        for seed in range(500)
    ]
    assert np.mean(late) == pytest.approx(1.2 * (A + N * B), rel=0.05)


def test_what_bounds_it() -> None:
    assert simulate("ring", 1.0, network(64)).bound_by == "latency"
    assert simulate("ring", 1e9, network(8)).bound_by == "links between nodes"
    assert simulate("recursive_doubling", 1e9, network(8, 2, SharedNic())).bound_by == "NICs"
    tree = FatTree(radix=10, oversubscription=4)
    assert simulate("recursive_doubling", 1e9, network(64, 1, tree)).bound_by == "leaf uplinks"
    assert simulate("ring", 1e9, network(8, 1, Torus((2, 4)))).bound_by == "torus links"
    assert simulate("ring", 1e9, network(4, 4)).bound_by == "links within nodes"


def test_bus_bandwidth_and_the_lower_bound() -> None:
    outcome = simulate("ring", 1e9, network(8))
    assert outcome.busbw == pytest.approx(2 * 7 / 8 * 1e9 / outcome.seconds)
    assert outcome.least == pytest.approx(2 * 7 / 8 * 1e9 * B)
    shared = simulate("hierarchical", 1e9, network(8, 2, SharedNic()))
    assert shared.least == pytest.approx(2 * 3 / 4 * 1e9 * B)
    assert shared.times_least == pytest.approx(shared.seconds / shared.least)


@pytest.mark.parametrize("collective", ["allreduce", "allgather", "broadcast", "alltoall"])
@pytest.mark.parametrize("topology", [Crossbar(), SharedNic(), FatTree(8, 3), Torus((2, 3))])
def test_nothing_is_below_the_lower_bound(collective: str, topology: object) -> None:
    on = network(24, 4, topology)
    for name in names(collective, on):
        for nbytes in (0.0, 1.0, 1e4, 1e8):
            outcome = simulate(name, nbytes, on, collective=collective)
            assert outcome.seconds >= outcome.least * (1 - 1e-9), (name, nbytes)


def test_thousands_of_ranks() -> None:
    on = network(4096, 8, FatTree(32, 2))
    ring = simulate("ring", 1e8, on)
    assert ring.messages == 2 * 4095 * 4096
    assert ring.seconds == pytest.approx(4095 * (2 * A + 1e8 / 4096 * (2 * B + G)), rel=1e-9)
    some = {simulate(name, 1e8, on).seconds for name in names("allreduce", on)[1:]}
    assert len(some) == 11


def test_one_rank_has_nothing_to_do() -> None:
    for name in names("allreduce", network(1)):
        outcome = simulate(name, N, network(1))
        assert (outcome.seconds, outcome.least, outcome.messages) == (0, 0, 0)
        assert (outcome.bound_by, outcome.busbw, outcome.times_least) == ("", 0, 1)


def test_tori() -> None:
    assert nearly_square(12) == (3, 4)
    assert nearly_square(7) == (1, 7)
    # Up from 0 by 1 to 2, which shares its second link; down from 0 to 4; around from 4 to 0.
    load = Torus((5,)).load(np.array([0, 1, 0, 4]), np.array([2, 2, 4, 0]))
    assert load.slowdown.tolist() == [2, 2, 1, 1]
    assert load.switches.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: network(0), "size is 0"),
        (lambda: network(4, 0), "ranks_per_node is 0"),
        (lambda: network(8, 2, Torus((2, 3))), "a torus of 2x3 has 6 nodes, not 4"),
        (lambda: FatTree(8, 0.5), "oversubscription of 0.5"),
        (lambda: FatTree(1), "1 ports cannot have 1 links"),
        (lambda: Network(size=4, segment_bytes=0), "segments of 0 bytes"),
        (lambda: Network(size=4, switch=-1), "a switch takes -1 s"),
        (lambda: Network(size=4, placement="odd"), "unknown placement 'odd'"),
        (
            lambda: Network(size=5, ranks_per_node=2, placement="round-robin"),
            "5 ranks do not fill nodes of 2",
        ),
        (lambda: Disturbance(stragglers={1: 0.5}), "rank 1 is 0.5 times as slow"),
        (lambda: Disturbance(jitter=-1), "a jitter of -1"),
        (lambda: simulate("ring", -1, network(4)), "a message of -1 bytes"),
        (lambda: simulate("rings", 1, network(4)), "unknown algorithm 'rings'"),
        (lambda: simulate("hierarchical/rings", 1, network(4)), "unknown algorithm 'rings'"),
        (lambda: simulate("ring", 1, network(4), collective="all"), "unknown collective 'all'"),
        (
            lambda: simulate("ring", 1, network(4), disturbance=Disturbance(stragglers={4: 2})),
            "straggler 4 is not among the ranks 0 to 3",
        ),
    ],
)
def test_numbers_that_make_no_sense(wrong, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        wrong()
