"""Which algorithm "auto" stands for."""

import pytest

from hvdkit.collectives.pick import known_algorithms, pick
from hvdkit.errors import ArgumentError
from hvdkit.schedules.registry import ALGORITHMS

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
    known = ", ".join(("auto", "shm", "mpi", *ALGORITHMS[kind]))
    assert str(error.value) == f"unknown {kind} algorithm {name!r}; known are {known}"
    assert ", ".join(known_algorithms(kind)) == known


def test_an_algorithm_of_another_collective_is_unknown():
    with pytest.raises(ArgumentError, match="unknown broadcast algorithm 'ring'"):
        pick("broadcast", "ring", 4, no_arena="")


def test_shared_memory_that_cannot_be_had_says_why():
    with pytest.raises(ArgumentError, match="'shm' cannot be had here: HVDKIT_SHM=0"):
        pick("allreduce", "shm", 4, no_arena="HVDKIT_SHM=0")
