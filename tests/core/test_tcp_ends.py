"""How ranks over TCP end: lost, orderly, by abort; each is known to all others."""

import errno
import os
import signal
import socket
import threading
import time

import numpy as np
import pytest

from hvdkit.errors import PeerError
from hvdkit.transport.tcp import link
from hvdkit.transport.tcp.link import HEADER, Link, silence_of

from .tcp_worlds import finish, on_tcp_ranks, processes, vanish
from .worlds import SECONDS

MIB = 1 << 20


def array(*values):
    return np.array(values, np.uint8)


@pytest.mark.parametrize("doing", ["receive", "send", "control", "other", "look", "subset"])
def test_a_lost_peer_is_an_error_of_everything_that_waits_and_of_what_comes_later(doing):
    """Also of what waits for another rank: that one is about to fail as well."""

    def body(t):
        part = t.subset([0, 1]) if t.rank < 2 else None
        t.allgather_object("connected")
        if t.rank == 2:
            for peer in (0, 1):
                t.backoff.wait(t.irecv(array(0), peer))
            return vanish(t)
        t.isend(array(1), 2)
        with pytest.raises(PeerError, match=rf"rank 2 on {socket.gethostname()} is lost: \w"):
            if doing == "receive":
                t.backoff.wait(t.irecv(array(0), 2))
            elif doing == "send":
                while True:
                    t.backoff.wait(t.isend(np.zeros(MIB, np.uint8), 2))
            elif doing == "control":
                t.allgather_object(None)
            elif doing == "other":
                t.backoff.wait(t.irecv(array(0), 1 - t.rank))
            elif doing == "subset":
                part.backoff.wait(part.irecv(array(0), 1 - t.rank))
            else:
                while t.incoming() is None:
                    time.sleep(0.001)
        for later in (t.isend(array(1), 2), t.irecv(array(0), 1 - t.rank)):
            with pytest.raises(PeerError, match="rank 2"):
                t.backoff.wait(later)
        with pytest.raises(PeerError, match="rank 2"):
            t.duplicate().allgather_ints(np.arange(1))
        return None

    began = time.monotonic()
    on_tcp_ranks(3, body)
    assert time.monotonic() - began < 20


def test_who_finds_out_that_a_peer_is_silent_makes_no_difference():
    """The kernel's keepalive has its limit from HVDKIT_PEER_TIMEOUT."""

    def body(t):
        t.allgather_object("connected")
        if t.rank == 0:
            with t._mesh.lock:
                t._mesh._lose(t._mesh._links[1], OSError(errno.ETIMEDOUT, "Connection timed out"))
            with pytest.raises(PeerError, match=r"has not answered .* \(HVDKIT_PEER_TIMEOUT\)"):
                t.backoff.wait(t.irecv(array(0), 1))
        else:
            with pytest.raises(PeerError):
                t.backoff.wait(t.irecv(array(0), 0))

    on_tcp_ranks(2, body)


def test_who_ends_because_a_peer_is_lost_says_which():
    """Otherwise the others would name the one that found out."""
    connected, over = threading.Barrier(3), threading.Event()

    def body(t):
        connected.wait(SECONDS)
        if t.rank == 0:
            with t._mesh.lock:
                t._mesh._lose(t._mesh._links[2], ConnectionError("cut"))
        elif t.rank == 1:
            with pytest.raises(PeerError, match=r"rank 2 on .* is lost: cut"):
                t.backoff.wait(t.irecv(array(0), 0))
            over.set()
        else:
            over.wait(SECONDS)

    on_tcp_ranks(3, body)


class Narrow:
    """A socket that takes as many bytes as there is room for."""

    def __init__(self, room):
        self.room, self.taken = room, b""

    def sendmsg(self, views):
        if not self.room:
            raise BlockingIOError
        taken = b"".join(views)[: self.room]
        self.room -= len(taken)
        self.taken += taken
        return len(taken)


@pytest.mark.parametrize("room", [0, 7, 16, 20])
def test_only_what_has_not_begun_gives_way_to_what_is_urgent(room):
    """Also where as much is left of a message as a header has bytes."""
    sock = Narrow(room)
    end = Link(sock, 1, None)
    end.send(2, memoryview(bytes(16)), None)
    end.send(2, memoryview(b"later"), None)
    end.hurry()
    sock.room = 1000
    end.send(0, memoryview(b"now"), None)
    end.flush()
    begun = HEADER.pack(2, 16) + bytes(16) if room else b""
    assert sock.taken == begun + HEADER.pack(0, 3) + b"now"


def test_what_a_peer_sent_before_it_was_lost_arrives():
    def body(t):
        if t.rank == 0:
            t.isend(np.full(100_000, 7, np.uint8), 1)
            t.allgather_object("sent")
            return vanish(t)
        t.allgather_object("sent")
        time.sleep(0.2)
        landing = np.zeros(100_000, np.uint8)
        receiving = t.irecv(landing, 0)
        t.backoff.wait(receiving)
        assert set(landing.tolist()) == {7}
        with pytest.raises(PeerError, match="rank 0"):
            t.backoff.wait(t.irecv(landing, 0))
        return None

    on_tcp_ranks(2, body)


def test_a_peer_that_has_left_is_an_error_only_to_who_waits_for_it():
    def body(t):
        if t.rank == 2:
            t.isend(array(5), 0)
            return
        pair = t.subset([0, 1])
        time.sleep(0.2)
        for turn in range(20):
            assert pair.allgather_object(turn) == [turn, turn]
        if t.rank == 0:
            landing = array(0)
            t.backoff.wait(t.irecv(landing, 2))
            assert landing[0] == 5, "what it sent before is there"
        with pytest.raises(PeerError, match=r"rank 2 on .* has left the job"):
            t.backoff.wait(t.irecv(array(0), 2))
        with pytest.raises(PeerError, match=r"rank 2 on .* has left the job"):
            t.allgather_object(None)
        assert pair.allgather_object(t.rank) == [0, 1], "and the others go on"

    on_tcp_ranks(3, body)


def test_close_delivers_what_is_on_its_way():
    """The receiver takes its time, and the sender has long closed."""

    def body(t):
        if t.rank == 0:
            t.isend(np.full(8 * MIB, 3, np.uint8), 1)
            return
        landing = np.zeros(8 * MIB, np.uint8)
        time.sleep(0.2)
        t.backoff.wait(t.irecv(landing, 0))
        assert landing.min() == 3

    on_tcp_ranks(2, body)


def test_after_close_nothing_is_sent_nor_received():
    def body(t):
        other = t.duplicate()
        t.allgather_object(None)
        t.close()
        assert other.incoming() is None
        assert other.isend(array(1), 1 - t.rank).Test()
        with pytest.raises(PeerError, match="this rank has left"):
            other.backoff.wait(other.irecv(array(0), 1 - t.rank))
        other.close()

    on_tcp_ranks(2, body)


def test_close_does_not_wait_for_long_for_those_who_stay():
    def body(t):
        if t.rank == 1:
            time.sleep(3)
            return None
        began = time.monotonic()
        t.close()
        return time.monotonic() - began

    assert on_tcp_ranks(2, body)[0] < 2.5


def test_a_peer_that_computes_for_longer_than_the_timeout_is_not_lost():
    """Its host answers that there is no room: the kernel's TCP_USER_TIMEOUT would end that."""

    def body(t):
        if t.rank == 0:
            t.backoff.wait(t.isend(np.ones(96 * MIB, np.uint8), 1))
            return
        time.sleep(5)
        landing = np.zeros(96 * MIB, np.uint8)
        t.backoff.wait(t.irecv(landing, 0))
        assert landing.all()

    on_tcp_ranks(2, body, peer_timeout=2.0)


def tcp_info(*, unacked=0, probes=0, last_ack=0):
    fields = [0] * 21
    fields[3], fields[12], fields[20] = probes, unacked, last_ack
    return bytes(fields[:8]) + np.array(fields[8:], np.uint32).tobytes() + bytes(100)


def test_only_who_owes_an_answer_is_silent():
    assert silence_of(tcp_info(last_ack=9000)) is None
    assert silence_of(tcp_info(unacked=3, last_ack=9000)) == 9
    assert silence_of(tcp_info(probes=1, last_ack=9000)) is None
    assert silence_of(tcp_info(probes=2, last_ack=9000)) == 9
    assert silence_of(b"") is None


def test_a_peer_that_owes_an_answer_for_too_long_is_lost(monkeypatch):
    over = threading.Event()

    def body(t):
        t.allgather_object(None)
        if t.rank == 0:
            monkeypatch.setattr(link, "silence_of", lambda _: 60.0)
            with pytest.raises(PeerError, match=r"rank 1 on .* not answered for 2 s .*TIMEOUT"):
                t.backoff.wait(t.irecv(array(0), 1))
            over.set()
        over.wait(SECONDS)

    on_tcp_ranks(2, body, peer_timeout=2.0)


# Real processes

WAIT_FOR_ONE = """
    import time
    from hvdkit.errors import PeerError
    try:
        t.allgather_object("connected")
        print("ready", flush=True)
        if rank == {doomed}:
            {deed}
        t.backoff.wait(t.irecv(np.zeros(1, np.uint8), (rank + 1) % size))
    except PeerError as exc:
        print(exc)
        sys.exit(3)
"""


def test_a_rank_that_is_killed():
    with processes(WAIT_FOR_ONE.format(doomed=1, deed="time.sleep(600)"), 3) as jobs:
        for job in jobs:
            assert job.stdout.readline() == "ready\n"
        os.kill(jobs[1].pid, signal.SIGKILL)
        for rank in (0, 2):
            status, out, err = finish(jobs[rank])
            assert status == 3, err
            assert f"rank 1 on {socket.gethostname()} is lost" in out


def test_a_rank_that_is_killed_while_its_forked_child_lives_on():
    """The child, such as a DataLoader's worker, must not keep the links open."""
    deed = "import os; child = os.fork(); child and print(child, flush=True); time.sleep(60)"
    with processes(WAIT_FOR_ONE.format(doomed=1, deed=deed), 2) as jobs:
        assert jobs[1].stdout.readline() == "ready\n"
        child = int(jobs[1].stdout.readline())
        try:
            os.kill(jobs[1].pid, signal.SIGKILL)
            status, out, err = finish(jobs[0])
            assert status == 3, err
            assert "rank 1" in out
        finally:
            os.kill(child, signal.SIGKILL)


def test_abort_tells_everyone_why_and_ends_the_process():
    with processes(WAIT_FOR_ONE.format(doomed=2, deed="t.abort(42)"), 3) as jobs:
        assert finish(jobs[2])[0] == 42
        for rank in (0, 1):
            status, out, err = finish(jobs[rank])
            assert status == 3, err
            assert f"rank 2 on {socket.gethostname()} has ended the job with exit code 42" in out


def test_abort_in_the_middle_of_large_messages():
    """The word of it follows the message that has begun, or the peer finds the link lost."""
    script = """
        import threading
        from hvdkit.errors import PeerError
        data = np.zeros(64 << 20, np.uint8)
        try:
            t.allgather_object("connected")
            if rank == 0:
                requests = [t.isend(data, 1) for _ in range(4)]
                t.abort(7)
            while True:
                t.backoff.wait(t.irecv(data, 0))
        except PeerError as exc:
            print(exc)
            sys.exit(3)
    """
    with processes(script, 2) as jobs:
        assert finish(jobs[0])[0] == 7
        status, out, err = finish(jobs[1])
        assert status == 3, err
        assert "rank 0 on" in out


def test_an_exception_on_one_rank_is_an_error_on_the_others():
    with processes(WAIT_FOR_ONE.format(doomed=0, deed="raise KeyError('oops')"), 3) as jobs:
        status, _, err = finish(jobs[0])
        assert status == 1
        assert "oops" in err
        for rank in (1, 2):
            status, out, err = finish(jobs[rank])
            assert status == 3, err
            assert "rank 0" in out


def test_processes_exchange_large_messages_both_ways():
    script = """
        peer = 1 - rank
        landing = np.zeros(64 << 20, np.uint8)
        sending = t.isend(np.full(64 << 20, rank + 1, np.uint8), peer)
        t.backoff.wait(sending)
        t.backoff.wait(t.irecv(landing, peer))
        assert landing.min() == landing.max() == peer + 1
        assert t.allgather_ints(np.array([rank])).tolist() == [[0], [1]]
        t.close()
        print("well")
    """
    with processes(script, 2) as jobs:
        for job in jobs:
            assert finish(job) == (0, "well\n", "")
