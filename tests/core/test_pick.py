"""Which algorithm "auto" stands for."""

import pytest

from hvdkit.collectives.pick import (
    known_algorithms,
    pick,
    pick_across,
    pick_allreduce,
)
from hvdkit.errors import ArgumentError
from hvdkit.schedules.flights import LONGEST
from hvdkit.schedules.registry import ALGORITHMS
from hvdkit.tuning.estimates import Estimates

KIB, MIB = 1024, 1024 * 1024
KINDS = list(ALGORITHMS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nbytes", [0, 4, 64 * MIB])
def test_auto_takes_the_shared_memory_where_there_is_one(kind, nbytes):
    assert pick(kind, "auto", nbytes, no_arena="") == "shm"


@pytest.mark.parametrize(
    ("kind", "nbytes", "wanted"),
    [
        ("allreduce", 0, "recursive_doubling"),
        ("allreduce", 32 * KIB, "recursive_doubling"),
        ("allreduce", 32 * KIB + 1, "halving_doubling"),
        ("allreduce", 512 * KIB + 1, "ring"),
        ("allgather", 4, "bruck"),
        ("allgather", MIB, "ring"),
        ("reducescatter", 4, "recursive_halving"),
        ("reducescatter", MIB, "ring"),
        ("broadcast", 4, "binomial"),
        ("broadcast", MIB, "chain"),
        ("alltoall", 4, "pairwise"),
        ("alltoall", MIB, "pairwise"),
        ("barrier", 0, "dissemination"),
    ],
)
def test_auto_without_shared_memory(kind, nbytes, wanted):
    assert pick(kind, "auto", nbytes, no_arena="several nodes") == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [*range(0, 40, 3)])
def test_auto_is_always_a_schedule_that_there_is(kind, exponent):
    assert pick(kind, "auto", 2**exponent, no_arena="none") in ALGORITHMS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_for_is_taken(kind):
    for name in ("mpi", *ALGORITHMS[kind]):
        assert pick(kind, name, 4, no_arena="none") == name
    assert pick(kind, "shm", 4, no_arena="") == "shm"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rnig", "", "RING", None])
def test_an_unknown_name_lists_the_known_ones(kind, name):
    with pytest.raises(ArgumentError) as error:
        pick(kind, name, 4, no_arena="")
    reducing = ("gathered", "hierarchical") if kind == "allreduce" else ()
    known = ", ".join(("auto", "shm", "mpi", *reducing, *ALGORITHMS[kind]))
    assert str(error.value) == f"unknown {kind} algorithm {name!r}; known are {known}"
    assert ", ".join(known_algorithms(kind)) == known


def test_an_algorithm_of_another_collective_is_unknown():
    with pytest.raises(ArgumentError, match="unknown broadcast algorithm 'ring'"):
        pick("broadcast", "ring", 4, no_arena="")


def test_shared_memory_that_cannot_be_had_says_why():
    with pytest.raises(ArgumentError, match="'shm' cannot be had here: HVDKIT_SHM=0"):
        pick("allreduce", "shm", 4, no_arena="HVDKIT_SHM=0")


# All-reduce

ON_ONE_NODE = {"no_arena": "HVDKIT_SHM=0", "no_hierarchy": "the ranks are on one node"}
ON_SEVERAL = {"no_arena": "several nodes", "no_hierarchy": ""}


@pytest.mark.parametrize(
    ("nbytes", "size", "wanted"),
    [
        (0, 4, "gathered"),
        (64 * KIB, 2, "gathered"),
        (64 * KIB + 1, 2, "halving_doubling"),
        (16 * KIB, 4, "gathered"),
        (32 * KIB, 4, "recursive_doubling"),
        (128, 512, "gathered"),
        (129, 512, "recursive_doubling"),
        (MIB, 4, "ring"),
    ],
)
def test_auto_on_one_node_without_shared_memory(nbytes, size, wanted):
    assert pick_allreduce("auto", nbytes, size=size, **ON_ONE_NODE) == wanted


@pytest.mark.parametrize(
    ("nbytes", "size", "per_node", "wanted"),
    [
        (4, 4, 2, "hierarchical"),
        (64 * MIB, 3, 2, "hierarchical"),
        (12 * KIB, 2, 1, "gathered"),
        (12 * KIB + 1, 2, 1, "halving_doubling"),
        (4 * KIB, 3, 1, "gathered"),
        (8 * KIB, 3, 1, "all_pairs"),
        (64 * KIB, 9, 1, "all_pairs"),
        (64 * KIB, 10, 1, "halving_doubling"),
        (MIB, 2, 1, "halving_doubling"),
        (MIB, 3, 1, "ring"),
    ],
)
def test_auto_over_several_nodes(nbytes, size, per_node, wanted):
    assert pick_allreduce("auto", nbytes, size=size, per_node=per_node, **ON_SEVERAL) == wanted


def test_auto_all_reduces_in_the_shared_memory_where_there_is_one():
    on_one_node = {"no_arena": "", "no_hierarchy": "the ranks are on one node"}
    for nbytes in (0, 4, 64 * MIB):
        assert pick_allreduce("auto", nbytes, size=4, **on_one_node) == "shm"


def test_hierarchical_that_cannot_be_had_says_why():
    with pytest.raises(ArgumentError, match="'hierarchical' cannot be had here: the ranks are on"):
        pick_allreduce("hierarchical", 4, size=2, **ON_ONE_NODE)


def test_hierarchical_with_one_rank_a_node_is_flat():
    assert pick_allreduce("hierarchical", 4, size=4, per_node=1, **ON_SEVERAL) == "gathered"
    assert pick_allreduce("hierarchical", MIB, size=3, per_node=1, **ON_SEVERAL) == "ring"
    assert pick_allreduce("hierarchical", 4, size=4, per_node=2, **ON_SEVERAL) == "hierarchical"


def test_what_is_asked_for_is_taken_by_an_all_reduce():
    for name in ("mpi", "gathered", *ALGORITHMS["allreduce"]):
        assert pick_allreduce(name, MIB, size=4, per_node=2, **ON_SEVERAL) == name
    with pytest.raises(ArgumentError, match="'shm' cannot be had here: several nodes"):
        pick_allreduce("shm", 4, size=4, per_node=2, **ON_SEVERAL)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 12, 100])
def test_across_nodes_few_steps_for_few_bytes_and_few_bytes_for_many(size):
    assert pick_across(4, size) == "gathered"
    assert pick_across(LONGEST + 1, size) in ("ring", "halving_doubling")
    assert pick_across(1 << 30, size) == ("ring" if size & (size - 1) else "halving_doubling")


def test_across_nodes_a_ring_spares_what_folding_would_send_twice():
    assert pick_across(9 * KIB, 13) == "recursive_doubling"
    assert pick_across(256 * KIB, 3) == "ring"
    assert pick_across(33 * KIB, 16) == "halving_doubling"


def test_across_few_nodes_short_messages_wait_twice():
    """Where messages are in flight together: what is long, or cut, is the executor's."""
    for size in range(3, 10):
        assert pick_across(33 * KIB, size) == pick_across(LONGEST, size) == "all_pairs"
    assert pick_across(33 * KIB, 2) == "halving_doubling"
    cut = Estimates(None, 3, 1, usual_segment=KIB)
    assert pick_across(4 * KIB + 1, 3, cut) == "recursive_doubling"
    assert pick_across(64 * KIB, 3, cut) == "ring"
