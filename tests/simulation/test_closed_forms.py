"""Simulated times are the closed forms, for every schedule on every topology that has one.

A, B, G: latency, seconds a byte, seconds to reduce a byte, between nodes; a, b, g: within a node.
p ranks on m nodes of k, messages of n bytes; q is the largest power of two that is at most p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, floor, log2

import pytest

from hvdkit.schedules.hierarchical import hierarchical
from hvdkit.schedules.machine import Level, Machine
from hvdkit.schedules.registry import ALGORITHMS
from hvdkit.simulation.collective import find, segments_of, simulate
from hvdkit.simulation.network import Network
from hvdkit.simulation.topologies import Crossbar, FatTree, SharedNic, Topology, Torus

A, B, G = 7e-6, 3e-9, 1e-9
a, b, g = 2e-6, 1e-10, 5e-11
MACHINE = Machine(within=Level(a, b, g), across=Level(A, B, G))
N = 1e6
WHOLE = 1e18  # segments longer than any message

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33)
EVERY = [(collective, name) for collective, known in ALGORITHMS.items() for name in known]


def network(
    size: int, per_node: int, topology: Topology, machine: Machine = MACHINE, **more: object
) -> Network:
    options = {"segment_bytes": WHOLE} | more
    return Network(
        size=size, ranks_per_node=per_node, machine=machine, topology=topology, **options
    )


def seconds(collective: str, name: str, on: Network, nbytes: float = N) -> float:
    outcome = simulate(name, nbytes, on, collective=collective)
    assert sum(outcome.parts.values()) == pytest.approx(outcome.seconds, rel=1e-9)
    assert outcome.least <= outcome.seconds * (1 + 1e-9)
    return outcome.seconds


def exactly(expected: float) -> object:
    return pytest.approx(expected, rel=1e-9, abs=1e-18)


def up(p: int) -> int:
    return ceil(log2(p))


def down(p: int) -> int:
    return floor(log2(p))


def folded(p: int) -> bool:
    return p != 1 << down(p)


def halved(p: int, n: float) -> float:
    q = 1 << down(p)
    shared = 2 * down(p) * A + (q - 1) / q * n * (2 * B + G)
    return shared + folded(p) * (2 * A + n * (2 * B + G))


CROSSBAR: dict[tuple[str, str], Callable[[int, float], float]] = {
    ("allreduce", "ring"): lambda p, n: (p - 1) * (2 * A + n / p * (2 * B + G)),
    ("allreduce", "tree"): lambda p, n: up(p) * (2 * A + n * (2 * B + G)),
    ("allreduce", "recursive_doubling"): lambda p, n: (
        down(p) * (A + n * (B + G)) + folded(p) * (2 * A + n * (2 * B + G))
    ),
    ("allreduce", "halving_doubling"): halved,
    ("allreduce", "all_pairs"): lambda p, n: (p - 1) * (2 * A + n / p * (2 * B + G)),
    ("allgather", "ring"): lambda p, n: (p - 1) * (A + n / p * B),
    ("allgather", "bruck"): lambda p, n: up(p) * A + (p - 1) / p * n * B,
    ("reducescatter", "ring"): lambda p, n: (p - 1) * (A + n / p * (B + G)),
    ("broadcast", "binomial"): lambda p, n: up(p) * (A + n * B),
    ("alltoall", "pairwise"): lambda p, n: (p - 1) * (A + n / p * B),
    ("barrier", "dissemination"): lambda p, n: up(p) * (A + n * (B + G)),
}


@pytest.mark.parametrize(("collective", "name"), CROSSBAR)
def test_nothing_shared(collective: str, name: str) -> None:
    for p in SIZES:
        expected = CROSSBAR[collective, name](p, N)
        assert seconds(collective, name, network(p, 1, Crossbar())) == exactly(expected), p


@pytest.mark.parametrize(("collective", "name"), CROSSBAR)
def test_one_rank_a_node_shares_no_nic(collective: str, name: str) -> None:
    for p in SIZES:
        expected = CROSSBAR[collective, name](p, N)
        assert seconds(collective, name, network(p, 1, SharedNic())) == exactly(expected), p


@pytest.mark.parametrize(("collective", "name"), EVERY)
def test_latency_alone_is_the_formulas_steps(collective: str, name: str) -> None:
    alone = Machine(within=Level(A, 0, 0), across=Level(A, 0, 0))
    for p in SIZES:
        on = network(p, 1, Crossbar(), alone, segment_bytes=N / 5)
        found = find(collective, name, on, 0)
        steps = found.cost(p, found.chunks(p, 5)).steps
        wanted = N if found.pipelined else 0  # one segment of a message that has no bytes
        assert seconds(collective, name, on, wanted) == exactly(steps * A), p


@pytest.mark.parametrize("segments", [1, 2, 8])
def test_pipelined_ones(segments: int) -> None:
    for p in SIZES[1:]:
        no_reduction = Machine(within=MACHINE.within, across=Level(A, B, 0))
        on = network(p, 1, Crossbar(), no_reduction, segment_bytes=N / segments)
        assert segments_of(N, on) == segments
        chain = (p - 2 + segments) * (A + N / segments * B)
        assert seconds("broadcast", "chain", on) == exactly(chain)
        steps = find("allreduce", "double_tree", on, N).cost(p, 2 * segments).steps
        tree = steps * (A + N / (2 * segments) * B)
        assert seconds("allreduce", "double_tree", on) == exactly(tree)


def test_recursive_halving() -> None:
    for p in (2, 4, 8, 32):
        expected = down(p) * A + (p - 1) / p * N * (B + G)
        on = network(p, 1, Crossbar())
        assert seconds("reducescatter", "recursive_halving", on) == exactly(expected)
    # Folded: rank 0 hands over all, rank 1 gets two chunks reduced by rank 2, rank 0 gets its own.
    expected = 3 * A + N * (B + G) + 2 * N / 3 * (B + G) + N / 3 * B
    on = network(3, 1, Crossbar())
    assert seconds("reducescatter", "recursive_halving", on) == exactly(expected)


NODES = [(2, 2), (4, 4), (8, 2), (2, 8), (4, 1), (3, 3), (5, 4)]


@pytest.mark.parametrize(("m", "k"), NODES)
def test_a_ring_leaves_each_node_once(m: int, k: int) -> None:
    p = m * k
    for topology in (Crossbar(), SharedNic(), FatTree(8, 1)):
        on = network(p, k, topology)
        expected = (p - 1) * (2 * A + N / p * (2 * B + G))
        assert seconds("allreduce", "ring", on) == exactly(expected)
    if k > 1:  # every message leaves its node, k at a time
        on = network(p, k, SharedNic(), placement="round-robin")
        expected = (p - 1) * (2 * A + N / p * (2 * k * B + G))
        assert seconds("allreduce", "ring", on) == exactly(expected)


@pytest.mark.parametrize(("m", "k"), [(2, 2), (4, 4), (8, 2), (2, 8), (4, 1)])
def test_doublings_share_nics_where_they_leave_nodes(m: int, k: int) -> None:
    p, on = m * k, network(m * k, k, SharedNic())
    doubling = log2(k) * (a + N * (b + g)) + log2(m) * (A + N * (k * B + G))
    assert seconds("allreduce", "recursive_doubling", on) == exactly(doubling)
    halving = 2 * log2(k) * a + (k - 1) / p * N * (2 * b + g)
    halving += 2 * log2(m) * A + (p - k) / p * N * (2 * k * B + G)
    assert seconds("allreduce", "halving_doubling", on) == exactly(halving)
    tree = log2(k) * (2 * a + N * (2 * b + g)) + log2(m) * (2 * A + N * (2 * B + G))
    assert seconds("allreduce", "tree", on) == exactly(tree)
    binomial = log2(k) * (a + N * b) + log2(m) * (A + N * B)
    assert seconds("broadcast", "binomial", on) == exactly(binomial)
    halving = log2(k) * a + (k - 1) / p * N * (b + g) + log2(m) * A + (p - k) / p * N * (k * B + G)
    assert seconds("reducescatter", "recursive_halving", on) == exactly(halving)


@pytest.mark.parametrize(("m", "k"), [(2, 2), (4, 4), (8, 2), (3, 3), (5, 4)])
def test_of_a_shift_by_d_as_many_leave_a_node(m: int, k: int) -> None:
    p, on = m * k, network(m * k, k, SharedNic())

    def leaving(d: int) -> int:
        return min(d, k, p - d)

    pairwise = sum(A + N / p * leaving(d) * B for d in range(1, p))
    assert seconds("alltoall", "pairwise", on) == exactly(pairwise)
    halves = sum(2 * A + N / p * (2 * leaving(d) * B + G) for d in range(1, p))
    assert seconds("allreduce", "all_pairs", on) == exactly(halves)
    distances = [1 << i for i in range(up(p))]
    bruck = sum(A + min(d, p - d) * N / p * leaving(d) * B for d in distances)
    assert seconds("allgather", "bruck", on) == exactly(bruck)
    tokens = sum(A + N * (leaving(d) * B + G) for d in distances)
    assert seconds("barrier", "dissemination", on) == exactly(tokens)


@pytest.mark.parametrize(("m", "k"), NODES)
@pytest.mark.parametrize("placement", ["block", "round-robin"])
def test_hierarchical(m: int, k: int, placement: str) -> None:
    on = network(m * k, k, SharedNic(), placement=placement)
    within = (k - 1) * (2 * a + N / k * (2 * b + g))
    ring = (m - 1) * (2 * A + N / (k * m) * (2 * k * B + G))
    assert seconds("allreduce", "hierarchical", on) == exactly(within + ring)
    tree = up(m) * (2 * A + N / k * (2 * k * B + G))
    assert seconds("allreduce", "hierarchical/tree", on) == exactly(within + tree)
    q = 1 << down(m)
    halving = 2 * down(m) * A + (q - 1) / q * N / k * (2 * k * B + G)
    halving += folded(m) * (2 * A + N / k * (2 * k * B + G))
    assert seconds("allreduce", "hierarchical/halving_doubling", on) == exactly(within + halving)


def test_hierarchical_with_a_last_node_that_has_fewer() -> None:
    """Nodes of 3, 3 and 2: two shards of n/2; in the full nodes chunk 2 is empty."""
    on = network(8, 3, SharedNic())
    across = 2 * (2 * A + N / 6 * (2 * 2 * B + G))
    within = 2 * (2 * a + N / 2 * (2 * b + g))
    assert seconds("allreduce", "hierarchical", on) == exactly(within + across)
    steps = Machine(within=Level(A, 0, 0), across=Level(A, 0, 0))
    algorithm = hierarchical(3)
    assert algorithm.chunks(8, 1) == 6
    assert seconds("allreduce", "hierarchical", replace(on, machine=steps), 0) == exactly(8 * A)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("leaves", [1, 2, 4])
def test_oversubscribed_leaves(k: int, leaves: int) -> None:
    """12 ports, 2 down for 1 up: 8 nodes a leaf, 4 uplinks."""
    tree, m = FatTree(radix=12, oversubscription=2), 8 * leaves
    assert (tree.down, tree.up) == (8, 4)
    on, p = network(m * k, k, tree, switch=1e-6), m * k
    switches = {True: 3e-6, False: 1e-6}

    def step(d: int, nbytes: float, *, reduces: bool) -> float:
        gamma = G * reduces
        if d < k:
            return a + nbytes * (b + g * reduces)
        far = d >= 8 * k
        return A + switches[far] + nbytes * (k * (8 / 4 if far else 1) * B + gamma)

    distances = [1 << i for i in range(down(p))]
    doubling = sum(step(d, N, reduces=True) for d in distances)
    assert seconds("allreduce", "recursive_doubling", on) == exactly(doubling)
    halving = sum(step(d, N * d / p, reduces=r) for d in distances for r in (True, False))
    assert seconds("allreduce", "halving_doubling", on) == exactly(halving)
    # A ring crosses from a leaf to the next on one uplink: only the switches are more.
    ring = (p - 1) * (2 * (A + switches[leaves > 1]) + N / p * (2 * B + G))
    assert seconds("allreduce", "ring", on) == exactly(ring)


@pytest.mark.parametrize("p", [2, 4, 8, 32])
def test_a_ring_of_nodes(p: int) -> None:
    on = network(p, 1, Torus((p,)), switch=1e-6)
    ring = (p - 1) * (2 * A + N / p * (2 * B + G))
    assert seconds("allreduce", "ring", on) == exactly(ring)
    # At distance d, the d messages up from an aligned block of 2d all pass its middle link.
    distances = [1 << i for i in range(down(p))]
    doubling = sum(A + (d - 1) * 1e-6 + N * (d * B + G) for d in distances)
    assert seconds("allreduce", "recursive_doubling", on) == exactly(doubling)


@pytest.mark.parametrize("rows", [2, 4, 8])
@pytest.mark.parametrize("columns", [2, 4, 8])
def test_a_torus(rows: int, columns: int) -> None:
    p = rows * columns
    on = network(p, 1, Torus((rows, columns)))
    # From the end of a row to the next row's begin: down, and around; nobody else goes there.
    ring = (p - 1) * (2 * A + N / p * (2 * B + G))
    assert seconds("allreduce", "ring", on) == exactly(ring)
    ways = [d if d < columns else d // columns for d in (1 << i for i in range(down(p)))]
    doubling = sum(A + N * (d * B + G) for d in ways)
    assert seconds("allreduce", "recursive_doubling", on) == exactly(doubling)


def test_a_torus_shared_by_the_ranks_of_its_nodes() -> None:
    on = network(32, 4, Torus((8,)), placement="round-robin")
    # Each node's four ranks send to the next node; from the last rank's node around to the first.
    ring = 31 * (2 * A + N / 32 * (2 * 4 * B + G))
    assert seconds("allreduce", "ring", on) == exactly(ring)


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
@pytest.mark.parametrize("gamma", [1e-9, 2e-8])
def test_a_segment_is_reduced_while_the_next_arrives(segments: int, gamma: float) -> None:
    s = N / segments
    machine = Machine(within=MACHINE.within, across=Level(A, B, gamma))
    on = network(2, 1, Crossbar(), machine, segment_bytes=s)
    link_bound = segments * (A + s * B) + s * gamma
    reduction_bound = A + s * B + segments * s * gamma
    expected = max(link_bound, reduction_bound)
    assert seconds("allreduce", "recursive_doubling", on) == exactly(expected)


def test_the_last_segment_may_be_shorter() -> None:
    on = network(2, 1, Crossbar(), segment_bytes=0.4 * N)
    expected = 3 * A + N * B + 0.2 * N * G
    assert seconds("allreduce", "recursive_doubling", on) == exactly(expected)
