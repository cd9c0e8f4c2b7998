"""Connect every rank with every other: one socket a pair, whose both ends have proved the secret.

Each rank listens, and publishes in the launcher's store where.  The higher rank of each pair
connects, to one address after another.  All of it goes on at once, in one thread, and in bounded
time.  Who connects and proves nothing is dropped after a short while, and when there are too many
of those, the one that has been there for longest.
"""

from __future__ import annotations

import errno
import os
import secrets
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvdkit.errors import LauncherError, format_ranks
from hvdkit.transport.tcp.addresses import network_place
from hvdkit.transport.tcp.handshake import (
    JOB_BYTES,
    Identity,
    RefusedError,
    Script,
    admit,
    offer,
)
from hvdkit.transport.tcp.places import Address, Place, listen

if TYPE_CHECKING:
    from hvdkit.transport.stores import Store

#: How long a connection may take to prove the secret.
HANDSHAKE_SECONDS = 5.0
#: Connections that have been accepted and have proved nothing yet, at the most.
PENDING = 64
_LONGEST_PAUSE = 1.0
_ASKING_SECONDS = 0.1

#: Under which a rank publishes where it listens; a slash would be a scope to some stores.
_KEY = "tcp.{}"


@dataclass(frozen=True)
class Membership:
    """A rank's place in a job.

    Args:
        rank: of this process.
        size: the number of ranks.
        store: where all ranks can write and read; its keys must be of this job and time alone.
        secret: what all ranks of the job have, and nobody else.
    """

    rank: int
    size: int
    store: Store
    secret: bytes


class _Dialogue:
    """A connection on which a handshake is under way."""

    def __init__(self, sock: socket.socket, script: Script, peer: int | None = None) -> None:
        self.sock = sock
        self.peer = peer
        self.deadline = time.monotonic() + HANDSHAKE_SECONDS
        self._script = script
        self._turn = next(script)
        self._unsent = self._turn.send
        self._received = b""

    def advance(self) -> int | None:
        """Go on as far as can be; return the peer's rank when it has proved to be that.

        Raises:
            OSError, RefusedError: it is over, and the connection of no use.
        """
        while True:
            if self._unsent:
                if self.sock.send(self._unsent) < len(self._unsent):
                    raise OSError("the connection takes no more than a few bytes")
                self._unsent = b""
            while len(self._received) < self._turn.want:
                try:
                    piece = self.sock.recv(self._turn.want - len(self._received))
                except BlockingIOError:
                    return None
                if not piece:
                    raise ConnectionError("it closed the connection")
                self._received += piece
            try:
                self._turn = self._script.send(self._received)
            except StopIteration as stop:
                return int(stop.value)
            self._unsent, self._received = self._turn.send, b""
            if self._turn.committed:
                self.deadline = float("inf")


class Meeting:
    """The connecting of one rank with all others.

    Args:
        me: this rank.
        store: where every rank publishes where it listens.
        listeners: this rank's, which stay the caller's.
        deadline: of `time.monotonic()`.
    """

    def __init__(
        self,
        me: Identity,
        store: Store,
        *,
        listeners: Sequence[socket.socket],
        deadline: float,
    ) -> None:
        self._me = me
        self._store = store
        self._deadline = deadline
        self._network = network_place()
        self._selector = selectors.DefaultSelector()
        for listener in listeners:
            self._selector.register(listener, selectors.EVENT_READ, None)
        self._unknown = list(range(me.rank))  # who has not been found in the store yet
        self._ways: dict[int, list[Address]] = {}  # to whom this rank is to connect, and how
        self._tries: dict[int, int] = {}
        self._next_try: dict[int, float] = {}
        self._last: dict[int, str] = {}
        self._dialogues: list[_Dialogue] = []
        self.links: dict[int, socket.socket] = {}

    def run(self) -> dict[int, socket.socket]:
        """Return a connected socket for every other rank.

        Raises:
            LauncherError: not all of them came in time; says who, and what was tried.
        """
        try:
            while len(self.links) < self._me.size - 1:
                if time.monotonic() > self._deadline:
                    raise LauncherError(self._why())
                self._ask()
                self._start()
                for key, _ in self._selector.select(0.0 if self._unknown else 0.05):
                    if key.data is None:
                        self._accept(key.fileobj)
                    elif key.data in self._dialogues:
                        self._advance(key.data)
                self._expire()
        except BaseException:
            for link in self.links.values():
                link.close()
            raise
        finally:
            for dialogue in self._dialogues:
                dialogue.sock.close()
            self._selector.close()
        return self.links

    def _ask(self) -> None:
        """Look into the store for one of the ranks whose addresses are not known yet."""
        if not self._unknown:
            return
        rank = self._unknown[0]
        try:
            text = self._store.get(_KEY.format(rank), _ASKING_SECONDS)
        except TimeoutError:
            self._unknown.append(self._unknown.pop(0))
            return
        del self._unknown[0]
        self._ways[rank] = Place.parse(text, rank).reachable_from(self._network)
        self._tries[rank], self._next_try[rank] = 0, 0.0

    def _start(self) -> None:
        """Begin to connect to those who are to be tried, or tried again."""
        now = time.monotonic()
        busy = {dialogue.peer for dialogue in self._dialogues}
        for rank, ways in self._ways.items():
            if rank in self.links or rank in busy or self._next_try[rank] > now or not ways:
                continue
            host, port = ways[self._tries[rank] % len(ways)]
            self._tries[rank] += 1
            rounds = self._tries[rank] // len(ways)
            self._next_try[rank] = now + min(0.02 * 2 ** min(rounds, 10), _LONGEST_PAUSE)
            self._last[rank] = f"{host} port {port}: no answer"
            try:
                sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            except OSError as exc:  # this host has no IPv6, or no more file handles
                self._last[rank] = f"{host} port {port}: {exc.strerror}"
                continue
            sock.setblocking(False)
            code = sock.connect_ex((host, port))
            if code in (0, errno.EINPROGRESS):
                self._add(_Dialogue(sock, offer(self._me, rank), rank), selectors.EVENT_WRITE)
            else:
                self._last[rank] = f"{host} port {port}: {os.strerror(code)}"
                sock.close()

    def _accept(self, listener: Any) -> None:
        strangers = [dialogue for dialogue in self._dialogues if dialogue.peer is None]
        try:
            sock, _ = listener.accept()
        except OSError:  # it has gone already, or there are no more file handles
            sock = None
        if strangers and (sock is None or len(strangers) >= PENDING):
            self._drop(strangers[0])
        if sock is not None:
            sock.setblocking(False)
            self._add(_Dialogue(sock, admit(self._me)), selectors.EVENT_READ)

    def _add(self, dialogue: _Dialogue, events: int) -> None:
        self._dialogues.append(dialogue)
        self._selector.register(dialogue.sock, events, dialogue)

    def _advance(self, dialogue: _Dialogue) -> None:
        try:
            if dialogue.peer is not None:
                code = dialogue.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, os.strerror(code))
            rank = dialogue.advance()
        except (OSError, RefusedError) as exc:
            self._drop(dialogue, str(exc))
            return
        if rank is None:
            self._selector.modify(dialogue.sock, selectors.EVENT_READ, dialogue)
            return
        self._dialogues.remove(dialogue)
        self._selector.unregister(dialogue.sock)
        if rank in self.links:  # it gave up the first connection, which this rank had admitted
            self.links[rank].close()
        self.links[rank] = dialogue.sock

    def _drop(self, dialogue: _Dialogue, why: str = "") -> None:
        if dialogue.peer is not None and why:
            way = self._last[dialogue.peer].partition(": ")[0]
            self._last[dialogue.peer] = f"{way}: {why}"
        self._dialogues.remove(dialogue)
        self._selector.unregister(dialogue.sock)
        dialogue.sock.close()

    def _expire(self) -> None:
        now = time.monotonic()
        for dialogue in [d for d in self._dialogues if d.deadline < now]:
            self._drop(dialogue, "no answer")

    def _why(self) -> str:
        """Return who is missing, and what was tried."""
        me = self._me
        lines = []
        if self._unknown:
            lines.append(f"{format_ranks(self._unknown)}: not started, as far as the store tells")
        for rank, ways in sorted(self._ways.items()):
            if rank not in self.links:
                tried = self._last.get(rank, "no address that could be reached from here")
                names = ", ".join(f"{host} port {port}" for host, port in ways)
                lines.append(
                    f"rank {rank}: cannot be reached at {names or 'any address'} ({tried})"
                )
        silent = [r for r in range(me.rank + 1, me.size) if r not in self.links]
        if silent:
            lines.append(f"{format_ranks(silent)}: has not connected to this rank")
        return (
            f"rank {me.rank} on {socket.gethostname()} has no connection with all {me.size} ranks "
            "within the start timeout (HVDKIT_START_TIMEOUT):\n  " + "\n  ".join(lines) + "\n"
            "See whether all of them were started, and whether a firewall or a wrong interface "
            "(HVDKIT_TCP_INTERFACES) is between them."
        )


def meet(me: Membership, *, interfaces: Sequence[str], deadline: float) -> dict[int, socket.socket]:
    """Publish where this rank listens, and connect it with all others.  Collective.

    Returns:
        A connected socket for every other rank.

    Raises:
        LauncherError: there is no such interface, or not all ranks were connected by `deadline`.
    """
    listeners, addresses = listen(interfaces)
    try:
        job = secrets.token_bytes(JOB_BYTES)  # only rank 0's counts
        place = Place(job, network_place(), addresses)
        me.store.put(_KEY.format(me.rank), place.dump())
        if me.rank != 0:
            job = _find_job(me, max(0.0, deadline - time.monotonic()))
        who = Identity(me.rank, me.size, job, me.secret)
        return Meeting(who, me.store, listeners=listeners, deadline=deadline).run()
    finally:
        for listener in listeners:
            listener.close()


def _find_job(me: Membership, timeout: float) -> bytes:
    try:
        return Place.parse(me.store.get(_KEY.format(0), timeout), 0).job
    except TimeoutError as exc:
        raise LauncherError(
            f"rank {me.rank} on {socket.gethostname()}: rank 0 has not published its address "
            "within the start timeout (HVDKIT_START_TIMEOUT); see whether it was started "
            f"({exc})"
        ) from exc
