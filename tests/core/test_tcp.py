"""Messages over TCP among ranks that are threads: right, in order, and without deadlock."""

import itertools
import threading
import time

import numpy as np
import pytest

from hvdkit.errors import HorovodInternalError, StallError
from hvdkit.transport.base import Backoff, Topology
from hvdkit.transport.tcp.link import STAGE_BYTES, TURN_BYTES

from .tcp_worlds import MemoryStore, connect, on_tcp_ranks

MIB = 1 << 20
LENGTHS = [0, 1, 15, 16, 17, STAGE_BYTES - 17, STAGE_BYTES - 16, STAGE_BYTES - 15, STAGE_BYTES]
LENGTHS += [STAGE_BYTES + 1, 212_991, 212_993, TURN_BYTES - 1, TURN_BYTES + 1, 9 * MIB + 7]


def array(*values):
    return np.array(values, np.uint8)


def noise(count, seed):
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


def test_a_world_of_one_needs_neither_store_nor_secret():
    t = connect(0, 1, None, secret=b"")
    landing = np.zeros(3, np.uint8)
    assert t.isend(array(1, 2, 3), 0).Test()
    assert t.incoming() == (0, 3)
    assert t.irecv(landing, 0).Test()
    assert landing.tolist() == [1, 2, 3]
    assert t.allgather_ints(np.array([7, 8])).tolist() == [[7, 8]]
    assert t.allgather_object("x") == ["x"]
    assert t.broadcast_object("y", 0) == "y"
    assert t.split_by_node()[1] == Topology(0, 1, 0, 1, 0, 1)
    t.duplicate().close()
    t.close()
    t.close()


@pytest.mark.parametrize("late", ["sender", "receiver"])
@pytest.mark.parametrize("wait", ["own", "plain"])
def test_messages_of_every_length_arrive_in_order(late, wait):
    def body(t):
        backoff = t.backoff if wait == "own" else Backoff(0)
        if t.rank == (late == "receiver"):
            time.sleep(0.1)
        if t.rank == 0:
            requests = [t.isend(noise(n, n), 1) for n in LENGTHS]
            for request in requests:
                backoff.wait(request)
            return
        landing = [np.zeros(n, np.uint8) for n in LENGTHS]
        requests = [t.irecv(place, 0) for place in landing]
        for request, place in zip(requests, landing, strict=True):
            backoff.wait(request)
            np.testing.assert_array_equal(place, noise(place.size, place.size))

    on_tcp_ranks(2, body)


def test_a_large_message_that_has_begun_to_arrive_goes_on_into_the_receivers_memory():
    def body(t):
        data = noise(64 * MIB, 1)
        if t.rank == 0:
            t.backoff.wait(t.isend(data, 1))
            return
        while t.incoming() is None:
            time.sleep(0.001)
        assert t.incoming() == (0, data.size)
        landing = np.zeros(data.size, np.uint8)
        t.backoff.wait(t.irecv(landing, 0))
        assert np.array_equal(landing, data)

    on_tcp_ranks(2, body)


def test_both_directions_at_once_do_not_deadlock():
    """A blocking send of each would, as soon as the sockets' buffers are full."""

    def body(t):
        peer = 1 - t.rank
        mine, theirs = noise(64 * MIB, t.rank), np.empty(64 * MIB, np.uint8)
        sending = t.isend(mine, peer)
        t.backoff.wait(sending)  # before the receive is even posted
        t.backoff.wait(t.irecv(theirs, peer))
        assert np.array_equal(theirs, noise(64 * MIB, peer))

    on_tcp_ranks(2, body)


def test_everyone_writes_to_everyone_and_to_itself():
    def body(t):
        peers = range(t.size)
        out = [noise(300_000 + p, 10 * t.rank + p) for p in peers]
        landing = [np.empty(300_000 + t.rank, np.uint8) for _ in peers]
        requests = [t.isend(out[p], p) for p in peers]
        requests += [t.irecv(landing[p], p) for p in peers]
        for request in requests:
            t.backoff.wait(request)
        for p in peers:
            assert np.array_equal(landing[p], noise(300_000 + t.rank, 10 * p + t.rank))

    on_tcp_ranks(5, body)


def test_messages_whose_coming_nobody_knew_of():
    def body(t):
        if t.rank:
            for i in range(2):
                t.isend(array(*[t.rank * 10 + i] * (1 + i)), 0)
            t.allgather_object("sent")
            return None
        t.allgather_object("sent")
        found = []
        while (coming := t.incoming()) is not None:
            source, nbytes = coming
            assert t.incoming() == coming, "it stays until it is received"
            landing = np.zeros(nbytes, np.uint8)
            t.backoff.wait(t.irecv(landing, source))
            found.append((source, landing.tolist()))
        return sorted(found)

    assert on_tcp_ranks(3, body)[0] == [(1, [10]), (1, [11, 11]), (2, [20]), (2, [21, 21])]


def test_what_is_sent_may_be_read_only():
    def body(t):
        if t.rank == 0:
            t.backoff.wait(t.isend(np.frombuffer(b"bytes", np.uint8), 1))
            return None
        landing = np.empty(5, np.uint8)
        t.backoff.wait(t.irecv(landing, 0))
        return landing.tobytes()

    assert on_tcp_ranks(2, body)[1] == b"bytes"


@pytest.mark.parametrize("first", ["send", "receive"])
def test_a_length_that_does_not_match_is_an_error_with_both(first):
    def body(t):
        if t.rank == 0:
            if first == "receive":
                t.allgather_object("posted")
            t.backoff.wait(t.isend(array(1, 2, 3), 1))
            if first == "send":
                t.allgather_object("sent")
            t.backoff.wait(t.isend(array(9), 1))
            return
        if first == "send":
            t.allgather_object("sent")
        wrong = t.irecv(np.zeros(4, np.uint8), 0)
        if first == "receive":
            t.allgather_object("posted")
        with pytest.raises(HorovodInternalError, match=r"rank 0 .* sends 3 bytes .* expects 4"):
            t.backoff.wait(wrong)
        landing = array(0)
        t.backoff.wait(t.irecv(landing, 0))
        assert landing.tolist() == [9], "the messages that follow are not touched"

    on_tcp_ranks(2, body)


# Control data


@pytest.mark.parametrize("size", [2, 3, 5, 8, 9, 10, 13, 16])
def test_control_data(size):
    def body(t):
        for length in (0, 1, 3):
            gathered = t.allgather_ints(np.arange(length) + 100 * t.rank)
            wanted = np.arange(length) + 100 * np.arange(size)[:, None]
            assert gathered.tolist() == wanted.tolist()
            assert gathered.dtype == np.int64
            gathered += 1  # the caller's own
        values = t.allgather_object({"rank": t.rank, "data": b"x" * (1000 * t.rank)})
        assert [(v["rank"], len(v["data"])) for v in values] == [(r, 1000 * r) for r in range(size)]
        for root in range(size):
            assert t.broadcast_object(("from", t.rank), root) == ("from", root)
        return t.broadcast_object(b"z" * (3 * MIB) if t.rank == 1 else None, 1)

    assert {len(x) for x in on_tcp_ranks(size, body)} == {3 * MIB}


def test_control_data_and_messages_do_not_meet():
    def body(t):
        peer = 1 - t.rank
        landing = array(0, 0)
        receiving = t.irecv(landing, peer)
        assert t.allgather_object(t.rank) == [0, 1]
        assert not receiving.Test()
        t.allgather_object(None)
        t.isend(array(5, 6), peer)
        assert t.broadcast_object("x" if t.rank == 0 else None, 0) == "x"
        t.backoff.wait(receiving)
        assert landing.tolist() == [5, 6]

    on_tcp_ranks(2, body)


# Several transports over the same links


def test_messages_with_a_tag_meet_no_others_and_leave_nothing_behind():
    """torch.distributed's are matched by tag, whatever the order in which they come."""

    def body(t):
        if t.rank == 0:
            sent = [t.tagged(tag).isend(array(tag), 1) for tag in range(200)] + [
                t.isend(array(9), 1)
            ]
            for request in sent:
                t.backoff.wait(request)
            return
        landing = np.zeros(1, np.uint8)
        t.backoff.wait(t.irecv(landing, 0))
        assert landing.tolist() == [9]
        assert t.tagged(7).incoming() == (0, 1)
        assert t.tagged(200).incoming() is None
        for tag in reversed(range(200)):
            t.backoff.wait(t.tagged(tag).irecv(landing, 0))
            assert landing.tolist() == [tag]
        assert not t._mesh._matching._inboxes

    on_tcp_ranks(2, body)


def test_two_sets_made_at_once_by_disjoint_ranks_do_not_clash():
    def body(t):
        mine = [0, 2] if t.rank % 2 == 0 else [1, 3]
        if t.rank % 2:
            t.subset([t.rank]).close()  # a history that the others do not have
        half = t.subset(reversed(mine))
        assert (half.rank, half.size) == (mine.index(t.rank), 2)
        assert half.allgather_object(t.rank) == mine
        again = t.subset(mine)
        again.isend(array(t.rank), 1 - again.rank)
        half.isend(array(100 + t.rank), 1 - half.rank)
        for transport, plus in ((half, 100), (again, 0)):
            landing = array(0)
            transport.backoff.wait(transport.irecv(landing, 1 - transport.rank))
            assert landing[0] == plus + mine[1 - transport.rank]
        overlapping = t.subset([0, 1, 2]) if t.rank < 3 else None
        if overlapping is not None:
            assert overlapping.allgather_object(t.rank) == [0, 1, 2]
            inner = overlapping.duplicate().subset([1, 2]) if t.rank else None
            if inner is not None:
                assert inner.allgather_object(t.rank) == [1, 2]

    on_tcp_ranks(4, body)


def test_a_message_may_come_before_its_transport_is_made():
    def body(t):
        if t.rank == 0:
            t.duplicate().isend(array(4), 1)
            t.allgather_object("sent")
            return
        t.allgather_object("sent")
        landing = array(0)
        other = t.duplicate()
        assert other.incoming() == (0, 1)
        other.backoff.wait(other.irecv(landing, 0))
        assert landing.tolist() == [4]

    on_tcp_ranks(2, body)


def test_what_comes_for_a_transport_that_was_closed_is_dropped():
    def body(t):
        other = t.duplicate()
        if t.rank == 1:
            given_up = other.irecv(array(0), 0)
            other.close()
            with pytest.raises(HorovodInternalError, match="given up"):
                t.backoff.wait(given_up)
        t.allgather_object("closed")
        if t.rank == 0:
            other.backoff.wait(other.isend(noise(MIB, 0), 1))
            other.close()
        t.allgather_object("sent")
        other = t.duplicate()
        assert other.allgather_object(t.rank) == [0, 1]
        assert other.incoming() is None

    on_tcp_ranks(2, body)


def test_nodes_are_told_apart():
    """Ranks 0, 1 and 3 on one, rank 2 on another; in the world, and in a part of it."""
    store, found = MemoryStore(), [None] * 4

    def rank(me):
        t = connect(me, 4, store, node="b" if me == 2 else "a")
        local, topology = t.split_by_node()
        part = t.subset([1, 2, 3]).split_by_node()[1] if me else None
        found[me] = (local.allgather_object(me), topology, part)
        t.close()

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = [[0, 1, 3], [0, 1, 3], [2], [0, 1, 3]]
    assert [f[0] for f in found] == together
    assert [f[1] for f in found] == [
        Topology(0, 4, 0, 3, 0, 2),
        Topology(1, 4, 1, 3, 0, 1),
        Topology(2, 4, 0, 1, 1, 2),
        Topology(3, 4, 2, 3, 0, 1),
    ]
    assert found[1][2] == Topology(0, 3, 0, 2, 0, 2)
    assert found[3][2] == Topology(2, 3, 1, 2, 0, 1)


def test_several_threads_each_with_a_transport_of_its_own():
    """More of them wait at a time than can sleep on the sockets; none may oversleep."""

    def body(t):
        transports = [t.duplicate() for _ in range(4)]
        wrong = []

        def exchange(number, mine):
            right, left = (t.rank + 1) % t.size, (t.rank - 1) % t.size
            for turn in range(40):
                length = (turn * 7919) % 50_000
                landing = np.zeros(length, np.uint8)
                receiving = mine.irecv(landing, left)
                sending = mine.isend(noise(length, [t.rank, number, turn]), right)
                mine.backoff.wait(receiving)
                mine.backoff.wait(sending)
                if not np.array_equal(landing, noise(length, [left, number, turn])):
                    wrong.append((number, turn))
                if turn % 10 == 0 and mine.allgather_object(turn) != [turn] * t.size:
                    wrong.append((number, "control"))

        threads = [
            threading.Thread(target=exchange, args=item, daemon=True)
            for item in enumerate(transports)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        return wrong

    assert on_tcp_ranks(3, body) == [[], [], []]


def test_a_thread_that_sleeps_for_others_does_not_delay_them():
    """Two threads wait; the message of the one that does not sleep on the sockets wakes it."""

    def body(t):
        one, two = t.duplicate(), t.duplicate()
        peer, ended = 1 - t.rank, []
        if t.rank == 0:
            t.allgather_object("waiting")
            for transport in (two, one):
                time.sleep(0.05)
                transport.isend(array(1), 1)
            return None

        def wait(transport):
            transport.backoff.wait(transport.irecv(array(0), peer))
            ended.append(transport)

        threads = [threading.Thread(target=wait, args=(x,), daemon=True) for x in (one, two)]
        for thread in threads:
            thread.start()
        t.allgather_object("waiting")
        for thread in threads:
            thread.join(20)
        return [ended.index(x) for x in (two, one)]

    assert on_tcp_ranks(2, body)[1] == [0, 1]


# Waiting


def test_who_waits_sleeps():
    def body(t):
        if t.rank == 0:
            began = time.thread_time()
            t.backoff.wait(t.irecv(array(0), 1))
            return time.thread_time() - began
        time.sleep(1.0)
        t.isend(array(1), 0)
        return None

    assert on_tcp_ranks(2, body)[0] < 0.2


@pytest.mark.parametrize("waiting_for", ["message", "control"])
def test_an_interrupted_wait_ends_with_the_error_given(waiting_for):
    def body(t):
        if t.rank == 0:
            threading.Timer(0.1, t.interrupt, [StallError("given up")]).start()
            with pytest.raises(StallError, match="given up"):
                if waiting_for == "message":
                    t.backoff.wait(t.irecv(array(0), 1))
                else:
                    t.allgather_object(None)
            assert bool(t.backoff.abandoned) == (waiting_for == "message")
        if t.rank == 1:
            time.sleep(0.3)

    on_tcp_ranks(2, body)


def test_a_wait_looks_and_yields_before_it_sleeps():
    awake = 10 + Backoff.YIELDS

    def body(t):
        backoff = t.new_backoff(10)
        looks = []

        class Request:
            def Test(self):  # noqa: N802
                looks.append(time.monotonic())
                return len(looks) == awake + 4

        backoff.wait(Request())
        return [b - a for a, b in itertools.pairwise(looks[awake:])]

    slept = on_tcp_ranks(1, body)[0]
    assert all(seconds > 0.01 for seconds in slept[1:])
