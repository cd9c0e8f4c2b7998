"""Messages, and how those that arrive find the receives that wait for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from hvdkit.errors import HorovodInternalError

#: The channel of what the ranks' meshes tell each other; all others are communicators'.
CONTROL = 0


class Network(Protocol):
    """Who makes the links of a rank go on."""

    def progress(self) -> None:
        """Send and receive what can be now."""
        ...

    def check(self, operation: Operation) -> None:
        """Raise why `operation` can never be complete, if so."""
        ...


class Operation:
    """A message in flight: sent to `peer`, or received from it."""

    __slots__ = ("_network", "done", "error", "peer")

    def __init__(self, network: Network, peer: int) -> None:
        self._network = network
        self.peer = peer
        self.done = False
        self.error: Exception | None = None

    def Test(self) -> bool:  # noqa: N802  (mpi4py's own name)
        """Return whether the message is complete; never blocks.

        Raises:
            PeerError: it never will be.
        """
        if not self.done:
            self._network.progress()
            if not self.done:
                self._network.check(self)
        return self.done


class Arrival:
    """A message that is arriving, or has arrived."""

    __slots__ = ("filled", "memory", "nbytes", "operation")

    def __init__(self, memory: memoryview, operation: Operation | None = None) -> None:
        self.memory = memory
        self.nbytes = len(memory)
        self.filled = 0
        self.operation = operation
        """The receive that waits for it, if one was posted."""

    @classmethod
    def unexpected(cls, nbytes: int) -> Arrival:
        """Return an arrival in memory of its own."""
        return cls(np.empty(nbytes, np.uint8).data)


class _Inbox:
    """The messages of one channel from one rank, in order: there are more receives, or arrivals."""

    __slots__ = ("arrived", "posted")

    def __init__(self) -> None:
        self.arrived: deque[Arrival] = deque()
        self.posted: deque[tuple[Operation, memoryview]] = deque()


class Matching:
    """The messages and the receives of one rank.  Whoever uses it sees to it that nobody else does.

    Args:
        rank: this one, for errors.
        control: is called with the source and the bytes of each message on the control channel.
    """

    def __init__(self, rank: int, control: Callable[[int, bytes], None]) -> None:
        self._rank = rank
        self._control = control
        self._inboxes: dict[int, dict[int, _Inbox]] = {}
        self._over: set[int] = set()

    def post(self, operation: Operation, channel: int, memory: memoryview) -> None:
        """Receive the next message of the operation's peer in `channel` into `memory`."""
        inbox = self._inbox(channel, operation.peer)
        if not inbox.arrived:
            inbox.posted.append((operation, memory))
            return
        arrival = inbox.arrived.popleft()
        self._tidy(channel, operation.peer, inbox)
        if arrival.nbytes != len(memory):
            operation.error = self._mismatch(operation.peer, arrival.nbytes, len(memory))
            return
        memory[: arrival.filled] = arrival.memory[: arrival.filled]
        arrival.memory = memory  # where the rest of it goes
        arrival.operation = operation
        operation.done = arrival.filled == arrival.nbytes

    def first(self, channel: int) -> tuple[int, int] | None:
        """Return the source and length of a message for which no receive was posted, or None."""
        for source, inbox in self._inboxes.get(channel, {}).items():
            if inbox.arrived:
                return source, inbox.arrived[0].nbytes
        return None

    def is_empty(self, channel: int) -> bool:
        """Return whether no message of a channel is waited for, and none waits."""
        return channel not in self._inboxes and channel not in self._over

    def collect(
        self, channel: int, sources: Sequence[int], memories: Sequence[memoryview | None]
    ) -> tuple[bool, ...] | None:
        """Receive what has arrived from each of `sources`; return from which.

        None, with nothing received, if a receive waits already, or anything else has arrived.

        Args:
            channel: of the messages.
            sources: ranks.
            memories: where what they send goes; None: this one sends nothing.
        """
        inboxes = self._inboxes.get(channel, {})
        if channel in self._over or any(inbox.posted for inbox in inboxes.values()):
            return None
        found = [
            None if memory is None or source not in inboxes else inboxes[source].arrived[0]
            for source, memory in zip(sources, memories, strict=True)
        ]
        there = [
            (source, arrival, memory)
            for source, arrival, memory in zip(sources, found, memories, strict=True)
            if arrival is not None and memory is not None
        ]
        if any(not a.nbytes == a.filled == len(memory) for _, a, memory in there):
            return None
        for source, arrival, memory in there:
            memory[:] = arrival.memory
            inboxes[source].arrived.popleft()
            self._tidy(channel, source, inboxes[source])
        return tuple([arrival is not None for arrival in found])

    def take(self, channel: int, source: int) -> bytes | None:
        """Return the next message if all of it is there."""
        inbox = self._inboxes.get(channel, {}).get(source)
        if inbox is None or not inbox.arrived:
            return None
        if inbox.arrived[0].filled < inbox.arrived[0].nbytes:
            return None
        arrival = inbox.arrived.popleft()
        self._tidy(channel, source, inbox)
        return bytes(arrival.memory)

    def end(self, channel: int) -> None:
        """Forget a channel: what still comes for it is dropped."""
        self._over.add(channel)
        for inbox in self._inboxes.pop(channel, {}).values():
            for operation, _ in inbox.posted:
                operation.error = HorovodInternalError("a receive was given up: its group is gone")

    # What links ask

    def begin(self, source: int, channel: int, nbytes: int) -> Arrival:
        """Return where a message goes of which the header has come."""
        if channel == CONTROL or channel in self._over:
            return Arrival.unexpected(nbytes)
        inbox = self._inbox(channel, source)
        if inbox.posted:
            operation, memory = inbox.posted.popleft()
            self._tidy(channel, source, inbox)
            if len(memory) == nbytes:
                return Arrival(memory, operation)
            operation.error = self._mismatch(source, nbytes, len(memory))
            return Arrival.unexpected(nbytes)
        arrival = Arrival.unexpected(nbytes)
        inbox.arrived.append(arrival)
        return arrival

    def complete(self, source: int, channel: int, arrival: Arrival) -> None:
        """Note that all of a message is there."""
        if arrival.operation is not None:
            arrival.operation.done = True
        elif channel == CONTROL:
            self._control(source, bytes(arrival.memory))

    def _inbox(self, channel: int, source: int) -> _Inbox:
        return self._inboxes.setdefault(channel, {}).setdefault(source, _Inbox())

    def _tidy(self, channel: int, source: int, inbox: _Inbox) -> None:
        """Let go of an inbox that is empty: each tag has a channel, and there are many of these."""
        if not inbox.posted and not inbox.arrived:
            inboxes = self._inboxes[channel]
            del inboxes[source]
            if not inboxes:
                del self._inboxes[channel]

    def _mismatch(self, source: int, sent: int, expected: int) -> HorovodInternalError:
        return HorovodInternalError(
            f"rank {source} of the job sends {sent} bytes to rank {self._rank}, "
            f"which expects {expected}"
        )
