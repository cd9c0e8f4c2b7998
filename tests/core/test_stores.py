"""The rendezvous over HTTP: values that all ranks see, and strangers who see and change nothing."""

import http.client
import socket
import threading
import time

import pytest

from hvdkit.transport import stores
from hvdkit.transport.stores import PROOF, HTTPStore, RendezvousServer, proof

SECRET = b"a secret of this job, 32 bytes!!"


@pytest.fixture(params=[None, SECRET], ids=["plain", "secret"])
def secret(request):
    return request.param


@pytest.fixture
def server(secret):
    with RendezvousServer(secret, "127.0.0.1") as running:
        yield running


def store_of(server, secret, scope="job", **how):
    return HTTPStore("127.0.0.1", server.port, scope, secret, **how)


def request(server, method, path, body=None, headers=None):
    """Return the status and the body of the answer to a request that is none of hvdkit's."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("value", [b"", b"\0\xff" * 3, b"x" * 100_000])
def test_what_one_puts_another_gets(server, secret, value):
    store_of(server, secret).put("rank/0", value)
    assert store_of(server, secret).get("rank/0", 5.0) == value


def test_a_later_value_replaces_the_first(server, secret):
    store = store_of(server, secret)
    store.put("key", b"first")
    store.put("key", b"second")
    assert store.get("key", 5.0) == b"second"


def test_scopes_are_apart(server, secret):
    store_of(server, secret, "a b/c").put("key", b"here")
    assert store_of(server, secret, "a b/c").get("key", 5.0) == b"here"
    with pytest.raises(TimeoutError):
        store_of(server, secret, "a b").get("key", 0.0)


def test_get_waits_for_a_value_to_come(server, secret):
    late = threading.Timer(0.3, store_of(server, secret).put, ("key", b"late"))
    late.start()
    assert store_of(server, secret).get("key", 20.0) == b"late"
    late.join()


def test_what_never_comes_is_a_timeout_that_says_what_and_where(server, secret):
    began = time.monotonic()
    with pytest.raises(TimeoutError) as error:
        store_of(server, secret).get("rank-3", 0.2)
    assert time.monotonic() - began < 10
    assert str(error.value) == (
        "cannot get 'rank-3' within 0.2 s at the rendezvous server, 127.0.0.1 port "
        f"{server.port}: it is not there"
    )


def test_a_server_that_is_not_there_is_a_timeout():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        port = taken.getsockname()[1]
        store = HTTPStore("127.0.0.1", port, "job", timeout=0.2)
        with pytest.raises(TimeoutError, match=r"cannot store 'key' within 0.2 s .* refused"):
            store.put("key", b"")
        with pytest.raises(TimeoutError, match="cannot get 'key'"):
            store.get("key", 0.0)


def test_the_server_may_start_after_the_ranks():
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        port = first.getsockname()[1]
    server = RendezvousServer(None, "127.0.0.1", port=port)  # its queue takes a request already
    late = threading.Timer(0.3, server.start)
    late.start()
    try:
        HTTPStore("127.0.0.1", port, "job").put("key", b"x")
    finally:
        late.join()
        server.stop()


def test_addresses_are_tried_in_turn():
    with RendezvousServer(None, "127.0.0.1") as server:
        store = HTTPStore("127.0.0.2, 127.0.0.1", server.port, "job", timeout=20.0)
        store.put("key", b"x")
        assert store.get("key", 20.0) == b"x"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_it_listens_on_ipv6_and_ipv4():
    with RendezvousServer() as server:
        HTTPStore("::1", server.port, "job").put("key", b"six")
        assert HTTPStore("127.0.0.1", server.port, "job").get("key", 5.0) == b"six"
    with RendezvousServer(None, "::1") as server:
        HTTPStore("::1", server.port, "job").put("key", b"six")
        with pytest.raises(TimeoutError):
            HTTPStore("127.0.0.1", server.port, "job").get("key", 0.0)


def test_without_a_secret_it_speaks_horovods_protocol():
    """As horovod's http_store.cc and http_client.py use it."""
    with RendezvousServer(None, "127.0.0.1") as server:
        assert request(server, "GET", "/global/0") == (404, b"")
        assert request(server, "PUT", "/global/0", b"\x01\x02") == (200, b"")
        assert request(server, "GET", "/global/0") == (200, b"\x01\x02")
        assert request(server, "PUT", "/nokey", b"")[0] == 400
        assert request(server, "GET", "/a/b/c")[0] == 400


def test_a_stranger_is_refused_and_changes_nothing():
    with RendezvousServer(SECRET, "127.0.0.1") as server:
        store = HTTPStore("127.0.0.1", server.port, "job", SECRET)
        store.put("key", b"ours")
        theirs = {PROOF: proof(b"another secret", b"PUT", b"/job/key", b"theirs")}
        replayed = {PROOF: proof(SECRET, b"PUT", b"/job/key", b"ours")}
        for headers in ({}, theirs, replayed, {PROOF: "\xe9"}):
            assert request(server, "PUT", "/job/key", b"theirs", headers) == (403, b"")
            assert request(server, "GET", "/job/key", None, headers) == (403, b"")
            assert request(server, "GET", "/job/none", None, headers) == (403, b"")
        assert store.get("key", 5.0) == b"ours"
        with pytest.raises(TimeoutError, match="it answers 403"):
            HTTPStore("127.0.0.1", server.port, "job", b"wrong").get("key", 0.0)


def test_a_server_without_the_secret_is_not_believed():
    with RendezvousServer(None, "127.0.0.1") as server:
        HTTPStore("127.0.0.1", server.port, "job").put("key", b"false")
        with pytest.raises(TimeoutError, match="does not prove the job's secret"):
            HTTPStore("127.0.0.1", server.port, "job", SECRET).get("key", 0.0)


@pytest.mark.parametrize("length", ["-1", "many", str(2**40), ""])
def test_a_length_that_makes_no_sense_is_refused(server, length):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as stranger:
        stranger.sendall(f"PUT /job/key HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode())
        assert b" 400 " in stranger.recv(4096)


def test_garbage_half_open_and_slow_connections_hinder_nobody(server, secret, monkeypatch, capfd):
    monkeypatch.setattr(stores, "_MOST_AT_ONCE", 8)
    strangers = []
    try:
        for index in range(40):
            strangers.append(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            if index % 3 == 0:
                strangers[-1].sendall(b"\0\xff\r\n" * 9)
            elif index % 3 == 1:
                strangers[-1].sendall(b"PUT /job/key HTTP/1.0\r\nContent-Length: 9\r\n\r\nabc")
        store = store_of(server, secret)
        store.put("key", b"ours")
        assert store.get("key", 20.0) == b"ours"
    finally:
        for stranger in strangers:
            stranger.close()
    assert capfd.readouterr().err == ""


def test_many_ranks_at_once(server, secret):
    found = [None] * 24

    def rank(me):
        store = store_of(server, secret)
        store.put(f"rank-{me}", str(me).encode())
        found[me] = [store.get(f"rank-{peer}", 30.0) for peer in range(0, len(found), 5)]

    threads = [threading.Thread(target=rank, args=(me,)) for me in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert found == [[str(peer).encode() for peer in range(0, len(found), 5)]] * len(found)


def test_a_port_that_is_taken_is_an_error():
    with RendezvousServer(None, "127.0.0.1") as server, pytest.raises(OSError):
        RendezvousServer(None, "127.0.0.1", port=server.port)


def test_stop_frees_the_port():
    with RendezvousServer(None, "127.0.0.1") as server:
        port = server.port
    with RendezvousServer(None, "127.0.0.1", port=port) as server:
        assert server.port == port


def test_the_port_of_a_job_that_has_just_ended_is_free():
    with RendezvousServer(None, "127.0.0.1") as first:
        client = socket.create_connection(("127.0.0.1", first.port))
        client.sendall(b"GET /job HTTP/1.0\r\n\r\n")
        while client.recv(4096):  # the server has closed first, and its end lingers
            pass
        client.close()
    with RendezvousServer(None, "127.0.0.1", port=first.port) as second:
        assert second.port == first.port
