"""One link: a socket to another rank, with what is to be sent and what is being received.

A message is a header and its bytes.  The bytes are sent from the user's memory and received into
it: what comes along with the header, up to `STAGE_BYTES`, by way of the stage; the rest directly.

    socket ---> stage: header | bytes | header | bytes ...    few system calls for small messages
        \\-----> the receiver's own memory                      no copy for large ones
"""

from __future__ import annotations

import functools
import socket
import struct
import time
from collections import deque
from pathlib import Path
from typing import Protocol

from hvdkit.transport.tcp.messages import Arrival, Operation

#: The communicator's number, and how many bytes follow.
HEADER = struct.Struct("<QQ")
STAGE_BYTES = 16 * 1024
#: What one look at a link handles at most, each way: others wait for their turn meanwhile.
TURN_BYTES = 4 << 20
#: Of a socket's own memory, each way, if the system grants it.
SOCKET_BYTES = 4 << 20

_KEEPALIVE_PROBES = 2

#: What `silence_of` looks at: struct tcp_info of <linux/tcp.h>, up to tcpi_last_ack_recv.
_TCP_INFO = struct.Struct("=8B13I")
_PROBES, _UNACKED, _LAST_ACK = 3, 12, 20


class Receiver(Protocol):
    """Who knows where messages go."""

    def begin(self, source: int, channel: int, nbytes: int) -> Arrival:
        """Return where a message goes of which the header has come."""
        ...

    def complete(self, source: int, channel: int, arrival: Arrival) -> None:
        """Note that all of a message is there."""
        ...


class _Departure:
    """A message of which not all has been sent."""

    __slots__ = ("operation", "views")

    def __init__(self, views: list[memoryview], operation: Operation | None) -> None:
        self.views = views
        self.operation = operation


class Link:
    """One rank's end of a connection to rank `peer`.  Whoever uses it holds the network's lock."""

    def __init__(self, sock: socket.socket, peer: int, receiver: Receiver) -> None:
        self.sock = sock
        self.peer = peer
        self.heard = time.monotonic()
        """When this end last had reason to believe in the other; see `is_silent`."""
        self._receiver = receiver
        self._departures: deque[_Departure] = deque()
        self._stage = memoryview(bytearray(STAGE_BYTES))
        self._staged = 0
        self._arrival: Arrival | None = None
        self._channel = 0

    @property
    def idle(self) -> bool:
        """Whether all that was to be sent has been."""
        return not self._departures

    @property
    def between(self) -> bool:
        """Whether no message is on its way, in either direction, as far as this end knows."""
        return not self._departures and self._arrival is None and not self._staged

    # Sending

    def send(self, channel: int, data: memoryview, operation: Operation | None) -> bool:
        """Send a message as far as can be now; return whether that was all of it.

        Raises:
            OSError: the connection is lost.
        """
        return self.go_on([memoryview(HEADER.pack(channel, len(data))), data], operation)

    def go_on(self, views: list[memoryview], operation: Operation | None) -> bool:
        """Send a message, or the rest of one, as far as can be now; return whether that was all.

        Raises:
            OSError: the connection is lost.
        """
        if self._departures or not self._write(views):
            self._departures.append(_Departure(views, operation))
            return False
        return True

    def flush(self) -> int:
        """Go on sending; return how many messages are complete by that.

        Raises:
            OSError: the connection is lost.
        """
        completed = 0
        while self._departures:
            departure = self._departures[0]
            if not self._write(departure.views):
                break
            self._departures.popleft()
            completed += 1
            if departure.operation is not None:
                departure.operation.done = True
        return completed

    def hurry(self) -> None:
        """Forget what has not been begun, so that something more urgent can be sent."""
        while len(self._departures) > 1:
            self._departures.pop()
        if self._departures:
            views = self._departures[0].views
            if len(views) == 2 and len(views[0]) == HEADER.size:
                self._departures.clear()

    def forget(self) -> None:
        """Count what has not been sent as sent: nobody will."""
        for departure in self._departures:
            if departure.operation is not None:
                departure.operation.done = True
        self._departures.clear()

    def _write(self, views: list[memoryview]) -> bool:
        """Send of `views`, which are shortened by that; return whether nothing is left."""
        turn = TURN_BYTES
        while turn > 0:
            try:
                sent = self.sock.sendmsg(views)
            except BlockingIOError:
                return False
            turn -= sent
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if not views:
                return True
            views[0] = views[0][sent:]
        return False

    # Receiving

    def receive(self) -> int:
        """Take what has come; return how many messages are complete by that.

        Raises:
            OSError: the connection is lost, or was closed.
        """
        completed, turn = 0, TURN_BYTES
        while turn > 0:
            place = self._place()
            try:
                count = self.sock.recv_into(place)
            except BlockingIOError:
                break
            if count == 0:
                raise ConnectionError("its connection was closed")
            completed += self._took(count)
            if count < len(place):
                break
            turn -= count
        return completed

    def take(self, data: bytes) -> int:
        """Take what somebody else has received; return how many messages are complete by that."""
        completed, left = 0, memoryview(data)
        while left:
            place = self._place()
            count = min(len(place), len(left))
            place[:count] = left[:count]
            completed += self._took(count)
            left = left[count:]
        return completed

    def _place(self) -> memoryview:
        """Return where what comes next goes."""
        if self._arrival is None:
            return self._stage[self._staged :]
        return self._arrival.memory[self._arrival.filled :]

    def _took(self, count: int) -> int:
        """Note what has come there; return how many messages are complete by that."""
        if self._arrival is None:
            self._staged += count
            return self._unpack()
        self._arrival.filled += count
        return self._finish()

    def _unpack(self) -> int:
        """Hand on what is in the stage; return how many messages are complete by that."""
        stage, at, end, completed = self._stage, 0, self._staged, 0
        while end - at >= HEADER.size:
            self._channel, nbytes = HEADER.unpack_from(stage, at)
            at += HEADER.size
            arrival = self._arrival = self._receiver.begin(self.peer, self._channel, nbytes)
            there = min(nbytes, end - at)
            arrival.memory[:there] = stage[at : at + there]
            arrival.filled = there
            at += there
            completed += self._finish()
        if at:
            stage[: end - at] = bytes(stage[at:end])  # less than a header
            self._staged = end - at
        return completed

    def _finish(self) -> int:
        arrival = self._arrival
        if arrival is None or arrival.filled < arrival.nbytes:
            return 0
        self._arrival = None
        self._receiver.complete(self.peer, self._channel, arrival)
        return 1

    # Whether anybody is there

    def is_silent(self, now: float, limit: float) -> bool:
        """Return whether the other end has not answered for `limit` seconds, although it should.

        To be asked every second or so.  TCP_USER_TIMEOUT would do the same, but also ends a
        connection whose other end is alive and computes, and takes no data for that long.
        """
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        except OSError:
            return False  # it is lost, which whoever reads it finds out
        silence = silence_of(info)
        self.heard = now if silence is None else max(self.heard, now - silence)
        return now - self.heard > limit


def silence_of(tcp_info: bytes) -> float | None:
    """Return for how many seconds a connection has waited for an answer; None if for none.

    A full receiver answers too, when it is asked whether it has room: it is only one that has not
    answered the last two such questions that may be gone.
    """
    if len(tcp_info) < _TCP_INFO.size:
        return None
    fields = _TCP_INFO.unpack_from(tcp_info)
    if not fields[_UNACKED] and fields[_PROBES] < 2:
        return None
    return float(fields[_LAST_ACK]) / 1000


def prepare(sock: socket.socket, peer_timeout: float) -> None:
    """Set what a link's socket needs: no delay, large buffers, and an end when the peer is gone."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, kind in ((socket.SO_SNDBUF, "w"), (socket.SO_RCVBUF, "r")):
        if size := _fixed_size(kind):
            sock.setsockopt(socket.SOL_SOCKET, option, size)
    seconds = max(1, int(peer_timeout / (1 + _KEEPALIVE_PROBES)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


@functools.cache
def _fixed_size(kind: str, settings: Path = Path("/proc/sys/net")) -> int:
    """Return the size to give a socket's buffer, 0 if the kernel finds a better one by itself.

    A size that is set ends the kernel's own tuning, which goes up to 4 or 6 MiB by default.
    """
    try:
        tuned = int((settings / f"ipv4/tcp_{kind}mem").read_text().split()[2])
        granted = int((settings / f"core/{kind}mem_max").read_text())
    except (OSError, ValueError, IndexError):
        return 0
    return SOCKET_BYTES if tuned < SOCKET_BYTES <= granted else 0
