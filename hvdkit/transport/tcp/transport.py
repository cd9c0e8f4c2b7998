"""The transport over sockets: communicators, and control data, on the links of a mesh."""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import struct
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from copy import copy
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hvdkit.config import DIRECT_RANKS
from hvdkit.native import why_unavailable
from hvdkit.transport.base import (
    Backoff,
    Bytes,
    GeneralAllgather,
    GeneralExchange,
    Part,
    Prepared,
    Request,
    Topology,
    exchanged_rows,
)
from hvdkit.transport.tcp.mesh import Mesh
from hvdkit.transport.tcp.swap import Swap

T = TypeVar("T")

_LENGTH = struct.Struct("<Q")


class SocketBackoff(Backoff):
    """How a rank waits for messages over TCP: look, then yield, then sleep until something comes.

    To be woken takes 50 us on a virtual machine, in which the next rank falls asleep in turn.
    """

    __slots__ = ("_mesh", "_seen", "deadline")

    def __init__(self, mesh: Mesh, spin: int) -> None:
        self._mesh = mesh
        self.deadline = float("inf")
        """Of `time.monotonic()`: a wait that is longer is a TimeoutError."""
        super().__init__(spin)

    def reset(self) -> None:
        super().reset()
        # What happens from here on ends the next sleep, even if it happens before that begins.
        self._seen = self._mesh.moves

    def pause(self) -> None:
        self._looks += 1
        if self._looks <= self.spin:
            return
        if self.stop is not None:
            raise self.stop
        if self._looks <= self.spin + self.YIELDS:
            self._yield()
            return
        if self.deadline < time.monotonic():
            raise TimeoutError("the other ranks did not answer in time")
        self._seen = self._mesh.sleep(self._seen)


class TCPTransport:
    """Messages among some ranks of the job, apart from those of other transports.

    Several threads may each use a transport of their own at the same time.

    Args:
        mesh: the links to all ranks of the job.
        members: the ranks of the job that are this transport's, in its order.
        name: what tells it from all other transports; the same on all its ranks.
        nodes: where each rank of the job is, as far as known.
        spin: how often to look before sleeping.
    """

    def __init__(
        self,
        mesh: Mesh,
        members: Sequence[int],
        name: bytes,
        *,
        nodes: dict[int, Hashable],
        spin: int = 0,
    ) -> None:
        self._mesh = mesh
        self._members = tuple(members)
        self._positions = {member: rank for rank, member in enumerate(self._members)}
        self._name = name
        self._nodes = nodes
        self._children: Counter[bytes] = Counter()
        self._channel = _channel(name)
        self._control = self._channel | 1  # so that control data never meet messages
        self._open = True
        self.rank = self._positions[mesh.rank]
        self.size = len(self._members)
        self.backoff: SocketBackoff = SocketBackoff(mesh, spin)

    #: A message sets out at once, however long it is.
    asks_first = False

    # Transports made of this one

    def duplicate(self) -> TCPTransport:
        """Return a transport among the same ranks, for messages apart from these.  Collective."""
        return self._child(b"duplicate", self._members)

    def subset(self, ranks: Sequence[int]) -> TCPTransport:
        """Return a transport among `ranks` of this one, in ascending order.

        Collective among those ranks alone; this rank is one of them.
        """
        return self._child(b"subset", [self._members[rank] for rank in sorted(ranks)])

    def tagged(self, tag: int) -> TCPTransport:
        """Return a view of this transport whose messages have `tag`, and meet no others.  Local."""
        view = copy(self)
        view._channel = _channel(self._name + b"tag" + _LENGTH.pack(tag))
        return view

    def split_by_node(self) -> tuple[TCPTransport, Topology]:
        """Return a transport among the ranks of this node, and where this rank is.  Collective."""
        nodes = [self._nodes[member] for member in self._members]
        local = [rank for rank, node in enumerate(nodes) if node == nodes[self.rank]]
        # Across the nodes: who is, on its own, as many-th as this rank is on this one.
        turns: Counter[Hashable] = Counter()
        local_ranks = []
        for node in nodes:
            local_ranks.append(turns[node])
            turns[node] += 1
        mine = local_ranks[self.rank]
        cross = [rank for rank, turn in enumerate(local_ranks) if turn == mine]
        topology = Topology(
            rank=self.rank,
            size=self.size,
            local_rank=mine,
            local_size=len(local),
            cross_rank=cross.index(self.rank),
            cross_size=len(cross),
        )
        return self._child(b"node", [self._members[rank] for rank in local]), topology

    def _child(self, how: bytes, members: Sequence[int]) -> TCPTransport:
        """Return a transport whose name its ranks need not agree on: they have the same history.

        All of them take part in the making of every transport of theirs; so those of the same
        ranks have the same numbers everywhere, and those of others have other names.
        """
        kind = how + repr(tuple(members)).encode()
        with self._mesh.lock:
            number, self._children[kind] = self._children[kind], self._children[kind] + 1
        name = hashlib.sha256(self._name + kind + _LENGTH.pack(number)).digest()
        return TCPTransport(self._mesh, members, name, nodes=self._nodes, spin=self.backoff.spin)

    def new_backoff(self, spin: int) -> Backoff:
        """Return what waits for this transport's requests, in one thread."""
        return SocketBackoff(self._mesh, spin)

    # Messages

    def isend(self, data: Bytes, destination: int) -> Request:
        return self._mesh.send(self._channel, data.data, self._members[destination])

    def irecv(self, data: Bytes, source: int) -> Request:
        return self._mesh.receive(self._channel, data.data, self._members[source])

    def incoming(self) -> tuple[int, int] | None:
        """Return ``(source, bytes)`` of a message that can be received now, or None."""
        found = self._mesh.probe(self._channel)
        return None if found is None else (self._positions[found[0]], found[1])

    # Control data

    def allgather_ints(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        blocks = self._allgather(np.ascontiguousarray(values, np.int64).tobytes())
        return np.frombuffer(b"".join(blocks), np.int64).reshape(self.size, len(values)).copy()

    def prepare_allgather(self, rows: NDArray[np.int64]) -> Prepared:
        if not 1 < self.size <= DIRECT_RANKS or why_unavailable() is not None:
            return GeneralAllgather(self, rows)
        return self.prepare_exchange(*exchanged_rows(rows, self.rank), self.backoff)

    def prepare_exchange(
        self, memory: Bytes, sends: Sequence[Part], receives: Sequence[Part], backoff: Backoff
    ) -> Prepared:
        outward = {self._members[part.rank]: slice(part.start, part.stop) for part in sends}
        inward = {self._members[part.rank]: slice(part.start, part.stop) for part in receives}
        several = len(outward) < len(sends) or len(inward) < len(receives)
        if several or why_unavailable() is not None:
            apart = copy(self)
            apart._channel = self._control
            return GeneralExchange(apart, memory, sends, receives, backoff=backoff)
        return Swap(self._mesh, self._control, memory, outward, inward, backoff=backoff)

    def allgather_object(self, value: T) -> list[T]:
        return [pickle.loads(block) for block in self._allgather(pickle.dumps(value))]

    def broadcast_object(self, value: Any, root: int) -> Any:
        """Down a binomial tree: whoever has it passes it on to the rank half the rest away."""
        place = (self.rank - root) % self.size
        packed = pickle.dumps(value) if place == 0 else b""
        span = 1
        while span < self.size:
            span *= 2
        sending = []
        while span > 1:
            half = span // 2
            if place % span == 0 and place + half < self.size:
                sending.append(self._post(packed, (place + half + root) % self.size))
            elif place % span == half:
                packed = self._take((place - half + root) % self.size)
            span = half
        for request in sending:
            self.backoff.wait(request)
        return value if place == 0 else pickle.loads(packed)

    def _allgather(self, mine: bytes) -> list[bytes]:
        """Return the block of bytes of every rank."""
        if self.size <= DIRECT_RANKS:  # as where it is prepared: some ranks may lack the module
            return self._allgather_directly(mine)
        # [Bruck et al. 1997]: blocks of the ranks that follow, twice as many after each step.
        blocks, distance = [mine], 1
        while distance < self.size:
            wanted = min(distance, self.size - distance)
            lengths = b"".join(_LENGTH.pack(len(block)) for block in blocks[:wanted])
            request = self._post(
                lengths + b"".join(blocks[:wanted]), (self.rank - distance) % self.size
            )
            blocks += _unpack(self._take((self.rank + distance) % self.size), wanted)
            self.backoff.wait(request)
            distance *= 2
        return blocks[self.size - self.rank :] + blocks[: self.size - self.rank]

    def _allgather_directly(self, mine: bytes) -> list[bytes]:
        peers = [rank for rank in range(self.size) if rank != self.rank]
        sending = [self._post(mine, peer) for peer in peers]
        blocks = {peer: self._take(peer) for peer in peers} | {self.rank: mine}
        for request in sending:
            self.backoff.wait(request)
        return [blocks[rank] for rank in range(self.size)]

    def _post(self, data: bytes, destination: int) -> Request:
        return self._mesh.send(self._control, memoryview(data), self._members[destination])

    def _take(self, source: int) -> bytes:
        """Return the next control message from a rank, of whatever length."""
        self.backoff.reset()
        while (found := self._mesh.take(self._control, self._members[source])) is None:
            self.backoff.pause()
        return found

    def interrupt(self, error: Exception) -> None:
        self.backoff.stop = error
        self._mesh.ring()

    # The beginning and the end

    def introduce(self, node: Hashable, deadline: float) -> None:
        """Learn where every rank is; after that, all of them have all links.  Collective.

        Raises:
            TimeoutError: some have not until `deadline`, of `time.monotonic()`.
        """
        self.backoff.deadline = deadline
        everyone = self.allgather_object((socket.gethostname(), node))
        self.backoff.deadline = float("inf")
        for rank, (host, where) in enumerate(everyone):
            self._mesh.hosts[rank] = host
            self._nodes[rank] = where

    def abort(self, code: int) -> None:
        """Tell every rank of the job, and end this process with status `code`."""
        try:
            self._mesh.abort(code)
        finally:
            os._exit(code)

    def close(self) -> None:
        """End this transport's messages; the job's own ends those of all others.  Collective."""
        if not self._open:
            return
        self._open = False
        if self._name == b"":
            self._mesh.close()
        else:
            self._mesh.end_channel(self._channel)
            self._mesh.end_channel(self._control)


def _channel(name: bytes) -> int:
    """Return the number of a channel: an even one, and not 0, which is the mesh's own."""
    digest = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
    return (digest | 2) & ~1


def _unpack(data: bytes, count: int) -> list[bytes]:
    """Return the blocks of a message: their lengths come first."""
    at, blocks = count * _LENGTH.size, []
    for number in range(count):
        (length,) = _LENGTH.unpack_from(data, number * _LENGTH.size)
        blocks.append(data[at : at + length])
        at += length
    return blocks
