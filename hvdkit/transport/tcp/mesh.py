"""All links of a rank, shared by the communicators of the job.

No thread is behind it: whoever sends, receives or asks makes all links go on, under a lock.  Who
waits sleeps in epoll on the sockets.  If several threads wait, one sleeps there for all of them:

    thread 1   sleep ---- epoll ------ message for thread 2 ------ epoll ---- ...
    thread 2   sleep ---- condition ----------------------- goes on

A message for which no receive has been posted is kept in memory of its own until one is.  So no
link ever waits for another, nor for a thread, and nothing deadlocks that would not with boundless
buffers.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from hvdkit.errors import PeerError
from hvdkit.transport.tcp.forks import forget_in_children
from hvdkit.transport.tcp.link import Link, prepare
from hvdkit.transport.tcp.messages import CONTROL, Matching, Operation
from hvdkit.transport.tcp.swap import NOTHING, Swap

_GOODBYE, _ABORT = b"G", b"A"  # the first byte of a control message; a text may follow

#: How long who closes waits for the others to do so, and who aborts for them to be told.
SECONDS_TO_LEAVE = 1.0
#: How often to look whether peers that owe an answer are still there.
_WATCH_SECONDS = 1.0
#: A wait in which nothing happens wakes up as often as that, to look whether it was interrupted.
_LONGEST_SLEEP = 0.05

_IN, _OUT = select.EPOLLIN, select.EPOLLIN | select.EPOLLOUT


class Mesh:
    """The links of one rank to all others.  Ranks are the job's.

    Args:
        rank: this rank.
        sockets: connected to each of the other ranks.
        peer_timeout: seconds without an answer after which a peer is lost.
    """

    def __init__(
        self, rank: int, sockets: Mapping[int, socket.socket], *, peer_timeout: float
    ) -> None:
        self.rank = rank
        self.hosts = {rank: socket.gethostname()}
        self.lock = threading.Lock()
        self.moves = 0
        """Counts what may be of interest to somebody who waits."""
        self.closed = False
        self._failure = ""
        self._peer_timeout = peer_timeout
        self._matching = Matching(rank, self._hear)
        self._left: set[int] = set()  # ranks that have said goodbye
        self._changed = threading.Condition(self.lock)
        self._followers = 0
        self._leading = False
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._links: dict[int, Link] = {}
        self._by_handle: dict[int, Link] = {}
        for peer, sock in sockets.items():
            prepare(sock, peer_timeout)
            self._links[peer] = self._by_handle[sock.fileno()] = Link(sock, peer, self._matching)
            self._epoll.register(sock, _IN)
        self._watched = time.monotonic()
        forget_in_children(self)

    # Messages

    def send(self, channel: int, data: memoryview, destination: int) -> Operation:
        """Start to send a message."""
        operation = Operation(self, destination)
        with self.lock:
            if destination == self.rank:
                arrival = self._matching.begin(self.rank, channel, len(data))
                arrival.memory[:] = data
                arrival.filled = arrival.nbytes
                self._matching.complete(self.rank, channel, arrival)
                operation.done = True
                self._tell()
            elif self._why_not(destination) is None:
                operation.done = self._post(self._links[destination], channel, data, operation)
            else:
                operation.done = self.closed  # what cannot be sent by then is lost
        return operation

    def receive(self, channel: int, memory: memoryview, source: int) -> Operation:
        """Start to receive a message."""
        operation = Operation(self, source)
        with self.lock:
            self._matching.post(operation, channel, memory)
        return operation

    def links(self, peers: Sequence[int]) -> list[Link]:
        """Return the links to `peers`."""
        return [self._links[peer] for peer in peers]

    def swap(self, messages: Swap) -> list[Operation]:
        """Exchange messages as far as can be now; return what is still to be waited for."""
        with self.lock:
            here = self._arrived(messages)
            left = None if here is None else messages.now(here)
            if left is not None and not left:
                return []
            operations = []
            for number, link in enumerate(messages.links):
                sent, *come = NOTHING if left is None else left[number]
                views, memory = messages.left(number, sent), messages.theirs[number]
                if here and here[number]:
                    memory, come = None, []
                operations += self._go_on(link, messages.channel, views, memory, b"".join(come))
            return operations

    def _arrived(self, messages: Swap) -> tuple[bool, ...] | None:
        """Return which of the messages are there; None if their links are not free for others."""
        if self.closed or self._failure or not self._left.isdisjoint(messages.peers):
            return None
        for link in messages.links:
            if not link.between:
                return None
        if self._matching.is_empty(messages.channel):
            return messages.nothing_here
        return self._matching.collect(messages.channel, messages.peers, messages.theirs)

    def _go_on(
        self,
        link: Link,
        channel: int,
        views: list[memoryview],
        memory: memoryview | None,
        come: bytes,
    ) -> list[Operation]:
        """Let `views` go on their way, and what comes into `memory`, of which some has `come`."""
        sending, receiving = Operation(self, link.peer), Operation(self, link.peer)
        sending.done, receiving.done = not views, memory is None
        if memory is not None:
            self._matching.post(receiving, channel, memory)
        if self._why_not(link.peer) is None:
            try:
                if come and link.take(come):
                    self._tell()
                if views:
                    sending.done = link.go_on(views, sending)
                if not sending.done:
                    self._epoll.modify(link.sock, _OUT)
            except OSError as exc:
                self._lose(link, exc)
        return [sending, receiving]

    def take(self, channel: int, source: int) -> bytes | None:
        """Return the next message, of whatever length, if all of it is there.

        Raises:
            PeerError: there will be none.
        """
        with self.lock:
            self._progress()
            found = self._matching.take(channel, source)
            error = self._why_not(source) if found is None else None
        if error is not None:
            raise error
        return found

    def probe(self, channel: int) -> tuple[int, int] | None:
        """Return the source and length of a message for which no receive was posted, or None.

        Raises:
            PeerError: a rank of the job is lost.
        """
        with self.lock:
            self._progress()
            found = self._matching.first(channel)
            if found is None and self._failure and not self.closed:
                raise PeerError(self._failure)
        return found

    def end_channel(self, channel: int) -> None:
        """Forget a channel: what still comes for it is dropped."""
        with self.lock:
            self._matching.end(channel)

    def check(self, operation: Operation) -> None:
        """Raise why `operation` can never be complete, if so."""
        error = operation.error or self._why_not(operation.peer)
        if error is not None:
            raise error

    def _post(
        self, link: Link, channel: int, data: memoryview, operation: Operation | None = None
    ) -> bool:
        try:
            if link.send(channel, data, operation):
                return True
            self._epoll.modify(link.sock, _OUT)
        except OSError as exc:
            self._lose(link, exc)
        return False

    # Progress

    def progress(self) -> None:
        """Send and receive what can be now."""
        with self.lock:
            self._progress()

    def _progress(self) -> None:
        if not self.closed:
            self._serve(self._epoll.poll(0))

    def sleep(self, seen: int) -> int:
        """Sleep until `moves` is no longer `seen`, but not for long.  Return `moves`."""
        with self.lock:
            if self.moves != seen or self.closed:
                return self.moves
            if self._leading:
                self._followers += 1
                self._changed.wait(_LONGEST_SLEEP)
                self._followers -= 1
                return self.moves
            self._leading = True
        events: list[tuple[int, int]] = []
        try:
            with suppress(ValueError):  # it was closed meanwhile
                events = self._epoll.poll(_LONGEST_SLEEP)
        finally:
            with self.lock:
                self._leading = False
                if not self.closed:
                    if any(handle == self._bell for handle, _ in events):
                        os.eventfd_read(self._bell)  # nobody else does: it woke this thread
                    self._serve(events)
                self._changed.notify_all()  # one of those who wait there is to sleep here
        return self.moves

    def ring(self) -> None:
        """Let everybody who waits look again.  From any thread."""
        with self.lock:
            self._tell()

    def _tell(self) -> None:
        self.moves += 1
        if self._followers:
            self._changed.notify_all()
        if self._leading and not self.closed:
            os.eventfd_write(self._bell, 1)

    def _serve(self, events: list[tuple[int, int]]) -> None:
        moved = 0
        for handle, mask in events:
            link = self._by_handle.get(handle)
            if link is None:
                continue
            try:
                if mask & select.EPOLLOUT:
                    moved += link.flush()
                    if link.idle:
                        self._epoll.modify(link.sock, _IN)
                if mask & ~select.EPOLLOUT:
                    moved += link.receive()
            except OSError as exc:
                self._lose(link, exc)
        if moved:
            self._tell()
        now = time.monotonic()
        if now > self._watched + _WATCH_SECONDS:
            self._watch(now)

    # The end of a peer

    def _hear(self, source: int, message: bytes) -> None:
        """Note what another rank's mesh says."""
        self._left.add(source)
        if message[:1] == _ABORT and not self._failure:
            self._failure = message[1:].decode(errors="replace")

    def _watch(self, now: float) -> None:
        """Give up peers that owe an answer for too long; what nobody watched does not count."""
        since, self._watched = now - self._watched, now
        for link in list(self._by_handle.values()):
            if since > 2 * _WATCH_SECONDS:
                link.heard += since
            if link.is_silent(now, self._peer_timeout):
                self._lose(link, TimeoutError())

    def _lose(self, link: Link, reason: OSError) -> None:
        """Let go of a link; whoever is at its other end may have said why."""
        if self._by_handle.pop(link.sock.fileno(), None) is None:
            return
        if not isinstance(reason, TimeoutError):
            with suppress(OSError):
                while link.receive():
                    pass
        self._epoll.unregister(link.sock)
        link.sock.close()
        if link.peer not in self._left and not self._failure:
            why = str(reason.strerror or reason)
            if isinstance(reason, TimeoutError):  # of `_watch`, or of the kernel, by its keepalive
                why = f"it has not answered for {self._peer_timeout:g} s (HVDKIT_PEER_TIMEOUT)"
            self._failure = f"{self._label(link.peer)} is lost: {why}"
        self._tell()

    def _why_not(self, peer: int) -> PeerError | None:
        """Return why nothing can go to `peer` or come from it any more, if so."""
        if self._failure:
            return PeerError(self._failure)
        if peer in self._left:
            return PeerError(f"{self._label(peer)} has left the job, and is waited for")
        return None

    def _label(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}" if rank in self.hosts else f"rank {rank}"

    # The end of this rank

    def close(self) -> None:
        """Say goodbye and let go of everything; what cannot be sent within a second is lost."""
        deadline = time.monotonic() + SECONDS_TO_LEAVE
        with self.lock:
            if self.closed:
                return
            if self._failure:
                self._spread(self._failure, deadline)
            else:
                self._say(_GOODBYE)
        while not self._failure and time.monotonic() < deadline:
            with self.lock:
                self._serve(self._epoll.poll(0))
                seen = self.moves
                if all(x.idle and x.peer in self._left for x in self._by_handle.values()):
                    break
            self.sleep(seen)
        with self.lock:
            self._tell()
            for link in self._links.values():
                link.forget()
            self._failure = self._failure or "this rank has left the job: hvdkit was shut down"
            self.closed = True
            # Nobody may be asleep in epoll when it is closed, but a signal's handler may close.
            self._changed.wait_for(lambda: not self._leading, SECONDS_TO_LEAVE)
            self._drop()

    def abort(self, code: int) -> None:
        """Tell every peer that this process ends; nothing is sent nor received from then on."""
        text = f"{self._label(self.rank)} has ended the job with exit code {code}"
        if self.lock.acquire(timeout=SECONDS_TO_LEAVE) and not self.closed:
            self._spread(self._failure or text, time.monotonic() + SECONDS_TO_LEAVE)

    def _spread(self, failure: str, deadline: float) -> None:
        """Tell every peer why the job has failed: some may notice nothing but this rank's end."""
        for link in self._links.values():
            link.hurry()
        self._say(_ABORT + failure.encode())
        while time.monotonic() < deadline:
            if all(link.idle for link in self._by_handle.values()):
                break
            self._serve(self._epoll.poll(0.01))

    def _say(self, message: bytes) -> None:
        for link in list(self._by_handle.values()):
            self._post(link, CONTROL, memoryview(message))

    def _drop(self) -> None:
        """Close all handles, without a word."""
        for link in self._links.values():
            link.sock.close()
        self._epoll.close()
        os.close(self._bell)

    def forget(self) -> None:
        """Let go of the links in a forked child: it would keep them open when its parent dies."""
        self.lock = threading.Lock()  # whoever held the other is not in this process
        self._changed = threading.Condition(self.lock)
        if not self.closed:
            self._failure = "this process is a forked child of a rank, and no rank itself"
            self.closed = True
            self._drop()
