"""The rounds of all ranks are what the schedule's generator yields for each rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from hvdkit.errors import ScheduleError
from hvdkit.schedules.hierarchical import hierarchical
from hvdkit.schedules.registry import ALGORITHMS, Algorithm, get
from hvdkit.schedules.steps import Exchange, Schedule, chunk_indices
from hvdkit.simulation.evaluation import evaluate, takes_arrays
from hvdkit.simulation.expansion import expand
from hvdkit.simulation.rounds import Round
from hvdkit.simulation.unfolding import rounds

EVERY = [known for by_name in ALGORITHMS.values() for known in by_name.values()]
SIZES = (1, 2, 3, 4, 5, 7, 8, 12, 16, 31, 33)

#: Those whose generators do arithmetic alone: the others branch on their rank.
ARITHMETIC = {
    ("allreduce", "ring"),
    ("allreduce", "all_pairs"),
    ("allgather", "ring"),
    ("allgather", "bruck"),
    ("reducescatter", "ring"),
    ("alltoall", "pairwise"),
    ("barrier", "dissemination"),
}

#: What a rank does in one step: peer and chunks of what it sends; of what it receives, and whether
#: it reduces that.
Step = tuple[tuple[int, int] | None, tuple[int, int, bool] | None]


def identify(algorithm: Algorithm) -> str:
    return f"{algorithm.collective}-{algorithm.name}"


def generated(algorithm: Algorithm, rank: int, size: int, chunks: int) -> list[Step]:
    steps: list[Step] = []
    for step in algorithm.steps(rank, size, chunks):
        sent = received = None
        if step.send is not None:
            sent = step.send[0], len(chunk_indices(step.send[1]))
        if step.receive is not None:
            source, carried = step.receive
            received = source, len(chunk_indices(carried)), step.reduce is not None
        steps.append((sent, received))
    return steps


def played(some: Iterable[Round], size: int) -> list[list[Step]]:
    """Each rank's steps, put together again from the rounds of all."""
    steps: list[list[Step]] = [[] for _ in range(size)]
    for each in some:
        for rank in each.entering.tolist():
            steps[rank].append((None, None))
        shape = each.pairs.source.shape
        columns = (
            each.pairs.source,
            each.pairs.destination,
            np.broadcast_to(each.units, shape),
            np.broadcast_to(each.reduces, shape),
        )
        for source, destination, units, reduces in zip(*(c.tolist() for c in columns), strict=True):
            assert steps[source][-1][0] is None
            assert steps[destination][-1][1] is None
            steps[source][-1] = (destination, units), steps[source][-1][1]
            steps[destination][-1] = steps[destination][-1][0], (source, units, reduces)
    return steps


@pytest.mark.parametrize("algorithm", EVERY, ids=identify)
@pytest.mark.parametrize("segments", [1, 2, 5])
def test_the_rounds_of_all_are_the_steps_of_each(algorithm: Algorithm, segments: int) -> None:
    for size in SIZES:
        chunks = algorithm.chunks(size, segments)
        together = played(rounds(algorithm, size, chunks), size)
        for rank in range(size):
            assert together[rank] == generated(algorithm, rank, size, chunks), (size, rank)


@pytest.mark.parametrize("across", ["ring", "tree", "double_tree", "halving_doubling"])
@pytest.mark.parametrize("per_node", [1, 2, 3, 4, 16])
def test_phases_of_groups_are_the_steps_of_each(across: str, per_node: int) -> None:
    algorithm = hierarchical(per_node, across, segments=2)
    for size in (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 18):
        chunks = algorithm.chunks(size, 1)
        together = played(rounds(algorithm, size, chunks), size)
        for rank in range(size):
            assert together[rank] == generated(algorithm, rank, size, chunks), (size, rank)


@pytest.mark.parametrize("algorithm", EVERY, ids=identify)
def test_arithmetic_is_done_for_all_ranks_at_once(algorithm: Algorithm) -> None:
    key = algorithm.collective, algorithm.name
    for size in (7, 16):
        chunks = algorithm.chunks(size, 2)
        assert takes_arrays(algorithm.steps, size, chunks) == (key in ARITHMETIC)
        if key in ARITHMETIC:
            vector = played(evaluate(algorithm.steps, size, chunks, chunks), size)
            assert vector == played(expand(algorithm.steps, size, chunks, chunks), size)


def test_what_goes_wrong_for_arrays_alone_is_not_taken_from_them() -> None:
    def other_for_arrays(rank: int, size: int, _chunks: int) -> Iterator[Exchange]:
        shift = 1 if isinstance(rank, int) else 2
        right, left = (rank + shift) % size, (rank - shift) % size
        yield Exchange(send=(right, 0), reduce=(left, 0))

    assert not takes_arrays(other_for_arrays, 5, 1)
    (only,) = expand(other_for_arrays, 5, 1, 1)
    assert ((only.pairs.source + 1) % 5 == only.pairs.destination).all()


def test_empty_chunks_do_not_travel() -> None:
    ring = get("reducescatter", "ring")
    sent = list(evaluate(ring.steps, 4, 4, 2))
    assert [len(some.pairs.source) for some in sent] == [2, 2, 2]
    assert played(sent, 4) == played(expand(ring.steps, 4, 4, 2), 4)


def scripted(*by_rank: list[Exchange]) -> Schedule:
    return lambda rank, _size, _chunks: iter(by_rank[rank])


def test_a_deadlock_and_a_message_without_receiver_are_errors() -> None:
    cycle = scripted(
        [Exchange(store=(1, 0)), Exchange(send=(1, 0))],
        [Exchange(store=(0, 0)), Exchange(send=(0, 0))],
    )
    with pytest.raises(ScheduleError, match="2 of 2 messages never pass"):
        expand(cycle, 2, 1, 1)
    with pytest.raises(ScheduleError, match="do not match"):
        expand(scripted([Exchange(send=(1, 0))], []), 2, 1, 1)
