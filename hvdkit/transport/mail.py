"""Mail: small control messages between ranks, for which a thread can sleep.

Between the ranks of a node it goes through pipes, one a rank, into which every peer writes: a
record of up to PIPE_BUF bytes goes in whole, whoever else writes.  A peer opens the pipe through
/proc, as it opens the arena's memory; so there is no address that a stranger could connect to, and
nothing is left behind.  Between nodes it goes as messages over MPI, which can only be asked for.
"""

from __future__ import annotations

import math
import os
import select
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import numpy as np

from hvdkit.errors import PeerError
from hvdkit.transport.base import Backoff, Bytes, Request, Transport

#: Writes of up to this many bytes into a pipe do not mix [POSIX, write()].  Linux's value.
_WHOLE = 4096
_HEADER = struct.Struct("<II")  # source, length; the top bit says that more of it follows
_MORE = 1 << 31
_PIECE = _WHOLE - _HEADER.size
_PIPE_BYTES = 1 << 20

#: How long `close` tries to deliver what could not be sent yet, to a peer that may be gone.
SECONDS_TO_DELIVER = 1.0


class Mail(Protocol):
    """Each rank's end.  Messages from one rank to another keep their order."""

    def send(self, destination: int, message: bytes) -> None:
        """Send without ever blocking; may be kept here until `receive` finds room for it."""
        ...

    def receive(self, timeout: float | None, *, patient: bool = False) -> list[tuple[int, bytes]]:
        """Return ``(source, message)`` pairs; sleep until there are some, or `wake`, or time is up.

        One thread receives; it is the one that sends as well.

        Args:
            timeout: seconds; None: no limit.
            patient: whether nobody waits for what comes, which may be noticed a little later.
        """
        ...

    def wake(self) -> None:
        """End a `receive` that sleeps, or the next one at once.  From any thread."""
        ...

    def close(self) -> None:
        """Let go of it.  Local; what cannot be sent within a second is lost."""
        ...


class PipeMail:
    """Mail among processes of one node.  Created collectively, by `PipeMail.create`."""

    def __init__(self, rank: int, inbox: int, outboxes: list[int]) -> None:
        self._rank = rank
        self._inbox = inbox
        self._outboxes = outboxes
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # `close` leaves it open: a thread may be in `wake`, and the number be another file's soon.
        weakref.finalize(self, os.close, self._bell).atexit = False
        self._poll = select.poll()
        self._poll.register(inbox, select.POLLIN)
        self._poll.register(self._bell, select.POLLIN)
        self._unsent: dict[int, deque[bytes]] = {}
        self._pieces: dict[int, list[bytes]] = {}
        self._read = b""

    @classmethod
    def create(cls, local: Transport) -> PipeMail | str:
        """Connect all ranks of `local`.  Collective.  Return why it cannot be, the same on all."""
        inbox, keep_open = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        addresses = local.allgather_object((os.getpid(), keep_open, os.fstat(keep_open).st_ino))
        outboxes: list[int] = []
        trouble = ""
        try:
            for rank, (pid, handle, inode) in enumerate(addresses):
                path = f"/proc/{pid}/fd/{handle}"
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
                outboxes.append(os.dup(keep_open) if rank == local.rank else os.open(path, flags))
                if os.fstat(outboxes[-1]).st_ino != inode:  # containers count processes apart
                    raise OSError(f"{path} is another file here")
        except OSError as exc:
            trouble = f"rank {local.rank} of this node cannot open its peers' pipes ({exc})"
        else:
            with suppress(OSError, AttributeError):  # a larger pipe is a convenience
                import fcntl

                fcntl.fcntl(inbox, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        troubles = [text for text in local.allgather_object(trouble) if text]
        os.close(keep_open)
        if troubles:
            for handle in (inbox, *outboxes):
                os.close(handle)
            return troubles[0]
        return cls(local.rank, inbox, outboxes)

    def send(self, destination: int, message: bytes) -> None:
        waiting = self._unsent.get(destination)
        for start in range(0, max(1, len(message)), _PIECE):
            piece = message[start : start + _PIECE]
            more = _MORE if start + _PIECE < len(message) else 0
            record = _HEADER.pack(self._rank, len(piece) | more) + piece
            if waiting is None and self._write(destination, record):
                continue
            if waiting is None:
                waiting = self._unsent[destination] = deque()
                self._poll.register(self._outboxes[destination], select.POLLOUT)
            waiting.append(record)

    def receive(
        self,
        timeout: float | None,
        *,
        patient: bool = False,  # noqa: ARG002  (to wait here costs nothing)
    ) -> list[tuple[int, bytes]]:
        messages = self._parse()
        if messages:
            return messages
        for handle, _ in self._poll.poll(None if timeout is None else math.ceil(timeout * 1000)):
            if handle == self._bell:
                os.eventfd_read(self._bell)
            elif handle == self._inbox:
                self._read += os.read(self._inbox, _PIPE_BYTES)
            else:
                self._flush(self._outboxes.index(handle))
        return self._parse()

    def wake(self) -> None:
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_DELIVER
        while self._unsent and time.monotonic() < deadline:
            self.receive(0.01)
        for handle in (self._inbox, *self._outboxes):
            os.close(handle)

    def _write(self, destination: int, record: bytes) -> bool:
        try:
            os.write(self._outboxes[destination], record)
        except BlockingIOError:
            return False
        except BrokenPipeError:  # a peer that is gone; what waits for it finds out
            pass
        return True

    def _flush(self, destination: int) -> None:
        waiting = self._unsent[destination]
        while waiting and self._write(destination, waiting[0]):
            waiting.popleft()
        if not waiting:
            del self._unsent[destination]
            self._poll.unregister(self._outboxes[destination])

    def _parse(self) -> list[tuple[int, bytes]]:
        """Return the messages that are complete in what was read."""
        data, at, messages = self._read, 0, []
        while len(data) - at >= _HEADER.size:
            source, length = _HEADER.unpack_from(data, at)
            end = at + _HEADER.size + (length & ~_MORE)
            if end > len(data):
                break
            pieces = self._pieces.setdefault(source, [])
            pieces.append(data[at + _HEADER.size : end])
            if not length & _MORE:
                messages.append((source, b"".join(pieces)))
                pieces.clear()
            at = end
        self._read = data[at:]
        return messages


class WatchedMail:
    """Mail that fails when a rank is lost, of which pipes tell nothing.

    Where no launcher ends the others, they would wait for that rank's messages for ever.

    Args:
        mail: any.
        look: raises PeerError if a rank is lost; called once a second and more often.
    """

    SECONDS = 1.0

    def __init__(self, mail: Mail, look: Callable[[], object]) -> None:
        self._mail = mail
        self._look = look
        self.send = mail.send
        self.wake = mail.wake
        self.close = mail.close

    def receive(self, timeout: float | None, *, patient: bool = False) -> list[tuple[int, bytes]]:
        messages = self._mail.receive(
            self.SECONDS if timeout is None else min(timeout, self.SECONDS), patient=patient
        )
        if not messages:
            self._look()
        return messages


class MessageTransport(Transport, Protocol):
    """A transport that can also take messages whose coming nobody knew of."""

    def incoming(self) -> tuple[int, int] | None:
        """Return ``(source, bytes)`` of a message that can be received now, or None."""
        ...


class _Naps(Backoff):
    """A wait between whose looks another thread may end the nap."""

    __slots__ = ("woken",)

    def __init__(self) -> None:
        self.woken = threading.Event()
        super().__init__(0)

    def _nap(self, seconds: float) -> None:
        self.woken.wait(seconds)


class MessageMail:
    """Mail over a transport of its own.

    Between nodes there is nothing to sleep on: while it waits, it looks once a millisecond.  Each
    look takes the core, and the transport, from a thread that reduces; so one who is patient looks
    once in `PATIENCE` seconds.
    """

    PATIENCE = 10e-3

    def __init__(self, transport: MessageTransport) -> None:
        self._transport = transport
        self._backoff = Backoff(0)
        self._naps = _Naps()
        self._sent: deque[tuple[Request, Bytes]] = deque()

    def send(self, destination: int, message: bytes) -> None:
        data = np.frombuffer(message, np.uint8)
        self._sent.append((self._transport.isend(data, destination), data))

    def receive(self, timeout: float | None, *, patient: bool = False) -> list[tuple[int, bytes]]:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._naps.longest_sleep = self.PATIENCE if patient else Backoff.LONGEST_SLEEP
        self._naps.reset()
        while True:
            while self._sent and _is_over(self._sent[0][0]):
                self._sent.popleft()
            messages = []
            while (found := self._transport.incoming()) is not None:
                source, nbytes = found
                data = np.empty(nbytes, np.uint8)
                self._backoff.wait(self._transport.irecv(data, source))
                messages.append((source, data.tobytes()))
            late = deadline is not None and time.monotonic() >= deadline
            if messages or late or self._naps.woken.is_set():
                self._naps.woken.clear()
                return messages
            self._naps.pause()

    def wake(self) -> None:
        self._naps.woken.set()

    def close(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_DELIVER
        with suppress(PeerError):
            while self._sent and time.monotonic() < deadline:
                self.receive(0.0)
                self._backoff.pause()


def _is_over(request: Request) -> bool:
    """Return whether a message was sent, or never will be: to a peer that is gone.

    What waits for that peer finds out.
    """
    try:
        return request.Test()
    except PeerError:
        return True
