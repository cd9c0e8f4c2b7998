"""Where the ranks of a job meet before they can speak: a launcher's key-value store, over HTTP.

The protocol is that of Horovod's rendezvous server, so that the ranks can join through its own
launcher: ``PUT /scope/key`` and ``GET /scope/key``, which answers 404 until the key is there.

With a secret, each request proves that the client has it, and each answer that the server does, by
a code over the method, the path and the body [RFC 2104]; what has no such proof changes nothing and
is told nothing.  What is stored is not hidden from whoever can read the network.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import quote

#: The header with the proof.
PROOF = "X-Hvdkit-Proof"

#: Longer values are refused: addresses and keys are short.
_LONGEST_VALUE = 1 << 20

#: Of one request, on either side.
_SECONDS_A_REQUEST = 10.0
#: In which a client must have sent its request: as in Horovod.
_SECONDS_TO_SEND = 3.0

#: Requests that are served at once.  The ranks' own take a moment: when there are as many, it is
#: the oldest that is a slow stranger's, and that is hung up on.
_MOST_AT_ONCE = 512

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.01, 0.25


class Store(Protocol):
    """Small values by name, which all ranks of a job can write and read."""

    def put(self, key: str, value: bytes) -> None:
        """Store `value`.

        Raises:
            TimeoutError: the store cannot be reached.
        """
        ...

    def get(self, key: str, timeout: float) -> bytes:
        """Return the value of `key`; wait until it is there.

        Raises:
            TimeoutError: it was not there within `timeout` seconds.
        """
        ...


def proof(secret: bytes, *parts: bytes) -> str:
    """Return what only who has `secret` can say of a message of these parts."""
    framed = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return hmac.new(secret, framed, hashlib.sha256).hexdigest()


class HTTPStore:
    """A client of a rendezvous server.

    Args:
        address: of the server; or several, separated by commas, which are tried in turn.
        port: of the server.
        scope: of the keys: what other scopes store is apart.
        secret: which the server has as well; None: it knows of none, as Horovod's.
        timeout: seconds in which `put` must succeed.
    """

    def __init__(
        self,
        address: str,
        port: int,
        scope: str,
        secret: bytes | None = None,
        *,
        timeout: float = 120.0,
    ) -> None:
        self._addresses = [part.strip() for part in address.split(",") if part.strip()]
        self._port = port
        self._scope = scope
        self._secret = secret
        self._timeout = timeout

    def put(self, key: str, value: bytes) -> None:
        self._until(lambda: self._ask("PUT", key, value), self._timeout, f"cannot store {key!r}")

    def get(self, key: str, timeout: float) -> bytes:
        return self._until(lambda: self._ask("GET", key, b""), timeout, f"cannot get {key!r}")

    def _until(self, attempt: Callable[[], bytes | None], seconds: float, what: str) -> bytes:
        """Return the first answer that is none of "not there" and "cannot be reached"."""
        deadline = time.monotonic() + seconds
        pause, trouble = _SHORTEST_PAUSE, "it is not there"
        while True:
            try:
                answer = attempt()
                if answer is not None:
                    return answer
                trouble = "it is not there"
            except (OSError, http.client.HTTPException) as exc:
                trouble = str(exc) or type(exc).__name__
                self._addresses.append(self._addresses.pop(0))
            left = deadline - time.monotonic()
            if left <= 0:
                where = ", ".join(sorted(self._addresses))
                raise TimeoutError(
                    f"{what} within {seconds:g} s at the rendezvous server, {where} port "
                    f"{self._port}: {trouble}"
                )
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, _LONGEST_PAUSE)

    def _ask(self, method: str, key: str, body: bytes) -> bytes | None:
        """Make one request; return the answer's body, None if the key is not there."""
        path = f"/{quote(self._scope, safe='')}/{quote(key, safe='')}"
        headers = {}
        if self._secret is not None:
            headers[PROOF] = proof(self._secret, method.encode(), path.encode(), body)
        server = http.client.HTTPConnection(
            self._addresses[0], self._port, timeout=_SECONDS_A_REQUEST
        )
        try:
            server.request(method, path, body if method == "PUT" else None, headers)
            response = server.getresponse()
            answer = response.read(_LONGEST_VALUE)
        finally:
            server.close()
        if response.status == HTTPStatus.NOT_FOUND:
            return None
        if response.status != HTTPStatus.OK:
            raise OSError(f"it answers {response.status} {response.reason}")
        if self._secret is not None:
            wanted = proof(self._secret, b"answer", method.encode(), path.encode(), answer)
            given = response.headers.get(PROOF, "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, wanted.encode()):
                raise OSError("its answer does not prove the job's secret")
        return answer


class _Server(ThreadingMixIn, HTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: str, port: int, secret: bytes | None) -> None:
        if ":" in address or (not address and socket.has_dualstack_ipv6()):
            self.address_family = socket.AF_INET6
        self.secret = secret
        self.values: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._open: dict[socket.socket, None] = {}  # the oldest first
        super().__init__((address, port), _Handler)

    def server_bind(self) -> None:
        # Or a job could not start on the port of one that has just ended.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.bind(self.server_address)  # HTTPServer's would ask the name service who we are
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = None
            if len(self._open) > _MOST_AT_ONCE:
                with suppress(OSError):
                    next(iter(self._open)).shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up or are too slow."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _SECONDS_TO_SEND

    def do_GET(self) -> None:
        if self._may(b""):
            value = self.server.values.get(self.path)
            self._answer(HTTPStatus.NOT_FOUND if value is None else HTTPStatus.OK, value or b"")

    def do_PUT(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _LONGEST_VALUE:
            self._answer(HTTPStatus.BAD_REQUEST)
            return
        value = self.rfile.read(int(length))
        if len(value) == int(length) and self._may(value):
            self.server.values[self.path] = value
            self._answer(HTTPStatus.OK)

    def _may(self, body: bytes) -> bool:
        """Return whether the request is in order and from one of the job; else refuse it."""
        if self.path.count("/") != 2 or not self.path.startswith("/"):
            self._answer(HTTPStatus.BAD_REQUEST)
            return False
        secret = self.server.secret
        if secret is not None:
            wanted = proof(secret, self.command.encode(), self.path.encode(), body)
            given = self.headers.get(PROOF, "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, wanted.encode()):
                self._answer(HTTPStatus.FORBIDDEN)
                return False
        return True

    def _answer(self, status: HTTPStatus, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if self.server.secret is not None and status == HTTPStatus.OK:
            said = (b"answer", self.command.encode(), self.path.encode(), body)
            self.send_header(PROOF, proof(self.server.secret, *said))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet: stderr is the job's."""


class RendezvousServer:
    """The server, on threads of this process; for one job.

    Args:
        secret: what requests must prove; None: whoever can connect may read and write, as with
            Horovod's.
        address: on which it listens; "": on all, IPv6 and IPv4.
        port: on which it listens; 0: a free one.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, secret: bytes | None = None, address: str = "", *, port: int = 0) -> None:
        self._server = _Server(address, port, secret)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.1},
            name="hvdkit rendezvous",
            daemon=True,
        )

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> RendezvousServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
