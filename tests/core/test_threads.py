"""The world of threads itself: what tests stand on must not hang or hide anything."""

import threading
import time

import numpy as np
import pytest

from hvdkit.transport.base import Backoff
from hvdkit.transport.threads import ThreadWorld

from .worlds import on_ranks


def array(*values):
    return np.array(values, np.uint8)


def test_results_come_in_rank_order():
    assert on_ranks(4, lambda t: (t.rank, t.size)) == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_a_message_arrives_whoever_comes_first():
    def body(t):
        data = array(7, 8, 9) if t.rank == 0 else np.zeros(3, np.uint8)
        for turn in range(4):
            if turn % 2 == t.rank:
                time.sleep(0.005)
            data += t.rank == 0
            request = t.isend(data, 1) if t.rank == 0 else t.irecv(data, 0)
            Backoff(0).wait(request)
            assert data.tolist() == [8 + turn, 9 + turn, 10 + turn]
            t.allgather_object(None)

    on_ranks(2, body)


def test_messages_of_a_pair_keep_their_order():
    def body(t):
        if t.rank == 0:
            requests = [t.isend(array(i), 1) for i in range(20)]
        else:
            landing = [np.zeros(1, np.uint8) for _ in range(20)]
            requests = [t.irecv(place, 0) for place in landing]
        for request in requests:
            Backoff(0).wait(request)
        return None if t.rank == 0 else [int(place[0]) for place in landing]

    assert on_ranks(2, body)[1] == list(range(20))


def test_a_rank_can_write_to_itself():
    def body(t):
        landing = np.zeros(2, np.uint8)
        receiving = t.irecv(landing, t.rank)
        assert t.isend(array(t.rank, 5), t.rank).Test()
        assert receiving.Test()
        assert landing.tolist() == [t.rank, 5]

    on_ranks(2, body)


def test_nothing_is_buffered():
    """A send is not complete before its receive has taken the data, however small it is."""

    def body(t):
        sending = t.isend(array(1), 1) if t.rank == 0 else None
        t.allgather_object(None)
        early = sending is not None and sending.Test()
        t.allgather_object(None)
        if t.rank == 1:
            t.irecv(np.zeros(1, np.uint8), 0)
        t.allgather_object(None)
        return early, sending is None or sending.Test()

    assert on_ranks(2, body) == [(False, True), (False, True)]


def test_control_data():
    def body(t):
        assert t.allgather_object({"rank": t.rank}) == [{"rank": r} for r in range(3)]
        gathered = t.allgather_ints(np.array([t.rank, -1]))
        assert gathered.tolist() == [[0, -1], [1, -1], [2, -1]]
        return t.broadcast_object(t.rank * 10, 2)

    assert on_ranks(3, body) == [20, 20, 20]


@pytest.mark.parametrize("waiting_for", ["message", "board"])
def test_the_failure_of_one_rank_ends_the_others(waiting_for):
    """And is the error that the caller sees, not what it led to elsewhere."""
    ended = []

    def body(t):
        if t.rank == 1:
            time.sleep(0.02)
            raise KeyError("what really happened")
        try:
            if waiting_for == "message":
                Backoff(0).wait(t.irecv(np.zeros(1, np.uint8), 1))
            else:
                t.allgather_object(None)
        finally:
            ended.append(t.rank)

    began = time.monotonic()
    with pytest.raises(KeyError, match="what really happened"):
        on_ranks(3, body)
    assert time.monotonic() - began < 10
    assert sorted(ended) == [0, 2]


@pytest.mark.parametrize("waiting_for", ["message", "board"])
def test_an_interrupted_wait_ends_with_the_error_given(waiting_for):
    def body(t):
        if t.rank == 1:
            time.sleep(0.02)
            t.interrupt(ConnectionError("given up"))
            return
        with pytest.raises(ConnectionError, match="given up"):
            if waiting_for == "message":
                Backoff(0).wait(t.irecv(np.zeros(1, np.uint8), 1))
            else:
                t.allgather_object(None)

    on_ranks(3, body)


def test_messages_whose_coming_nobody_knew_of():
    def body(t):
        if t.rank:
            sending = [t.isend(array(*[t.rank * 10 + i] * (1 + i)), 0) for i in range(2)]
            t.allgather_object("sent")
            for request in sending:
                Backoff(0).wait(request)
            return None
        assert t.incoming() is None or t.incoming()[0] in (1, 2)
        t.allgather_object("sent")
        found = []
        while (coming := t.incoming()) is not None:
            source, nbytes = coming
            assert t.incoming() == coming, "it stays until it is received"
            landing = np.zeros(nbytes, np.uint8)
            assert t.irecv(landing, source).Test()
            found.append((source, landing.tolist()))
        return sorted(found)

    assert on_ranks(3, body)[0] == [(1, [10]), (1, [11, 11]), (2, [20]), (2, [21, 21])]


def test_a_length_that_does_not_match_is_an_error_with_both():
    def body(t):
        data = np.zeros(3 + t.rank, np.uint8)
        Backoff(0).wait(t.isend(data, 1) if t.rank == 0 else t.irecv(data, 0))

    with pytest.raises(RuntimeError, match="rank 0 sends 3 bytes to rank 1, which expects 4"):
        on_ranks(2, body)


def test_a_rank_that_never_comes_is_a_timeout_and_its_peers_end():
    before = threading.active_count()

    def body(t):
        if t.rank == 0:
            Backoff(0).wait(t.irecv(np.zeros(1, np.uint8), 1))

    with pytest.raises(TimeoutError, match="within"):
        ThreadWorld(2).run(body, timeout=0.1)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
