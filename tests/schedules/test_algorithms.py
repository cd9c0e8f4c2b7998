"""Every algorithm is proved at every size, and costs what its formula says."""

from __future__ import annotations

import inspect
import math
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis.strategies import DataObject, data, floats, lists, sampled_from

from hvdkit.errors import ArgumentError
from hvdkit.schedules.cost import lower_bound
from hvdkit.schedules.double_tree import double_tree, double_tree_cost
from hvdkit.schedules.draw import draw_text
from hvdkit.schedules.registry import ALGORITHMS, Algorithm, get
from hvdkit.schedules.steps import Exchange, chunk_indices
from hvdkit.schedules.verify import verify

from .cases import EVERY, SIZES, chunk_counts, identify


@pytest.mark.parametrize("algorithm", EVERY, ids=identify)
def test_is_correct_and_costs_what_its_formula_says(algorithm: Algorithm) -> None:
    for size in SIZES:
        for chunks in chunk_counts(algorithm, size):
            report = verify(algorithm.steps, size, chunks, algorithm.collective)
            formula = algorithm.cost(size, chunks)
            measured = (report.rounds, Fraction(report.max_chunks_sent, chunks))
            assert measured == (formula.steps, formula.sent_fraction), (size, chunks)


@pytest.mark.parametrize("algorithm", EVERY, ids=identify)
def test_costs_no_less_than_the_lower_bound(algorithm: Algorithm) -> None:
    for size in SIZES:
        bound = lower_bound(algorithm.collective, size)
        for chunks in chunk_counts(algorithm, size):
            cost = algorithm.cost(size, chunks)
            assert cost.steps >= bound.steps, size
            assert cost.sent_fraction >= bound.sent_fraction, size


@pytest.mark.parametrize("algorithm", EVERY, ids=identify)
def test_one_rank_has_nothing_to_do(algorithm: Algorithm) -> None:
    for chunks in chunk_counts(algorithm, 1):
        assert list(algorithm.steps(0, 1, chunks)) == []


@pytest.mark.parametrize(
    "name", ["tree", "double_tree", "recursive_doubling"], ids=lambda name: f"allreduce-{name}"
)
@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 8])
def test_algorithms_that_fix_no_number_of_chunks_take_any(name: str, chunks: int) -> None:
    for size in SIZES:
        verify(get("allreduce", name).steps, size, chunks, "allreduce")


def test_the_optimal_ones_meet_their_bounds() -> None:
    for size in SIZES:
        for collective, name in [
            ("allreduce", "ring"),
            ("reducescatter", "ring"),
            ("allgather", "ring"),
            ("allgather", "bruck"),
            ("alltoall", "pairwise"),
        ]:
            cost = get(collective, name).cost(size, size)
            assert cost.sent_fraction == lower_bound(collective, size).sent_fraction
        for collective, name in [
            ("allgather", "bruck"),
            ("broadcast", "binomial"),
            ("barrier", "dissemination"),
        ]:
            cost = get(collective, name).cost(size, size)
            assert cost.steps == lower_bound(collective, size).steps


def test_the_double_trees_formula_holds_beyond_the_sizes_that_are_drawn() -> None:
    for size in (65, 100, 127, 128, 129, 130, 131, 200, 255, 256, 257, 1023, 1024, 1027):
        report = verify(double_tree, size, 4, "allreduce")
        assert report.rounds == double_tree_cost(size, 4).steps, size


def test_each_rank_is_an_inner_node_of_at_most_one_tree() -> None:
    for size in SIZES:
        for rank in range(1, size):
            reduced = [
                step.reduce for step in double_tree(rank, size, 2) if step.reduce is not None
            ]
            inner = {chunk for _, chunk in reduced}  # chunk 0 travels in tree 0, chunk 1 in tree 1
            assert len(inner) <= 1, (rank, size)


def play(algorithm: Algorithm, contributions: list[float]) -> list[list[float]]:
    """Run an all-reduce on numbers, every chunk alike: an executor that knows no symbols."""
    size = len(contributions)
    chunks = algorithm.chunks(size, 2)
    buffers = [[own] * chunks for own in contributions]
    running = {rank: algorithm.steps(rank, size, chunks) for rank in range(size)}
    waiting: dict[int, Exchange] = {}
    mail: dict[tuple[int, int], list[list[float]]] = {}
    while running:
        for rank, steps in list(running.items()):
            if rank not in waiting:
                step = next(steps, None)
                if step is None:
                    del running[rank]
                    continue
                if step.send is not None:
                    values = [buffers[rank][chunk] for chunk in chunk_indices(step.send[1])]
                    mail.setdefault((rank, step.send[0]), []).append(values)
                waiting[rank] = step
            receive = waiting[rank].receive
            if receive is None:
                del waiting[rank]
            elif mail.get((receive[0], rank)):
                arrived = mail[receive[0], rank].pop(0)
                for chunk, value in zip(chunk_indices(receive[1]), arrived, strict=True):
                    if waiting[rank].reduce is not None:
                        value += buffers[rank][chunk]  # noqa: PLW2901
                    buffers[rank][chunk] = value
                del waiting[rank]
    return buffers


@settings(deadline=None)  # a busy machine is not a failure
@given(data())
def test_every_rank_ends_with_bitwise_the_same_sum(draws: DataObject) -> None:
    algorithm = draws.draw(sampled_from([*ALGORITHMS["allreduce"].values()]))
    numbers = floats(-1e6, 1e6, allow_nan=False)
    contributions = draws.draw(lists(numbers, min_size=1, max_size=20))
    buffers = play(algorithm, contributions)
    bits = [[value.hex() for value in buffer] for buffer in buffers]
    assert all(rank_bits == bits[0] for rank_bits in bits)
    for value in buffers[0]:
        assert math.isclose(value, math.fsum(contributions), rel_tol=1e-9, abs_tol=1e-6)


def test_ring_of_four_is_the_papers_table() -> None:
    # Rows: ranks; columns: steps; "sends, receives".  First the reduce-scatter, then the
    # all-gather, as tabulated for four ranks wherever the ring all-reduce is explained.
    table = {
        0: ["0 3+", "3 2+", "2 1+", "1 0=", "0 3=", "3 2="],
        1: ["1 0+", "0 3+", "3 2+", "2 1=", "1 0=", "0 3="],
        2: ["2 1+", "1 0+", "0 3+", "3 2=", "2 1=", "1 0="],
        3: ["3 2+", "2 1+", "1 0+", "0 3=", "3 2=", "2 1="],
    }
    ring = get("allreduce", "ring").steps
    for rank, row in table.items():
        right, left = (rank + 1) % 4, (rank + 3) % 4
        expected = []
        for cell in row:
            sent, received = int(cell[0]), (left, int(cell[2]))
            if cell[3] == "+":
                expected.append(Exchange(send=(right, sent), reduce=received))
            else:
                expected.append(Exchange(send=(right, sent), store=received))
        assert list(ring(rank, 4, 4)) == expected


def test_halving_doubling_of_four_is_the_papers_table() -> None:
    # Rabenseifner's example, rank 1: halves with the far partner, quarters with the near one,
    # and the same back.
    steps = list(get("allreduce", "halving_doubling").steps(1, 4, 4))
    assert steps == [
        Exchange(send=(3, range(2, 4)), reduce=(3, range(2))),
        Exchange(send=(0, range(1)), reduce=(0, range(1, 2))),
        Exchange(send=(0, range(1, 2)), store=(0, range(1))),
        Exchange(send=(3, range(2)), store=(3, range(2, 4))),
    ]


def test_all_pairs_of_three_goes_straight() -> None:
    # Rank 1 sums chunk 1 of its neighbours', and tells both.
    assert list(get("allreduce", "all_pairs").steps(1, 3, 3)) == [
        Exchange(send=(2, 2), reduce=(0, 1)),
        Exchange(send=(0, 0), reduce=(2, 1)),
        Exchange(send=(2, 1), store=(0, 0)),
        Exchange(send=(0, 1), store=(2, 2)),
    ]


def test_bruck_of_five_is_the_papers_table() -> None:
    # Bruck et al.: blocks 1, 1, 2 to the left; the last step carries only what is missing.
    steps = list(get("allgather", "bruck").steps(3, 5, 5))
    assert steps == [
        Exchange(send=(2, (3,)), store=(4, (4,))),
        Exchange(send=(1, (3, 4)), store=(0, (0, 1))),
        Exchange(send=(4, (3,)), store=(2, (2,))),
    ]


def test_binomial_broadcast_of_eight_is_the_textbooks_tree() -> None:
    broadcast = get("broadcast", "binomial").steps
    children = {
        rank: [step.send[0] for step in broadcast(rank, 8, 1) if step.send is not None]
        for rank in range(8)
    }
    assert children == {0: [4, 2, 1], 1: [], 2: [3], 3: [], 4: [6, 5], 5: [], 6: [7], 7: []}


@pytest.mark.parametrize("algorithm", EVERY, ids=identify)
def test_the_trace_in_the_docstring_is_what_happens(algorithm: Algorithm) -> None:
    doc = inspect.getdoc(algorithm.steps) or ""
    found = re.search(r"p = (\d+)(?:, s = (\d+))?[^\n]*::\n\n", doc)
    assert found is not None
    segments = int(found[2]) if found[2] else None
    drawn = draw_text(algorithm, int(found[1]), segments=segments).split("\n\n")[1]
    assert inspect.cleandoc(doc[found.end() :]) == drawn


def test_registry_is_keyed_by_what_the_algorithms_say() -> None:
    assert sum(map(len, ALGORITHMS.values())) == 14
    for collective, by_name in ALGORITHMS.items():
        for name, algorithm in by_name.items():
            assert (algorithm.collective, algorithm.name) == (collective, name)
            assert algorithm.source
            assert algorithm.rooted == (collective == "broadcast")


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ArgumentError, match=r"'rign' for allgather; the known ones are ring, bruck$"
    ):
        get("allgather", "rign")
    with pytest.raises(ArgumentError, match=r"'gather'; .* are allreduce, .*, alltoall$"):
        verify(get("allgather", "ring").steps, 2, 2, "gather")
    with pytest.raises(ArgumentError, match="'gather'; the known ones are allreduce, allgather, "):
        get("gather", "ring")
