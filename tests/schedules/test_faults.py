"""Faults planted in every algorithm must be caught, and the message must say where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from hvdkit.errors import ScheduleError
from hvdkit.schedules.registry import Algorithm, get
from hvdkit.schedules.ring import ring_allreduce
from hvdkit.schedules.steps import Exchange
from hvdkit.schedules.verify import verify

from .cases import EVERY, identify, reduce, scripted, send, store, with_fault

SIZES = (2, 3, 4, 5, 7, 8)

# A fault in one rank's step is caught there, at its peer, or when the results are compared; every
# message says which rank, and the step or the chunk.
SAYS_WHERE = re.compile(
    r"rank \d+, step \d+: .|rank \d+ ends with chunk \d+ .|deadlock: .*\n  rank \d+, step \d+: ."
)


def assert_caught(algorithm: Algorithm, fault: str, applies: Callable[[Exchange], bool]) -> None:
    """Plant the fault in every step that it applies to, one at a time."""
    planted = 0
    for size in SIZES:
        chunks = algorithm.chunks(size, 2)
        for rank in range(size):
            for step, exchange in enumerate(algorithm.steps(rank, size, chunks)):
                if not applies(exchange):
                    continue
                planted += 1
                faulty = with_fault(algorithm.steps, rank, step, fault)
                try:
                    verify(faulty, size, chunks, algorithm.collective)
                except ScheduleError as exc:
                    assert SAYS_WHERE.match(str(exc)), str(exc)
                else:
                    pytest.fail(f"not caught: {fault}, rank {rank} of {size}, step {step}")
    assert planted


@pytest.mark.parametrize("fault", ["missing step", "step done twice", "next peer"])
@pytest.mark.parametrize("algorithm", EVERY, ids=identify)
def test_a_step_amiss(algorithm: Algorithm, fault: str) -> None:
    assert_caught(algorithm, fault, lambda _exchange: True)


@pytest.mark.parametrize("algorithm", [a for a in EVERY if a.chunks(2, 2) > 1], ids=identify)
def test_a_chunk_off_by_one(algorithm: Algorithm) -> None:
    assert_caught(algorithm, "next chunk", lambda _exchange: True)


@pytest.mark.parametrize(
    "algorithm",
    [a for a in EVERY if a.name in ("ring", "bruck", "pairwise", "dissemination", "chain")],
    ids=identify,
)
def test_swapped_peers(algorithm: Algorithm) -> None:
    def has_two_peers(exchange: Exchange) -> bool:
        send, receive = exchange.send, exchange.receive
        return send is not None and receive is not None and send[0] != receive[0]

    assert_caught(algorithm, "swapped peers", has_two_peers)


@pytest.mark.parametrize(
    "algorithm",
    [a for a in EVERY if a.collective in ("allreduce", "reducescatter", "barrier")],
    ids=identify,
)
def test_a_store_in_place_of_a_reduce(algorithm: Algorithm) -> None:
    assert_caught(
        algorithm, "store instead of reduce", lambda exchange: exchange.reduce is not None
    )


@pytest.mark.parametrize(
    "algorithm",
    [
        a
        for a in EVERY
        if (a.collective, a.name) not in (("reducescatter", "ring"), ("barrier", "dissemination"))
    ],
    ids=identify,
)
def test_a_reduce_in_place_of_a_store(algorithm: Algorithm) -> None:
    assert_caught(algorithm, "reduce instead of store", lambda exchange: exchange.store is not None)


# The same mistake on every rank: sends and receives still fit, so only the proof can tell.


def test_ring_with_every_chunk_of_the_all_gather_off_by_one() -> None:
    def steps(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
        right, left = (rank + 1) % size, (rank - 1) % size
        yield from list(ring_allreduce(rank, size, chunks))[: size - 1]
        for k in range(size - 1):
            yield Exchange(send=(right, (rank - k) % size), store=(left, (rank - k - 1) % size))

    for size in range(2, 9):
        with pytest.raises(ScheduleError, match=r"rank 0 ends with chunk \d+ \(.*without"):
            verify(steps, size, size, "allreduce")


def test_ring_that_stops_a_step_early() -> None:
    def steps(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
        yield from list(ring_allreduce(rank, size, chunks))[:-1]

    with pytest.raises(ScheduleError, match=r"rank 0 ends with chunk 2 .* without .* of rank"):
        verify(steps, 4, 4, "allreduce")


def test_ring_that_goes_a_step_too_far_reduces_twice() -> None:
    def steps(rank: int, size: int, _chunks: int) -> Iterator[Exchange]:
        right, left = (rank + 1) % size, (rank - 1) % size
        for k in range(size):
            yield Exchange(send=(right, (rank - k) % size), reduce=(left, (rank - k - 1) % size))
        for k in range(size - 1):
            yield Exchange(send=(right, (rank - k) % size), store=(left, (rank - k - 1) % size))

    with pytest.raises(
        ScheduleError,
        match=r"rank 0 ends with chunk 0 \(last written in its step \d\) "
        r"with the contribution of rank 0 more than once",
    ):
        verify(steps, 4, 4, "allreduce")


def test_recursive_doubling_at_the_same_distance_twice() -> None:
    def steps(rank: int, _size: int, _chunks: int) -> Iterator[Exchange]:
        yield Exchange(send=(rank ^ 1, 0), reduce=(rank ^ 1, 0))
        yield Exchange(send=(rank ^ 1, 0), reduce=(rank ^ 1, 0))

    message = r"^rank 0 ends with chunk 0 \(last written in its step 1\) without .* ranks 2-3$"
    with pytest.raises(ScheduleError, match=message):
        verify(steps, 4, 1, "allreduce")


def test_bruck_with_the_distance_off_by_one() -> None:
    def steps(rank: int, size: int, _chunks: int) -> Iterator[Exchange]:
        for distance in (1, 3):
            left, right = (rank - distance) % size, (rank + distance) % size
            mine = tuple((rank + i) % size for i in range(min(distance, size - distance)))
            theirs = tuple((right + i) % size for i in range(len(mine)))
            yield Exchange(send=(left, mine), store=(right, theirs))

    message = r"^rank \d, step 1: sends chunk \d to rank \d before it was written$"
    with pytest.raises(ScheduleError, match=message):
        verify(steps, 6, 6, "allgather")


def test_folding_that_forgets_to_hand_back() -> None:
    def steps(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
        every = list(get("allreduce", "recursive_doubling").steps(rank, size, chunks))
        yield from every[:-1] if rank in (0, 1) else every

    message = r"^rank 0 ends with chunk 0 \(as it was at the start\) without .* ranks 1-2$"
    with pytest.raises(ScheduleError, match=message):
        verify(steps, 3, 1, "allreduce")


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_send_before_receive_around_a_ring_deadlocks(size: int) -> None:
    def blocking(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
        for step in ring_allreduce(rank, size, chunks):
            yield Exchange(send=step.send)
            yield Exchange(reduce=step.reduce, store=step.store)

    with pytest.raises(ScheduleError) as caught:
        verify(blocking, size, size, "allreduce")
    message = str(caught.value)
    assert message.startswith("deadlock")
    for rank in range(size):
        assert f"rank {rank}, step 0: waits to send chunk {rank} to rank {(rank + 1) % size}" in (
            message
        )
    assert len(message.splitlines()) == 1 + size + 1  # the cycle, closed


def test_send_before_receive_is_no_deadlock_where_one_rank_receives_first() -> None:
    odd_even = scripted(
        [send(1, 0), reduce(1, 1), send(1, 1), store(1, 0)],
        [reduce(0, 0), send(0, 1), store(0, 1), send(0, 0)],
    )
    assert verify(odd_even, 2, 2, "allreduce").rounds == 4


# One of each kind, written out, with the whole message.


@pytest.mark.parametrize(
    ("by_rank", "chunks", "collective", "message"),
    [
        pytest.param(
            [[send(1, 1)], [store(0, 1)]],
            2,
            "allgather",
            "rank 0, step 0: sends chunk 1 to rank 1 before it was written",
            id="unwritten chunk sent",
        ),
        pytest.param(
            [[send(1, 0)], [reduce(0, 0)]],
            1,
            "broadcast",
            "rank 1, step 0: reduces into chunk 0 before it was written",
            id="unwritten chunk reduced into",
        ),
        pytest.param(
            [[send(1, 0)], []],
            1,
            "broadcast",
            "rank 0, step 0: waits to send chunk 0 to rank 1, but rank 1 has ended after 0 steps",
            id="send without receive",
        ),
        pytest.param(
            [[send(1, 0)], [store(0, 0), store(0, 0)]],
            1,
            "broadcast",
            "rank 1, step 1: waits to receive chunk 0 from rank 0, "
            "but rank 0 has ended after 1 step",
            id="receive without send",
        ),
        pytest.param(
            [[send(1, 0)], [store(0, 1)]],
            2,
            "broadcast",
            "rank 0, step 0: sends chunk 0 to rank 1, which in its step 0 receives chunk 1",
            id="other chunk",
        ),
        pytest.param(
            [[send(1, (0, 1))], [store(0, 0)]],
            2,
            "broadcast",
            "rank 0, step 0: sends chunks 0, 1 to rank 1, which in its step 0 receives chunk 0",
            id="other number of chunks",
        ),
        pytest.param(
            [[send(1, (1, 1))], [store(0, (0, 0))]],
            2,
            "broadcast",
            "rank 0, step 0: chunks 1, 1: a message carries distinct chunks",
            id="chunk twice in a message",
        ),
        pytest.param(
            [[send(1, ())], [store(0, ())]],
            2,
            "broadcast",
            "rank 0, step 0: a message carries no chunk",
            id="empty message",
        ),
        pytest.param(
            [[send(2, 0)], []],
            1,
            "broadcast",
            "rank 0, step 0: peer 2 is not among the ranks 0 to 1",
            id="peer out of range",
        ),
        pytest.param(
            [[], [store(-1, 0)]],
            1,
            "broadcast",
            "rank 1, step 0: peer -1 is not among the ranks 0 to 1",
            id="peer negative",
        ),
        pytest.param(
            [[], [send(1, 0)]],
            1,
            "broadcast",
            "rank 1, step 0: chunk 0 would go from the rank to itself",
            id="message to itself",
        ),
        pytest.param(
            [[send(1, 2)], [store(0, 2)]],
            2,
            "broadcast",
            "rank 0, step 0: chunk 2 is not among the chunks 0 to 1",
            id="chunk out of range",
        ),
        pytest.param(
            [
                [Exchange(send=(1, 0), store=(1, 0))],
                [Exchange(send=(0, 0), store=(0, 0))],
            ],
            1,
            "allreduce",
            "rank 0, step 0: stores chunk 0 while it is being sent",
            id="store over a send",
        ),
        pytest.param(
            [[send(1, 0)], [store(0, 0)]],
            2,
            "broadcast",
            "rank 1 ends with chunk 1 (as it was at the start) never written",
            id="never written",
        ),
        pytest.param(
            [
                [Exchange(send=(1, 0), store=(1, 1))],
                [Exchange(send=(0, 1), reduce=(0, 0))],
            ],
            2,
            "reducescatter",
            "rank 0 ends with chunk 0 (as it was at the start) without the contribution of rank 1",
            id="chunk to the wrong rank",
        ),
        pytest.param(
            [
                [Exchange(send=(1, 1), reduce=(1, 0))],
                [Exchange(send=(0, 0), store=(0, 1))],
            ],
            2,
            "alltoall",
            "rank 0, step 0: an all-to-all has nothing to reduce",
            id="all-to-all reduces",
        ),
        pytest.param(
            [
                [Exchange(send=(1, 0), store=(1, 1))],
                [Exchange(send=(0, 0), store=(0, 0))],
            ],
            2,
            "alltoall",
            "rank 1, step 0: stores what rank 0 has for rank 0 as chunk 0; "
            "from that rank it wants chunk 1, to be stored as chunk 0",
            id="all-to-all sends its own chunk",
        ),
        pytest.param(
            [[send(1, 1)], [store(0, 0)]],
            2,
            "alltoall",
            "rank 0 ends with chunk 1 never written: nothing came from rank 1",
            id="all-to-all one way",
        ),
        pytest.param(
            [[], []],
            3,
            "reducescatter",
            "reducescatter has one chunk a rank: 2 ranks cannot have 3 chunks",
            id="number of chunks",
        ),
    ],
)
def test_the_message_says_where_and_what(
    by_rank: list[list[Exchange]], chunks: int, collective: str, message: str
) -> None:
    with pytest.raises(ScheduleError) as caught:
        verify(scripted(*by_rank), len(by_rank), chunks, collective)
    assert str(caught.value) == message


def test_ranks_that_add_in_different_orders_are_told_apart() -> None:
    # Every rank ends with every contribution exactly once: rank 1 with (0 + 1) + 2, the others
    # with 0 + (1 + 2), which rounds differently.
    steps = scripted(
        [send(1, 0), Exchange(send=(2, 0), reduce=(2, 0))],
        [Exchange(send=(2, 0), reduce=(0, 0)), reduce(2, 0)],
        [Exchange(send=(1, 0), reduce=(1, 0)), Exchange(send=(0, 0), reduce=(0, 0))],
    )
    with pytest.raises(ScheduleError) as caught:
        verify(steps, 3, 1, "allreduce")
    assert str(caught.value) == (
        "rank 1 ends with chunk 0 (last written in its step 1) "
        "combined in another order than on rank 0"
    )


def test_a_barrier_may_hear_of_a_rank_twice_but_not_never() -> None:
    dissemination = get("barrier", "dissemination").steps
    assert verify(dissemination, 3, 1, "barrier").rounds == 2

    def a_step_short(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
        yield from list(dissemination(rank, size, chunks))[:-1]

    with pytest.raises(ScheduleError, match=r"rank 0 ends with chunk 0 .* contribution of rank 1$"):
        verify(a_step_short, 3, 1, "barrier")


def test_a_send_reads_what_was_there_before_its_step() -> None:
    swap = scripted(
        [Exchange(send=(1, 0), reduce=(1, 0))],
        [Exchange(send=(0, 0), reduce=(0, 0))],
    )
    assert verify(swap, 2, 1, "allreduce").rounds == 1
