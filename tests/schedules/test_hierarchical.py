"""The hierarchical all-reduce, proved for all that a few nodes can look like."""

import inspect

import pytest

from hvdkit.errors import ArgumentError, ScheduleError
from hvdkit.schedules.cost import lower_bound
from hvdkit.schedules.draw import draw_text
from hvdkit.schedules.hierarchical import (
    hierarchical,
    hierarchical_allreduce,
    hierarchical_chunks,
    hierarchical_cost,
)
from hvdkit.schedules.registry import ALGORITHMS
from hvdkit.schedules.ring import ring_allreduce
from hvdkit.schedules.verify import trace, verify

from .cases import with_fault

SIZES = range(1, 17)
PER_NODE = (1, 2, 3, 4)


def proved(size, per_node):
    return verify(
        hierarchical(per_node).steps, size, hierarchical_chunks(size, per_node), "allreduce"
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("per_node", [*PER_NODE, 16])
def test_every_rank_ends_with_every_contribution_once(size, per_node):
    proved(size, per_node)


@pytest.mark.parametrize("per_node", PER_NODE)
@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_full_nodes_cost_what_the_formula_says(nodes, per_node):
    size = nodes * per_node
    report, cost = proved(size, per_node), hierarchical_cost(size, per_node)
    chunks = hierarchical_chunks(size, per_node)
    assert report.rounds == cost.steps
    assert report.max_chunks_sent == cost.sent_fraction * chunks
    assert cost.sent_fraction == lower_bound("allreduce", size).sent_fraction


@pytest.mark.parametrize("across", ALGORITHMS["allreduce"])
@pytest.mark.parametrize("per_node", PER_NODE)
@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
def test_any_all_reduce_may_go_across(across, nodes, per_node):
    size = nodes * per_node
    algorithm = hierarchical(per_node, across, segments=2)
    chunks = algorithm.chunks(size, 1)
    report = verify(algorithm.steps, size, chunks, "allreduce")
    assert report.rounds == algorithm.cost(size, chunks).steps
    if size > 1:
        verify(algorithm.steps, size - 1, algorithm.chunks(size - 1, 1), "allreduce")


@pytest.mark.parametrize(("size", "per_node"), [(4, 2), (12, 4), (8, 3), (7, 2), (16, 4), (9, 4)])
def test_only_shards_leave_a_node(size, per_node):
    """A node of a full hierarchy sends 2n(m-1)/m, the bound for whatever happens within nodes."""
    nodes, chunks = -(-size // per_node), hierarchical_chunks(size, per_node)
    _, messages = trace(hierarchical(per_node).steps, size, chunks, "allreduce")
    for node in range(nodes):
        leaving = sum(
            len(message.sent)
            for message in messages
            if message.source // per_node == node != message.destination // per_node
        )
        assert leaving * nodes == 2 * (nodes - 1) * chunks


def test_one_rank_a_node_is_the_ring_across_and_one_node_has_none():
    for size in SIZES:
        for rank in range(size):
            flat = list(ring_allreduce(rank, size, size))
            assert list(hierarchical_allreduce(rank, size, 1)) == flat
            assert len(list(hierarchical_allreduce(rank, size, size))) == 2 * (size - 1)


def test_the_trace_in_the_docstring_is_what_happens():
    doc = inspect.getdoc(hierarchical_allreduce)
    drawn = draw_text(hierarchical(2), 4).split("\n\n")[1]
    assert inspect.cleandoc(doc[doc.index("::\n\n") + 4 :]) == drawn


def test_the_formula_is_for_full_nodes():
    with pytest.raises(ArgumentError, match="7 ranks do not fill nodes of 2"):
        hierarchical_cost(7, 2)


@pytest.mark.parametrize("fault", ["missing step", "step done twice", "next chunk", "next peer"])
@pytest.mark.parametrize("step", range(4))
def test_a_fault_in_any_phase_is_found(step, fault):
    with pytest.raises(ScheduleError):
        verify(with_fault(hierarchical(2).steps, 1, step, fault), 4, 4, "allreduce")
