"""Steps in flight together need nothing of each other."""

from __future__ import annotations

import pytest

from hvdkit.schedules.all_pairs import all_pairs_flights
from hvdkit.schedules.flights import MOST_AT_ONCE, flights_of
from hvdkit.schedules.registry import Algorithm, get
from hvdkit.schedules.steps import Exchange, Transfer, chunk_indices

from .cases import EVERY, SIZES, chunk_counts, identify


def chunks(transfer: Transfer | None) -> set[int]:
    return set(chunk_indices(transfer[1])) if transfer else set()


@pytest.mark.parametrize("algorithm", EVERY, ids=identify)
def test_no_step_needs_what_is_in_flight_with_it(algorithm: Algorithm) -> None:
    for size in SIZES:
        for count in chunk_counts(algorithm, size):
            for rank in range(size):
                steps = list(algorithm.steps(rank, size, count))
                flights = flights_of(steps)
                assert [step for flight in flights for step in flight] == steps
                for flight in flights:
                    assert 1 <= len(flight) <= MOST_AT_ONCE
                    for half in ("send", "receive"):
                        peers = [way[0] for step in flight if (way := getattr(step, half))]
                        assert len(set(peers)) == len(peers)
                    for i, later in enumerate(flight):
                        for earlier in flight[:i]:
                            received = chunks(earlier.receive)
                            assert not received & chunks(later.send)
                            assert not received & chunks(later.store)
                            assert not chunks(earlier.send) & chunks(later.store)
                            assert not chunks(earlier.store) & chunks(later.reduce)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9, 10, 17, 18])
def test_all_pairs_waits_twice_among_few(size: int) -> None:
    steps = get("allreduce", "all_pairs").steps(0, size, size)
    assert len(flights_of(steps)) == all_pairs_flights(size)
    assert all_pairs_flights(size) == (
        0 if size == 1 else 2 if size <= 9 else 4 if size <= 17 else 6
    )


def test_a_ring_passes_on_what_has_come() -> None:
    assert len(flights_of(get("allreduce", "ring").steps(2, 5, 5))) == 8


def test_a_tree_hears_all_its_children_at_once_and_tells_them() -> None:
    assert [len(flight) for flight in flights_of(get("allreduce", "tree").steps(0, 8, 1))] == [3, 3]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Exchange(reduce=(1, 0)), Exchange(send=(2, 0))),
        (Exchange(store=(1, 0)), Exchange(send=(2, 0))),
        (Exchange(store=(1, 0)), Exchange(store=(2, 0))),
        (Exchange(reduce=(1, 0)), Exchange(store=(2, 0))),
        (Exchange(store=(1, 0)), Exchange(reduce=(2, 0))),
        (Exchange(send=(1, 0)), Exchange(store=(2, 0))),
        (Exchange(send=(1, 0)), Exchange(send=(1, 1))),
        (Exchange(store=(1, 0)), Exchange(reduce=(1, 1))),
    ],
)
def test_what_is_needed_is_waited_for(first: Exchange, second: Exchange) -> None:
    assert flights_of([first, second]) == [[first], [second]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Exchange(reduce=(1, 0)), Exchange(reduce=(2, 0))),
        (Exchange(send=(1, 0)), Exchange(send=(2, 0))),
        (Exchange(send=(1, 0)), Exchange(reduce=(2, 0))),
        (Exchange(store=(1, 0)), Exchange(store=(2, 1))),
    ],
)
def test_what_is_not_needed_is_not(first: Exchange, second: Exchange) -> None:
    assert flights_of([first, second]) == [[first, second]]
