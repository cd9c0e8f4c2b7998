"""How ranks connect: in bounded time, whatever strangers do meanwhile."""

import json
import random
import socket
import struct
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from hvdkit.errors import LauncherError
from hvdkit.transport.tcp import addresses, connecting, places
from hvdkit.transport.tcp.addresses import Interface, choose_interfaces, find_interfaces
from hvdkit.transport.tcp.handshake import JOB_BYTES, Identity, admit, offer
from hvdkit.transport.tcp.places import Place, listen

from .tcp_worlds import SECRET, MemoryStore, connect, on_tcp_ranks
from .worlds import SECONDS

has_ipv6 = pytest.mark.skipif(
    not any("::1" in interface.addresses for interface in find_interfaces()),
    reason="there is no IPv6 on the loopback interface here",
)


def exchange(t):
    """Send a message to every rank, and check those that come."""
    landing = [np.zeros(1000, np.uint8) for _ in range(t.size)]
    requests = [t.irecv(landing[p], p) for p in range(t.size)]
    requests += [t.isend(np.full(1000, t.rank, np.uint8), p) for p in range(t.size)]
    for request in requests:
        t.backoff.wait(request)
    assert [set(x.tolist()) for x in landing] == [{p} for p in range(t.size)]
    return t.allgather_object(t.rank)


def handles():
    """Return how many file handles this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Waiting:
    """A job of two, whose rank 0 listens while strangers come, until rank 1 is let in."""

    def __init__(self):
        self.store = MemoryStore()
        self.results = [None, None]
        self.threads = []
        self._start(0)
        place = json.loads(self.store.get("tcp.0", SECONDS))
        self.job = bytes.fromhex(place["job"])
        self.address = tuple(place["addresses"][0])

    def _start(self, rank):
        def body():
            try:
                t = connect(rank, 2, self.store)
                self.results[rank] = exchange(t)
                t.close()
            except Exception as exc:
                self.results[rank] = exc

        self.threads.append(threading.Thread(target=body, daemon=True))
        self.threads[-1].start()

    def stranger(self):
        return socket.create_connection(self.address, timeout=SECONDS)

    def let_in(self):
        """Start rank 1; return what came of both ranks."""
        self._start(1)
        for thread in self.threads:
            thread.join(2 * SECONDS)
        return self.results


@pytest.fixture
def waiting(monkeypatch):
    monkeypatch.setattr(connecting, "HANDSHAKE_SECONDS", 0.5)
    job = Waiting()
    yield job
    if len(job.threads) == 1:
        job.let_in()


def was_dropped(sock):
    """Whether the other end closes the connection, within the time for that."""
    with suppress(ConnectionError):
        while sock.recv(1000):
            pass
    return True


@pytest.mark.parametrize("seed", range(12))
def test_garbage(waiting, seed):
    """Also such as begins like a hello."""
    draw = random.Random(seed)
    hello = next(offer(Identity(1, 2, waiting.job, b"wrong"), 0)).send
    begin = hello[: draw.choice([0, 0, 8, 24, 36, len(hello)])]
    with waiting.stranger() as sock:
        with suppress(ConnectionError):
            sock.sendall(begin + draw.randbytes(draw.choice([1, 67, 68, 69, 200, 100_000])))
        assert was_dropped(sock)
    assert waiting.let_in() == [[0, 1], [0, 1]]


def test_half_open_connections_are_dropped_after_a_while(waiting):
    with waiting.stranger() as silent, waiting.stranger() as begun, waiting.stranger() as reset:
        begun.sendall(b"hvdkit")
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()
        began = time.monotonic()
        assert was_dropped(silent)
        assert was_dropped(begun)
        assert time.monotonic() - began < 10
    assert waiting.let_in() == [[0, 1], [0, 1]]


def test_a_slow_sender_gets_no_more_time_than_others(waiting):
    hello = next(offer(Identity(1, 2, waiting.job, SECRET), 0)).send
    with waiting.stranger() as sock:
        began = time.monotonic()
        with suppress(ConnectionError):
            for number in range(len(hello)):
                sock.sendall(hello[number : number + 1])
                time.sleep(0.05)
        assert was_dropped(sock)
        assert time.monotonic() - began < 20
    assert waiting.let_in() == [[0, 1], [0, 1]]


def test_a_flood_of_connections(waiting, monkeypatch):
    """Few are kept, and the rank gets in between them."""
    monkeypatch.setattr(connecting, "HANDSHAKE_SECONDS", 60.0)
    before = handles()
    with ExitStack() as stack:
        strangers = [stack.enter_context(waiting.stranger()) for _ in range(250)]
        deadline = time.monotonic() + SECONDS
        most = before + len(strangers) + connecting.PENDING + 10  # some of the rank's own
        while handles() > most and time.monotonic() < deadline:
            time.sleep(0.02)
        assert handles() <= most
        assert waiting.let_in() == [[0, 1], [0, 1]]


def test_a_flood_that_goes_on(waiting):
    stop = threading.Event()

    def flood():
        while not stop.is_set():
            with suppress(OSError), waiting.stranger() as sock:
                sock.sendall(b"x" * 100)

    floods = [threading.Thread(target=flood, daemon=True) for _ in range(3)]
    for thread in floods:
        thread.start()
    try:
        assert waiting.let_in() == [[0, 1], [0, 1]]
    finally:
        stop.set()
        for thread in floods:
            thread.join()


def test_a_handshake_that_was_recorded(waiting):
    me = Identity(1, 2, waiting.job, SECRET)
    connects, accepts = offer(me, 0), admit(Identity(0, 2, waiting.job, SECRET))
    next(accepts)
    hello = next(connects).send
    proof = connects.send(accepts.send(hello).send).send
    with waiting.stranger() as sock:
        sock.sendall(hello + proof)
        answer = b""
        with suppress(ConnectionError):
            while piece := sock.recv(1000):
                answer += piece
        assert len(answer) == 64, "the challenge, and no word that it is in"
    assert waiting.let_in() == [[0, 1], [0, 1]]


def test_a_wrong_secret_is_refused_on_both_sides(waiting):
    with pytest.raises(LauncherError, match=r"rank 0: .*does not prove the job's secret"):
        connect(1, 2, waiting.store, secret=b"wrong", start_timeout=0.5)
    assert waiting.let_in() == [[0, 1], [0, 1]]


def test_without_a_secret_nobody_connects():
    with pytest.raises(LauncherError, match="secret"):
        connect(0, 2, MemoryStore(), secret=b"")


def test_who_connects_again_is_who_counts():
    """A rank that gave up a connection which the other end had admitted."""
    store, results = MemoryStore(), []

    def rank(me):
        t = connect(me, 3, store)
        results.append(exchange(t))
        t.close()

    def start(me):
        threads.append(threading.Thread(target=rank, args=(me,), daemon=True))
        threads[-1].start()

    threads = []
    start(0)
    place = json.loads(store.get("tcp.0", SECONDS))
    script = offer(Identity(2, 3, bytes.fromhex(place["job"]), SECRET), 0)
    turn = next(script)
    with socket.create_connection(tuple(place["addresses"][0]), timeout=SECONDS) as sock:
        with suppress(StopIteration):
            while True:
                sock.sendall(turn.send)
                turn = script.send(sock.recv(turn.want, socket.MSG_WAITALL))
        start(2)
        sock.settimeout(SECONDS)
        assert sock.recv(1) == b"", "rank 0 has let go of it"
    start(1)
    for thread in threads:
        thread.join(SECONDS)
    assert results == [[0, 1, 2]] * 3


class Forged(MemoryStore):
    """A store in which rank 0's addresses are preceded by others."""

    def __init__(self, *more):
        super().__init__()
        self.more = more

    def get(self, key, timeout):
        place = json.loads(super().get(key, timeout))
        if key == "tcp.0":
            place["addresses"] = [*self.more, *place["addresses"]]
        return json.dumps(place).encode()


def test_one_address_is_tried_after_the_other(monkeypatch):
    """Nobody listens at the first, and somebody else at the second, who says something else."""
    monkeypatch.setattr(connecting, "HANDSHAKE_SECONDS", 0.5)
    with ExitStack() as stack:
        mute = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        liar = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        nobody = socket.create_server(("127.0.0.1", 0))
        unused = nobody.getsockname()[1]
        nobody.close()

        def lie():
            with suppress(OSError):
                while True:
                    with liar.accept()[0] as sock:
                        sock.sendall(b"z" * 500)
                        sock.recv(1000)

        threading.Thread(target=lie, daemon=True).start()
        ports = (unused, liar.getsockname()[1], mute.getsockname()[1])
        store = Forged(*(["127.0.0.1", port] for port in ports))
        assert on_tcp_ranks(2, exchange, store=store) == [[0, 1]] * 2
        liar.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"job": "zz", "network": "", "addresses": []}',
        b'{"job": "00", "network": "", "addresses": [["a.example", 1]]}',
        b'{"job": "00", "network": "", "addresses": 5}',
    ],
)
def test_what_is_in_the_store_is_not_trusted(text):
    with pytest.raises(LauncherError, match="rank 7"):
        Place.parse(text, 7)


# In bounded time


def test_a_rank_that_is_not_started_is_named():
    began = time.monotonic()
    with pytest.raises(
        LauncherError, match=r"(?s)rank 1: has not connected.*HVDKIT_TCP_INTERFACES"
    ):
        connect(0, 2, MemoryStore(), start_timeout=0.3)
    with pytest.raises(LauncherError, match="rank 0 has not published"):
        connect(1, 2, MemoryStore(), start_timeout=0.3)
    store = MemoryStore()
    store.put("tcp.0", Place(bytes(JOB_BYTES), "elsewhere", (("127.0.0.1", 1),)).dump())
    with pytest.raises(LauncherError) as raised:
        connect(2, 4, store, start_timeout=0.3)
    assert "rank 1: not started" in str(raised.value)
    assert "no address that could be reached from here" in str(raised.value)
    assert "rank 3: has not connected" in str(raised.value)
    assert time.monotonic() - began < 10


def test_a_rank_that_cannot_be_reached_is_named_with_what_was_tried():
    store = MemoryStore()
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    server.close()
    place = Place(bytes(JOB_BYTES), addresses.network_place(), (("127.0.0.1", port),))
    store.put("tcp.0", place.dump())
    with pytest.raises(LauncherError, match=rf"127\.0\.0\.1 port {port}.*refused"):
        connect(1, 2, store, start_timeout=0.3)


def test_ranks_that_come_late_are_waited_for():
    store, results = MemoryStore(), {}

    def rank(me):
        time.sleep({0: 0.4, 1: 0.0, 2: 0.8, 3: 0.2}[me])
        t = connect(me, 4, store)
        results[me] = exchange(t)
        t.close()

    threads = [threading.Thread(target=rank, args=(r,), daemon=True) for r in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert results == {r: [0, 1, 2, 3] for r in range(4)}


def test_a_peer_that_ends_while_others_connect_is_an_error():
    """Its links are there, but it has never said where it is."""
    store, ended = MemoryStore(), []

    def rank(me):
        try:
            connect(me, 3, store, start_timeout=1.0)
        except Exception as exc:
            ended.append(exc)

    threads = [threading.Thread(target=rank, args=(r,), daemon=True) for r in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(ended) == 2
    assert all(isinstance(exc, LauncherError) and "rank 2" in str(exc) for exc in ended)


def test_close_leaves_nothing_behind():
    on_tcp_ranks(2, exchange)
    before = handles(), threading.active_count()
    on_tcp_ranks(4, exchange)
    with pytest.raises(LauncherError):
        connect(0, 2, MemoryStore(), start_timeout=0.1)
    assert (handles(), threading.active_count()) == before


# Addresses


@has_ipv6
def test_over_ipv6(monkeypatch):
    only = [Interface("lo", True, ("::1",))]
    monkeypatch.setattr(places, "choose_interfaces", lambda _: only)
    store = MemoryStore()
    assert on_tcp_ranks(3, exchange, store=store) == [[0, 1, 2]] * 3
    assert {a for v in store.values.values() for a, _ in json.loads(v)["addresses"]} == {"::1"}


@pytest.mark.parametrize("ipv6", [True, False])
def test_on_all_interfaces(monkeypatch, ipv6):
    """One socket for all of them, with IPv6 or without."""
    loopback = [i for i in find_interfaces() if i.loopback]
    monkeypatch.setattr(addresses, "find_interfaces", lambda: loopback)
    if not ipv6:
        create = socket.create_server

        def without(address, **options):
            if options.get("family") == socket.AF_INET6:
                raise OSError("no such family")
            return create(address, **options)

        monkeypatch.setattr(socket, "create_server", without)
    store = MemoryStore()
    assert on_tcp_ranks(2, exchange, store=store, interfaces=()) == [[0, 1]] * 2
    told = [a for a, _ in json.loads(store.values["tcp.0"])["addresses"]]
    assert "127.0.0.1" in told
    assert ipv6 or not any(":" in address for address in told)


def test_an_interface_that_does_not_exist_is_an_error_with_those_that_do():
    with pytest.raises(LauncherError, match=r"'eth77'.*does not exist.*there are: .*lo \(127"):
        connect(0, 2, MemoryStore(), interfaces=("lo", "eth77"))


def test_the_loopback_comes_last_and_only_where_it_is_the_same():
    found = find_interfaces()
    assert found[-1].loopback
    assert "127.0.0.1" in found[-1].addresses
    assert not any(a.startswith(("fe80", "169.254")) for i in found for a in i.addresses)
    listeners, told = listen(())
    for listener in listeners:
        listener.close()
    place = Place(b"", "here", told)
    away = [address for address, _ in place.reachable_from("there")]
    assert not any(a == "::1" or a.startswith("127.") for a in away)
    assert [a for a, _ in place.reachable_from("here")][: len(away)] == away
    assert choose_interfaces(["lo"]) == [found[-1]]


def test_ipv6_addresses_of_interfaces(tmp_path):
    table = tmp_path / "if_inet6"
    table.write_text(
        "fd000000000000000000000000000002 04 40 00 82       lo\n"
        "fe8000000000000000fc00fffe000001 04 40 20 80       lo\n"
        "fd000000000000000000000000000003 04 40 00 88       lo\n"  # somebody else has it as well
        "fd000000000000000000000000000004 04 40 00 82     eth9\n"
    )
    loopback = find_interfaces(table)[-1]
    assert [a for a in loopback.addresses if ":" in a] == ["fd00::2"]
    assert all(":" not in a for i in find_interfaces(tmp_path / "none") for a in i.addresses)
