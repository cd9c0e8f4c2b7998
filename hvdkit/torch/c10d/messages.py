"""Messages from one rank to another, matched by sender and tag.

    sender     header: bytes, tag of the data     data, on that tag
    receiver   header  ->  as expected?           data, into the tensor or into the void

The header is matched by the user's tag.  It lets the receiver see a message of the wrong length
before there is harm: MPI libraries differ in what they do with one that is too long.

A thread looks after what nobody waits for, such as a receive that was started before a barrier, in
which this rank waits for the sender.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hvdkit.engine.handles import Handle
from hvdkit.errors import ArgumentError, HorovodInternalError, MismatchError, PeerError
from hvdkit.transport.base import Backoff, Bytes, Request

#: Messages from one rank to another that may be under way at once.  Tags reach 32767 at least.
MOST_UNDER_WAY = 1 << 14

#: How often the thread looks.  Whoever waits looks more often.
SECONDS_BETWEEN_LOOKS = 1e-3


class Messages:
    """The messages among the ranks of a transport.  Threads may share it.

    Args:
        transport: of the group; nothing else goes over it.
        seconds: for which a message is waited for, unless told otherwise.
        threaded: whether another thread than the caller's may communicate.  If not, messages
            only move while some message is waited for.
    """

    def __init__(self, transport: Any, seconds: float, *, threaded: bool) -> None:
        self.transport = transport
        self.seconds = seconds
        self.threaded = threaded
        self._lock = threading.Lock()
        self._under_way: list[Message] = []
        self._number = 0
        self._stop: Exception | None = None
        self._news = threading.Event()
        self._thread: threading.Thread | None = None

    def send(self, data: Bytes, destination: int, tag: int, title: str) -> Message:
        """Start to send; `data` (1-D) must stay as it is until the message is complete.

        Raises:
            ArgumentError: a tag that MPI does not take.
        """
        return self._start(Message(self, title, data, tag), destination)

    def receive(
        self,
        data: Bytes,
        source: int | None,
        tag: int,
        title: str,
        *,
        finish: Callable[[], None],
    ) -> Message:
        """Start to receive into `data`, from whoever comes first if `source` is None.

        `finish` is called when it has come.
        """
        return self._start(Message(self, title, data, tag, finish=finish), source)

    def progress(self) -> None:
        """Move on what is under way; never blocks for long."""
        with self._lock:
            done = [message for message in self._under_way if message.advance(self._stop)]
            if done:
                self._under_way = [other for other in self._under_way if other not in done]
        for message in done:
            message.settle()

    def abort(self, error: Exception) -> None:
        """End whatever is under way, now and later, with `error`.  From any thread."""
        self._stop = self._stop or error

    def close(self) -> None:
        """End what is still under way, and let go of the transport.  Collective."""
        self.abort(HorovodInternalError("the process group was destroyed"))
        self._news.set()
        if self._thread is not None:
            self._thread.join()
        self.progress()
        self.transport.close()

    def new_tag(self) -> int:
        """Return the tag of a message's data: odd, where the users' tags make even ones."""
        self._number = (self._number + 1) % MOST_UNDER_WAY
        return 2 * self._number + 1

    def _start(self, message: Message, peer: int | None) -> Message:
        with self._lock:
            try:
                message.post(peer)
            except (RuntimeError, OverflowError) as exc:  # MPI's errors are RuntimeErrors
                raise ArgumentError(f"{message.title}: MPI refuses it: {exc}") from exc
            self._under_way.append(message)
            if self._thread is None and self.threaded:
                name = "hvdkit-messages"
                self._thread = threading.Thread(target=self._look, name=name, daemon=True)
                self._thread.start()
        self._news.set()
        return message

    def _look(self) -> None:
        while self._stop is None:
            self._news.wait()
            self._news.clear()
            while self._under_way and self._stop is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                self.progress()


class Message:
    """One message under way, as its sender or its receiver sees it.

    Args:
        among: to which it belongs.
        title: what it is, for errors.
        data: what is sent, or received into.
        tag: the user's, 0 or more.
        finish: is called when it has come; None on the sender.
    """

    def __init__(
        self,
        among: Messages,
        title: str,
        data: Bytes,
        tag: int,
        *,
        finish: Callable[[], None] | None = None,
    ) -> None:
        if tag < 0:
            raise ArgumentError(f"{title}: tags are 0 or more")
        self.title = title
        self._handle: Handle[int | None] = Handle(title)
        self._among = among
        self._data = data
        self._tag = 2 * tag
        self._finish = finish
        self._peer: int | None = None
        self._header = np.zeros(2, np.int64)  # bytes, tag of the data
        self._requests: list[Request] = []
        self._error: Exception | None = None

    def poll(self) -> bool:
        """Return whether it is complete; never blocks."""
        if not self._handle.poll():
            self._among.progress()
        return self._handle.poll()

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the other rank when the message is complete.  Blocking.

        Raises:
            TimeoutError: it is not, after `timeout` seconds; it goes on.
            MismatchError: on the receiver, if it has another length than the array.
        """
        seconds = timeout or self._among.seconds
        deadline = time.monotonic() + seconds
        backoff = Backoff(self._among.transport.backoff.spin)
        while not self.poll():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.title} did not complete within {seconds:g} s")
            backoff.pause()
        return self._handle.wait()

    def when_done(self, callback: Callable[[Handle[int | None]], None]) -> None:
        """Call `callback` once the message is complete, on whichever thread sees that."""
        if not self._among.threaded:
            self.wait()
        self._handle.when_done(callback)

    # For `Messages`

    def post(self, peer: int | None) -> None:
        """Hand it to the transport; without a `peer`, as soon as one has sent."""
        self._peer = peer
        if peer is None:
            return
        among, header = self._among.transport, self._header.view(np.uint8)
        headers = among.tagged(self._tag)
        if self._finish is not None:
            self._requests = [headers.irecv(header, peer)]
            return
        self._header[:] = self._data.size, self._among.new_tag()
        data = among.tagged(int(self._header[1]))
        self._requests = [headers.isend(header, peer), data.isend(self._data, peer)]

    def advance(self, stop: Exception | None) -> bool:
        """Move it on; return whether it is complete, or ended: by `stop`, or for a lost rank."""
        if stop is not None:
            self._error = stop
            return True
        try:
            return self._advance()
        except PeerError as exc:
            self._error = exc
            return True

    def _advance(self) -> bool:
        if not self._requests:
            found = self._among.transport.tagged(self._tag).incoming()
            if found is None:
                return False
            self.post(found[0])
        if not self._requests[0].Test():
            return False
        if len(self._requests) == 1:
            self._receive_data()
        return self._requests[1].Test()

    def settle(self) -> None:
        """Complete it, for whoever waits."""
        if self._error is not None:
            self._handle.fail(self._error)
            return
        if self._finish is not None:
            self._finish()
        self._data, self._finish = self._data[:0], None
        self._handle.complete(self._peer)

    def _receive_data(self) -> None:
        """Post the receive of what the header announces."""
        assert self._peer is not None
        nbytes, tag = self._header.tolist()
        if nbytes != self._data.size:
            self._error = MismatchError(
                f"{self.title}: rank {self._peer} sent {nbytes} bytes, and the tensor takes "
                f"{self._data.size}\nSend and receive tensors of the same shape and dtype."
            )
            self._data = np.empty(nbytes, np.uint8)  # to be rid of it
        self._requests.append(self._among.transport.tagged(tag).irecv(self._data, self._peer))
