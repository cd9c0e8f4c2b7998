"""What the executor asks of a transport: nonblocking messages between ranks, and small control.

Three transports implement it: `hvdkit.transport.mpi` and `hvdkit.transport.tcp` for real,
`hvdkit.transport.threads` for tests and for reading along in one process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Topology:
    """Where a rank is: `local` counts the ranks of its node, `cross` the nodes."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int


class Request(Protocol):
    """A message in flight."""

    def Test(self) -> bool:  # noqa: N802  (mpi4py's own name, so that its requests fit as they are)
        """Return whether the message is complete; never blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes `start` to `stop` of some memory, which go to a rank or come from it."""

    rank: int
    start: int
    stop: int


class Prepared(Protocol):
    """Messages between one memory and others, set up to be exchanged again and again."""

    def run(self) -> None:
        """Exchange them; blocking.  Collective among those who have them."""
        ...

    def free(self) -> None:
        """Let go of what the transport keeps for them.  Local."""
        ...


class GeneralExchange:
    """A `Prepared` exchange of a transport that has nothing to prepare.

    Args:
        transport, memory, sends, receives, backoff: as `Transport.prepare_exchange` has them.
    """

    def __init__(
        self,
        transport: Transport,
        memory: Bytes,
        sends: Sequence[Part],
        receives: Sequence[Part],
        *,
        backoff: Backoff,
    ) -> None:
        self._transport = transport
        self._backoff = backoff
        self._sends = [(memory[part.start : part.stop], part.rank) for part in sends]
        self._receives = [(memory[part.start : part.stop], part.rank) for part in receives]

    def run(self) -> None:
        requests = [self._transport.irecv(*receive) for receive in self._receives]
        requests += [self._transport.isend(*send) for send in self._sends]
        for request in requests:
            self._backoff.wait(request)

    def free(self) -> None:
        pass


def exchanged_rows(rows: NDArray[np.int64], rank: int) -> tuple[Bytes, list[Part], list[Part]]:
    """Return an all-gather of `rows` as an exchange: everyone's row goes to everyone else."""
    width = rows.shape[1] * rows.itemsize
    others = [peer for peer in range(len(rows)) if peer != rank]
    sends = [Part(peer, rank * width, (rank + 1) * width) for peer in others]
    receives = [Part(peer, peer * width, (peer + 1) * width) for peer in others]
    return rows.reshape(-1).view(np.uint8), sends, receives


class GeneralAllgather:
    """A `Prepared` all-gather of a transport that has nothing to prepare."""

    def __init__(self, transport: Transport, rows: NDArray[np.int64]) -> None:
        self._transport = transport
        self._rows = rows

    def run(self) -> None:
        self._rows[:] = self._transport.allgather_ints(self._rows[self._transport.rank])

    def free(self) -> None:
        pass


class Transport(Protocol):
    """Messages among `size` ranks.  Those from one rank to another keep their order."""

    rank: int
    size: int

    def isend(self, data: Bytes, destination: int) -> Request:
        """Start to send `data` (1-D, contiguous); it must stay as it is until complete."""
        ...

    def irecv(self, data: Bytes, source: int) -> Request:
        """Start to receive into `data`; its length is the message's."""
        ...

    def allgather_ints(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return every rank's `values` (1-D, of one length on all ranks) as ``(size, length)``."""
        ...

    def prepare_allgather(self, rows: NDArray[np.int64]) -> Prepared:
        """Return an all-gather of `rows`, ``(size, length)``, each rank's in its place.  Local.

        Ranks run what they prepared of one length in one order.
        """
        ...

    def prepare_exchange(
        self, memory: Bytes, sends: Sequence[Part], receives: Sequence[Part], backoff: Backoff
    ) -> Prepared:
        """Return an exchange of parts of `memory` with other ranks.  Local.

        Ranks run what they prepared with each other in one order, apart from all other messages.

        Args:
            memory: stays where it is.
            sends, receives: in order, where there are several of one rank; no receive overlaps
                another part.
            backoff: how to wait.
        """
        ...

    def allgather_object(self, value: T) -> list[T]:
        """Return every rank's `value`, pickled: for small control data only."""
        ...

    def broadcast_object(self, value: Any, root: int) -> Any:
        """Return the root's `value` on every rank, pickled: for small control data only."""
        ...

    def new_backoff(self, spin: int) -> Backoff:
        """Return what waits for this transport's requests, in one thread.  Local."""
        ...

    def close(self) -> None:
        """Let go of whatever is held for the messages.  Collective."""
        ...

    def interrupt(self, error: Exception) -> None:
        """End waits for control data, now and later, with `error`.  From any thread."""
        ...


class Backoff:
    """How a rank waits: look, then offer the core to others, then sleep a little.

    More ranks than cores is normal.  A rank that only looks would burn the time slice in which the
    peer it waits for could have sent the message.
    """

    YIELDS = 200
    LONGEST_SLEEP = 1e-3

    __slots__ = ("_looks", "_sleep", "abandoned", "longest_sleep", "spin", "stop")

    def __init__(self, spin: int) -> None:
        self.spin = spin
        self.longest_sleep = self.LONGEST_SLEEP
        """Seconds."""
        self.stop: Exception | None = None
        """Set by another thread to end the wait: raised by whoever pauses."""
        self.abandoned: list[object] = []
        """What holds the memory of messages that were given up: they may yet come, long after."""
        self.reset()

    def reset(self) -> None:
        """Start afresh, after something has happened."""
        self._looks = 0
        self._sleep = 10e-6

    def pause(self) -> None:
        """Wait a moment, longer the longer nothing has happened."""
        self._looks += 1
        if self._looks <= self.spin:
            return
        if self.stop is not None:
            raise self.stop
        if self._looks <= self.spin + self.YIELDS:
            self._yield()
            return
        self._nap(self._sleep)
        self._sleep = min(self._sleep * 1.5, self.longest_sleep)

    def _nap(self, seconds: float) -> None:
        time.sleep(seconds)

    def _yield(self) -> None:
        os.sched_yield()
        if self._looks % 8 == 0:
            time.sleep(0)  # lets go of the GIL, which sched_yield does not

    def wait(self, request: Request) -> None:
        """Return when `request` is complete."""
        self.reset()
        try:
            while not request.Test():
                self.pause()
        except BaseException:
            self.abandoned.append(request)
            raise


class JobTransport(Transport, Protocol):
    """The transport of a job, from which those of its parts are made."""

    @property
    def backoff(self) -> Backoff:
        """How this transport's own waits wait."""
        ...

    @property
    def asks_first(self) -> bool:
        """Whether a long message waits for the receiver's word before it sets out to other nodes.

        Ranks may differ.
        """
        ...

    def duplicate(self) -> JobTransport:
        """Return a transport among the same ranks, for messages apart from these.  Collective."""
        ...

    def subset(self, ranks: Sequence[int]) -> JobTransport:
        """Return a transport among `ranks` of this one, in ascending order.

        Collective among those ranks alone; this rank is one of them.
        """
        ...

    def tagged(self, tag: int) -> JobTransport:
        """Return a view of this transport whose messages have `tag`, and meet no others.  Local."""
        ...

    def split_by_node(self) -> tuple[JobTransport, Topology]:
        """Return a transport among the ranks of this node, and where this rank is.  Collective."""
        ...

    def incoming(self) -> tuple[int, int] | None:
        """Return ``(source, bytes)`` of a message that can be received now, or None."""
        ...

    def abort(self, code: int) -> None:
        """End every process of the job at once, this one with status `code`."""
        ...
