"""Arrays from rank to rank, handed over at once and carried by a thread of their own.

    send(array)                                                              receive(...)
       |  outbox                                                       inbox  ^
       v                                                                      |
    courier thread -- copies --> ring of slots, shared memory -- copies --> courier thread
                   ------------- mail: "slot 3 is full" ------------------>
                   <------------ mail: "a slot is free" --------------------

Neither call of the user's thread copies anything, and `send` never waits: what finds no free slot
stays where it is until one is free, while the sender computes.  So no order of sends and receives
can deadlock that would not with boundless buffers.  Where ranks share no memory, arrays go as
messages of the mail.  What an array is like is told once, and by a number from then on.
"""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvdkit.arrays import aligned_empty
from hvdkit.errors import HvdkitError, NotInitializedError, PeerError, StallError
from hvdkit.transport.base import Bytes, Transport
from hvdkit.transport.mail import SECONDS_TO_DELIVER, Mail, MessageMail, PipeMail, WatchedMail

log = logging.getLogger("hvdkit")

SLOTS = 16
SLOT_BYTES = 256 * 1024

#: Arrays of up to this many bytes go with the mail itself.
IN_MAIL = 2048

#: What a message of the mail is, and a number: of what the array is like, of a slot, of slots.
_RECORD = struct.Struct("<cI")
_LIKE, _ARRAY, _WHOLE, _SLOT, _FREE = b"L", b"A", b"W", b"S", b"F"


@dataclass(frozen=True)
class Like:
    """What ranks know of an array before it comes."""

    tag: Hashable
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Rings(Protocol):
    """Memory that every two ranks share, in `SLOTS` slots each way."""

    def outgoing(self, destination: int, slot: int) -> Bytes: ...

    def incoming(self, source: int, slot: int) -> Bytes: ...

    def close(self) -> None: ...


@dataclass
class _Sending:
    """One array on its way."""

    like: Like
    data: Bytes
    begun: bool = False
    sent: int = 0


@dataclass
class _Peer:
    """What is under way between this rank and another."""

    outbox: deque[_Sending] = field(default_factory=deque)
    told: dict[Like, int] = field(default_factory=dict)
    known: list[Like] = field(default_factory=list)
    free: int = SLOTS
    next_slot: int = 0
    filling: tuple[Like, Bytes] | None = None
    filled: int = 0


class Courier:
    """Carries arrays among the ranks of a transport.  Creating it is collective.

    Args:
        transport: for the courier alone.
        shared: whether ranks of one node may share memory.
        check: seconds after which a wait is worth a warning; 0: never.
        shutdown: seconds after which it is an error; 0: never.
        ranks: what messages call the ranks, in their order; None: 0, 1, ...
        look: raises PeerError if a rank is lost; None: whoever started the ranks sees to that.
    """

    def __init__(
        self,
        transport: Any,
        *,
        shared: bool,
        check: float = 0.0,
        shutdown: float = 0.0,
        ranks: Sequence[int] | None = None,
        look: Callable[[], object] | None = None,
    ) -> None:
        self.rank, self.size = transport.rank, transport.size
        self._called = tuple(range(self.size) if ranks is None else ranks)
        self._limits = check, shutdown
        mail, self._rings = _connect(transport, shared=shared)
        self._mail: Mail = mail if look is None else WatchedMail(mail, look)
        self._peers = {rank: _Peer() for rank in range(self.size)}
        self._outbox: deque[tuple[int, _Sending]] = deque()
        self._inbox: dict[tuple[int, Hashable], deque[NDArray[Any]]] = {}
        self._arrived = threading.Condition()
        self._failure: BaseException | None = None
        self._pace = min([0.5, *(limit / 4 for limit in self._limits if limit)])
        self._closing = 0.0  # when
        self.runs = 0
        """How many schedules its ranks have run: kept for `hvdkit.parallel`, which counts them."""
        self._thread = threading.Thread(target=self._live, name="hvdkit-courier", daemon=True)
        self._thread.start()

    # On the user's threads

    def send(self, destination: int, tag: Hashable, array: NDArray[Any]) -> None:
        """Send an array, which must stay as it is from now on.  Never waits.

        Args:
            destination: a rank, perhaps this one.
            tag: what `receive` asks for; arrays of one tag keep their order.
            array: of any dtype, shape and layout.
        """
        self._check()
        if destination == self.rank:
            self._deliver(destination, tag, array.copy())  # who receives it may change it
            return
        plain = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        like = Like(tag, array.shape, array.dtype)
        self._outbox.append((destination, _Sending(like, plain)))
        self._mail.wake()

    def receive(self, source: int, tag: Hashable) -> NDArray[Any]:
        """Return the next array from a rank under a tag.  Blocking.

        Raises:
            StallError: none came, for as long as ``HVDKIT_STALL_SHUTDOWN_TIME_SECONDS`` says.
        """
        key, began = (source, tag), time.monotonic()
        warned = False
        with self._arrived:
            while not self._inbox.get(key):
                self._check()
                self._arrived.wait(timeout=self._pace)
                warned = self._complain(key, time.monotonic() - began, warned=warned)
            return self._inbox[key].popleft()

    def _complain(self, key: tuple[int, Hashable], waited: float, *, warned: bool) -> bool:
        """Say that a wait is long; return whether that was said by now."""
        check, shutdown = self._limits
        what = (
            f"rank {self._called[self.rank]} waited {waited:.0f} s for {key[1]} of rank "
            f"{self._called[key[0]]}"
        )
        if shutdown and waited > shutdown:
            raise StallError(f"{what}\nThat rank computes, waits itself, or is gone.")
        if check and waited > check and not warned:
            log.warning("%s", what)
            return True
        return warned

    def close(self) -> None:
        """Send what waits to be sent, and end the thread.  Collective; what nobody took is lost."""
        self._closing = time.monotonic()
        self._mail.wake()
        self._thread.join()
        self._mail.close()
        if self._rings is not None:
            self._rings.close()

    def _check(self) -> None:
        if isinstance(self._failure, PeerError):
            raise PeerError(str(self._failure)) from self._failure
        if self._failure is not None:
            raise HvdkitError(f"hvdkit's courier failed: {self._failure!r}") from self._failure
        if self._closing:
            raise NotInitializedError("hvdkit was shut down")

    # On the courier's thread

    def _live(self) -> None:
        try:
            while not self._may_end():
                self._collect()
                for source, message in self._mail.receive(0.1 if self._closing else None):
                    self._take(source, message)
        except PeerError as exc:
            self._failure = exc
        except BaseException as exc:
            log.exception("hvdkit's courier failed")
            self._failure = exc
        with self._arrived:
            self._arrived.notify_all()

    def _may_end(self) -> bool:
        if not self._closing:
            return False
        sent = not self._outbox and not any(peer.outbox for peer in self._peers.values())
        return sent or time.monotonic() > self._closing + SECONDS_TO_DELIVER

    def _collect(self) -> None:
        while self._outbox:
            destination, sending = self._outbox.popleft()
            self._peers[destination].outbox.append(sending)
            self._push(destination)

    def _push(self, destination: int) -> None:
        """Send as much as there is room for."""
        peer = self._peers[destination]
        while peer.outbox:
            sending = peer.outbox[0]
            number = self._number(destination, sending.like)
            nbytes = len(sending.data)
            if nbytes <= IN_MAIL or self._rings is None:
                record = _RECORD.pack(_WHOLE, number)
                self._mail.send(destination, record + sending.data.tobytes())
                peer.outbox.popleft()
                continue
            if not sending.begun:
                sending.begun = True
                self._mail.send(destination, _RECORD.pack(_ARRAY, number))
            while sending.sent < nbytes and peer.free:
                piece = sending.data[sending.sent : sending.sent + SLOT_BYTES]
                self._rings.outgoing(destination, peer.next_slot)[: len(piece)] = piece
                self._mail.send(destination, _RECORD.pack(_SLOT, peer.next_slot))
                sending.sent += len(piece)
                peer.free -= 1
                peer.next_slot = (peer.next_slot + 1) % SLOTS
            if sending.sent < nbytes:
                return
            peer.outbox.popleft()

    def _number(self, destination: int, like: Like) -> int:
        """Return what stands for `like` in messages; told when it comes first."""
        told = self._peers[destination].told
        if like not in told:
            told[like] = len(told)
            self._mail.send(destination, _RECORD.pack(_LIKE, told[like]) + pickle.dumps(like))
        return told[like]

    def _take(self, source: int, message: bytes) -> None:
        """Do what a message of the mail asks for."""
        peer = self._peers[source]
        what, number = _RECORD.unpack_from(message)
        if what == _LIKE:
            peer.known.append(pickle.loads(message[_RECORD.size :]))
        elif what == _WHOLE:
            data = np.frombuffer(message, np.uint8, offset=_RECORD.size).copy()
            self._complete(source, peer.known[number], data)
        elif what == _ARRAY:
            like = peer.known[number]
            count = int(np.prod(like.shape, dtype=np.int64))
            peer.filling = like, aligned_empty((count,), like.dtype).view(np.uint8)
            peer.filled = 0
        elif what == _SLOT:
            self._fill(source, number)
        elif what == _FREE:
            peer.free += number
            self._push(source)

    def _fill(self, source: int, slot: int) -> None:
        peer, rings = self._peers[source], self._rings
        assert peer.filling is not None
        assert rings is not None
        like, data = peer.filling
        piece = data[peer.filled : peer.filled + SLOT_BYTES]
        piece[:] = rings.incoming(source, slot)[: len(piece)]
        peer.filled += len(piece)
        self._mail.send(source, _RECORD.pack(_FREE, 1))
        if peer.filled == len(data):
            peer.filling = None
            self._complete(source, like, data)

    def _complete(self, source: int, like: Like, data: Bytes) -> None:
        self._deliver(source, like.tag, data.view(like.dtype).reshape(like.shape))

    def _deliver(self, source: int, tag: Hashable, array: NDArray[Any]) -> None:
        with self._arrived:
            self._inbox.setdefault((source, tag), deque()).append(array)
            self._arrived.notify_all()


class Loopback:
    """What a courier is where there is but one rank."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.runs = 0
        self._inbox: dict[Hashable, deque[NDArray[Any]]] = {}

    def send(self, destination: int, tag: Hashable, array: NDArray[Any]) -> None:
        """Keep an array for `receive`."""
        assert destination == 0
        self._inbox.setdefault(tag, deque()).append(array.copy())

    def receive(self, source: int, tag: Hashable) -> NDArray[Any]:
        """Return the next array under a tag, which must be there."""
        assert source == 0
        return self._inbox[tag].popleft()


def _connect(transport: Any, *, shared: bool) -> tuple[Mail, Rings | None]:
    """Return the mail and, on one node, the memory of a courier.  Collective."""
    if transport.size == 1:
        shared = False
    if shared:
        local, topology = transport.split_by_node()
        local.close()
        shared = topology.local_size == topology.size
    if shared:
        mail = PipeMail.create(transport)
        rings = SharedRings.create(transport)
        if not isinstance(mail, str) and rings is not None:
            return mail, rings
        if not isinstance(mail, str):
            mail.close()
        if rings is not None:
            rings.close()
    return MessageMail(transport), None


class SharedRings:
    """Memory of one node's ranks: each has a file without a name, a ring in it for each peer."""

    BYTES = SLOTS * SLOT_BYTES

    def __init__(self, rank: int, maps: list[mmap.mmap]) -> None:
        self._rank = rank
        self._maps = maps
        self._views: list[Bytes] = [np.frombuffer(memory, np.uint8) for memory in maps]

    @classmethod
    def create(cls, local: Transport) -> SharedRings | None:
        """Map every rank's memory.  Collective.  Return None on all ranks if one cannot."""
        handle = os.memfd_create("hvdkit-rings", os.MFD_CLOEXEC)
        os.ftruncate(handle, local.size * cls.BYTES)
        files = local.allgather_object((os.getpid(), handle, os.fstat(handle).st_ino))
        maps: list[mmap.mmap] = []
        with suppress(OSError):
            for pid, number, inode in files:
                opened = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
                if os.fstat(opened).st_ino == inode:  # containers count processes apart
                    maps.append(mmap.mmap(opened, local.size * cls.BYTES))
                os.close(opened)
        complete = all(local.allgather_object(len(maps) == local.size))
        os.close(handle)
        return cls(local.rank, maps) if complete else None

    def outgoing(self, destination: int, slot: int) -> Bytes:
        return self._slot(self._rank, destination, slot)

    def incoming(self, source: int, slot: int) -> Bytes:
        return self._slot(source, self._rank, slot)

    def _slot(self, source: int, destination: int, slot: int) -> Bytes:
        begin = destination * self.BYTES + slot * SLOT_BYTES
        return self._views[source][begin : begin + SLOT_BYTES]

    def close(self) -> None:
        self._views.clear()
        for memory in self._maps:
            with suppress(BufferError):  # somebody still looks at it; then it goes with him
                memory.close()
