"""All-gathers over sockets that were prepared, among messages that have other ways."""

import time
from itertools import product

import numpy as np
import pytest

from hvdkit.errors import PeerError
from hvdkit.native import why_unavailable
from hvdkit.transport.base import Part
from hvdkit.transport.tcp import swap
from hvdkit.transport.tcp.swap import Swap

from .tcp_worlds import on_tcp_ranks, vanish

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

KIB = 1024


def prepared(t, length):
    rows = np.zeros((t.size, length), np.int64)
    return rows, t.prepare_allgather(rows)


def swapped(t, rows, made, turn):
    """Exchange rows that tell whose they are, and in which turn; return whether all are right."""
    length = rows.shape[1]
    rows[:] = -1
    rows[t.rank] = np.arange(length) + 1000 * t.rank + turn
    made.run()
    wanted = np.arange(length) + 1000 * np.arange(t.size)[:, None] + turn
    return bool((rows == wanted).all())


@pytest.mark.parametrize(
    ("size", "length"),
    [*product([2, 3, 4], [1, 9, 4 * KIB, 512 * KIB]), *product([5, 8], [1, 9, 4 * KIB])],
)
@pytest.mark.parametrize("spin", [0, 2000])
def test_rows_are_exchanged_again_and_again(size, length, spin):
    def body(t):
        t.backoff.spin = spin
        rows, made = prepared(t, length)
        assert isinstance(made, Swap)
        return all(swapped(t, rows, made, turn) for turn in range(20))

    assert all(on_tcp_ranks(size, body))


@pytest.mark.parametrize("looks", [0, 500])
def test_messages_of_others_may_come_first_and_in_between(looks, monkeypatch):
    """What a look finds may be another channel's, whole or in part; nothing is lost of it."""
    monkeypatch.setattr(swap, "LOOKS", looks)

    def body(t):
        t.backoff.spin = 2000
        rows, made = prepared(t, 64)
        apart = t.duplicate()
        peer, rng = 1 - t.rank, np.random.default_rng(t.rank)
        theirs = np.random.default_rng(peer)
        for turn in range(200):
            mine = [rng.integers(0, 9, rng.integers(0, 5000)).astype(np.uint8) for _ in range(3)]
            sending = [apart.isend(data, peer) for data in mine]
            assert swapped(t, rows, made, turn)
            for _ in range(3):
                length = theirs.integers(0, 5000)
                wanted = theirs.integers(0, 9, length).astype(np.uint8)
                landing = np.empty(length, np.uint8)
                apart.backoff.wait(apart.irecv(landing, peer))
                assert (landing == wanted).all()
            for request in sending:
                t.backoff.wait(request)

    on_tcp_ranks(2, body)


def test_a_message_larger_than_any_buffer_may_be_under_way():
    def body(t):
        rows, made = prepared(t, 300)
        large = np.full(32 << 20, t.rank, np.uint8)
        landing = np.empty_like(large)
        apart = t.duplicate()
        requests = [apart.irecv(landing, 1 - t.rank), apart.isend(large, 1 - t.rank)]
        assert all(swapped(t, rows, made, turn) for turn in range(5))
        for request in requests:
            apart.backoff.wait(request)
        assert (landing == 1 - t.rank).all()
        assert swapped(t, rows, made, 5)

    on_tcp_ranks(2, body)


def test_other_control_data_keep_their_order():
    def body(t):
        rows, made = prepared(t, 8)
        for turn in range(50):
            assert swapped(t, rows, made, turn)
            assert t.allgather_object((turn, t.rank)) == [(turn, rank) for rank in range(t.size)]
            assert t.allgather_ints(np.array([turn]))[:, 0].tolist() == [turn] * t.size

    on_tcp_ranks(3, body)


def test_a_rank_that_is_late_is_waited_for_and_one_that_is_lost_is_an_error():
    def body(t):
        rows, made = prepared(t, 8)
        if t.rank == 1:
            t.backoff.spin = 0
            assert swapped(t, rows, made, 0)
            vanish(t)
            return
        assert swapped(t, rows, made, 0)
        rows[t.rank] = 1
        with pytest.raises(PeerError, match="rank 1"):
            made.run()

    on_tcp_ranks(2, body)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("length", [0, 1, 100_000, 4_000_000])
@pytest.mark.parametrize("spin", [0, 2000])
def test_around_a_ring(size, length, spin):
    """What a rank sends goes to another rank than what it receives comes from."""

    def body(t):
        memory = np.zeros(2 * length, np.uint8)
        sends = [Part((t.rank + 1) % size, 0, length)]
        receives = [Part((t.rank - 1) % size, length, 2 * length)]
        t.backoff.spin = spin
        made = t.prepare_exchange(memory, sends, receives, t.backoff)
        assert isinstance(made, Swap)
        for turn in range(20):
            if turn % size == t.rank:
                time.sleep(0.002)
            memory[:length] = (t.rank + turn) % 256
            made.run()
            assert (memory[length:] == ((t.rank - 1) % size + turn) % 256).all()
        made.free()

    on_tcp_ranks(size, body)


def test_to_some_only():
    """A chain: the first only sends, the last only receives; and a rank with nothing to do."""

    def body(t):
        memory = np.full(8, t.rank, np.uint8)
        sends = [Part(t.rank + 1, 0, 4)] if t.rank < 2 else []
        receives = [Part(t.rank - 1, 4, 8)] if 0 < t.rank < 3 else []
        made = t.prepare_exchange(memory, sends, receives, t.backoff)
        for _ in range(10):
            made.run()
        return memory.tolist()

    assert on_tcp_ranks(4, body) == [
        [0] * 8,
        [1] * 4 + [0] * 4,
        [2] * 4 + [1] * 4,
        [3] * 8,
    ]


def test_several_parts_for_one_rank_arrive_in_order():
    def body(t):
        memory = np.arange(12, dtype=np.uint8) + 100 * t.rank
        sends = [Part(1 - t.rank, 0, 2), Part(1 - t.rank, 4, 8)]
        receives = [Part(1 - t.rank, 2, 4), Part(1 - t.rank, 8, 12)]
        made = t.prepare_exchange(memory, sends, receives, t.backoff)
        for _ in range(5):
            made.run()
        theirs = np.arange(12, dtype=np.uint8) + 100 * (1 - t.rank)
        assert (memory[2:4] == theirs[:2]).all()
        assert (memory[8:] == theirs[4:8]).all()

    on_tcp_ranks(2, body)


def test_many_ranks_have_another_way():
    def body(t):
        rows, made = prepared(t, 3)
        assert not isinstance(made, Swap)
        return swapped(t, rows, made, 0)

    assert all(on_tcp_ranks(9, body))
