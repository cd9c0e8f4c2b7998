"""Closed forms of time, against the schedules themselves."""

import math
from dataclasses import replace

import pytest

from hvdkit.errors import ArgumentError
from hvdkit.schedules.machine import Level, Machine
from hvdkit.schedules.registry import ALGORITHMS
from hvdkit.schedules.rendezvous import run
from hvdkit.schedules.timing import gathering_alphas, in_flights, message_seconds, predict

KIB, MIB = 1024, 1024 * 1024
ALPHA_ONLY = Level(1.0, 0.0, 0.0)
EVERY = [(kind, name) for kind, known in ALGORITHMS.items() for name in known]


def machine(level):
    return Machine(level, level)


def rounds(kind, name, size, segments):
    """Return how many rounds the schedule really takes."""
    known = ALGORITHMS[kind][name]
    chunks = known.chunks(size, segments)
    passed = run(known.steps, size, chunks, in_place=kind != "alltoall")
    return max((message.round for message in passed), default=0)


@pytest.mark.parametrize(("kind", "name"), EVERY)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 13, 16])
def test_alphas_are_the_rounds_that_the_schedule_takes(kind, name, size):
    pipelined = ALGORITHMS[kind][name].pipelined
    nbytes = 3 * KIB if pipelined else 1
    predicted = predict(kind, name, nbytes, size, machine=machine(ALPHA_ONLY), segment_bytes=KIB)
    assert predicted == rounds(kind, name, size, 3 if pipelined else 1)


@pytest.mark.parametrize(("kind", "name"), EVERY)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 13])
def test_betas_are_the_bytes_of_the_longest_path(kind, name, size):
    """A unit of time a byte: the messages of all ranks, played one after the other.

    With a number of ranks that is no power of two, not all have as much to do, and the closed forms
    take each step at its longest.
    """
    known = ALGORITHMS[kind][name]
    chunks = known.chunks(size, 2)
    nbytes = 12.0 * chunks
    free_at = [0.0] * size
    pending = {}
    for message in run(known.steps, size, chunks, in_place=kind != "alltoall"):
        pending.setdefault(message.round, []).append(message)
    for number in sorted(pending):
        before = list(free_at)
        for message in pending[number]:
            carried = len(message.sent) * nbytes / chunks
            end = max(before[message.source], before[message.destination]) + carried
            for rank in (message.source, message.destination):
                free_at[rank] = max(free_at[rank], end)
    level = Level(0.0, 1.0, 0.0)
    segment = math.ceil(nbytes / 2)
    predicted = predict(kind, name, nbytes, size, machine=machine(level), segment_bytes=segment)
    if kind == "barrier":
        assert predicted == 0
    else:
        assert predicted == pytest.approx(max(free_at), rel=0.35 if size & (size - 1) else 1e-9)


def test_a_message_in_segments_overlaps_its_reduction():
    slow_link = Level(1.0, 1.0, 0.5)
    # 4 segments of 10 bytes: each 11 on the way, 5 to reduce; only the last is waited for.
    assert message_seconds(40, slow_link, 10, reduces=True) == 4 * 11 + 5
    slow_sum = Level(1.0, 1.0, 2.0)
    assert message_seconds(40, slow_sum, 10, reduces=True) == 11 + 4 * 20
    assert message_seconds(40, slow_sum, 10, reduces=False) == 4 * 11
    assert message_seconds(45, slow_link, 10, reduces=True) == max(5 * 1 + 45, 49) + 2.5
    assert message_seconds(5, slow_link, 10, reduces=True) == 1 + 5 + 2.5
    assert message_seconds(0, slow_link, 10, reduces=True) == 1


TWO_LEVELS = Machine(within=Level(1.0, 0.0, 0.0), across=Level(100.0, 0.0, 0.0))
SHARED_LINK = Machine(within=Level(0.0, 0.0, 0.0), across=Level(0.0, 1.0, 0.0))


def test_a_ring_goes_as_slowly_as_its_slowest_link():
    assert predict("allreduce", "ring", 8, 8, ranks_per_node=4, machine=TWO_LEVELS) == 1400
    assert predict("allreduce", "ring", 8, 8, ranks_per_node=8, machine=TWO_LEVELS) == 14


def test_doubling_stays_within_the_nodes_as_long_as_it_can():
    how = {"ranks_per_node": 4, "machine": TWO_LEVELS}
    assert predict("allreduce", "recursive_doubling", 8, 8, **how) == 1 + 1 + 100


def test_ranks_of_a_node_share_its_link():
    how = {"ranks_per_node": 4, "machine": SHARED_LINK}
    assert predict("allreduce", "recursive_doubling", 8, 8, **how) == 4 * 8
    assert predict("allreduce", "ring", 8, 8, **how) == 14
    assert predict("allreduce", "tree", 8, 8, **how) == 16


def test_hierarchical_sends_less_between_nodes_than_any_flat_one():
    how = {"ranks_per_node": 4, "machine": SHARED_LINK}
    nested = predict("allreduce", "hierarchical", 64, 8, **how)
    assert nested == 64
    for name in ALGORITHMS["allreduce"]:
        assert predict("allreduce", name, 64, 8, segment_bytes=64, **how) >= nested


def test_gathered_over_nodes_crosses_once_for_all_of_a_node():
    """Two nodes of four: a round in each node's memory, one across, and another in memory."""
    how = {"ranks_per_node": 4}
    assert predict("allreduce", "gathered", 8, 8, machine=TWO_LEVELS, **how) == 102
    assert predict("allreduce", "gathered", 8, 8, machine=SHARED_LINK, **how) == 32
    without_memory = predict("allreduce", "gathered", 8, 8, machine=TWO_LEVELS, nested=False, **how)
    assert without_memory == pytest.approx(100 + 6 * 10), "one wait, six messages beside"


@pytest.mark.parametrize(("size", "waits"), [(2, 1.0), (3, 1.5), (8, 4.0), (9, 4.0), (16, 4.0)])
def test_few_ranks_gather_straight_from_each_other(size, waits):
    """One wait, and half of a message for each beside it; more than eight ranks, by Bruck's."""
    alphas = machine(replace(ALPHA_ONLY, at_once=0.5))
    assert predict("allreduce", "gathered", 8, size, machine=alphas) == pytest.approx(waits)
    assert gathering_alphas(size, 0.5) == waits
    bytes_alone = machine(Level(0.0, 1.0, 0.0))
    assert predict("allreduce", "gathered", 8, size, machine=bytes_alone) == 8 * (size - 1)


def test_all_pairs_wait_twice_and_for_a_share_of_each_message_beside_another():
    for at_once, waits in [(0.0, 2.0), (0.5, 4.0), (1.0, 6.0)]:
        seen = in_flights(machine(replace(ALPHA_ONLY, at_once=at_once)), 4)
        assert predict("allreduce", "all_pairs", 8, 4, machine=seen) == pytest.approx(waits)


def test_shared_memory_takes_two_rounds():
    assert predict("allreduce", "shm", 8, 4, machine=machine(Level(1.0, 0.0, 0.0))) == 2
    assert predict("allreduce", "shm", 8, 4, machine=machine(Level(0.0, 1.0, 0.0))) == 12


@pytest.mark.parametrize(
    ("kind", "name"), [("allreduce", "mpi"), ("broadcast", "ring"), ("nothing", "shm")]
)
def test_what_has_no_formula(kind, name):
    with pytest.raises(ArgumentError, match=f"no formula for the time of {kind} by '{name}'"):
        predict(kind, name, 4, 2)
