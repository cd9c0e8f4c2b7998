"""Small messages with few ranks at once, of memory that stays where it is.

    send to each, and look for what comes from each             in the native module, for a while
    what has not gone, or not come, goes on as messages do      and so does what was not expected

The messages are those of the transport's channel, so that it makes no difference who is quick.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hvdkit.native import swap
from hvdkit.transport.base import Backoff, Bytes
from hvdkit.transport.tcp.link import HEADER

if TYPE_CHECKING:
    from hvdkit.transport.tcp.mesh import Mesh

#: How often to look for what comes before yielding, at most; a look is a system call.
LOOKS = 500

#: What has become of the messages with a peer: bytes sent; the header and the bytes received.
Progress = tuple[int, bytes, bytes]
NOTHING: Progress = (0, b"", b"")

#: Where, in the memory, what is sent begins, its length, and the same of what is received; -1 is
#: the length of no message.  The native module knows this.
_PLACES = struct.Struct("=4q")


class Swap:
    """A prepared exchange over the links of a mesh.

    Args:
        mesh: has the links.
        channel: of the messages.
        memory: contiguous.
        outward, inward: by rank of the job, what of the memory is sent and received.
        backoff: how to wait.
    """

    def __init__(
        self,
        mesh: Mesh,
        channel: int,
        memory: Bytes,
        outward: Mapping[int, slice],
        inward: Mapping[int, slice],
        *,
        backoff: Backoff,
    ) -> None:
        self._mesh = mesh
        self._backoff = backoff
        self._memory = memory.data
        self.channel = channel
        self.peers = tuple(sorted({*outward, *inward}))
        self.links = mesh.links(self.peers)
        self.nothing_here = (False,) * len(self.peers)
        self._handles = tuple([link.sock.fileno() for link in self.links])
        self.ours = [self._part(outward, peer) for peer in self.peers]
        self.theirs = [self._part(inward, peer) for peer in self.peers]
        self._headers = b"".join(
            HEADER.pack(channel, 0 if view is None else len(view))
            for both in zip(self.ours, self.theirs, strict=True)
            for view in both
        )
        self._places = b"".join(
            _PLACES.pack(*_place(outward, peer), *_place(inward, peer)) for peer in self.peers
        )

    def _part(self, parts: Mapping[int, slice], peer: int) -> memoryview | None:
        return self._memory[parts[peer]] if peer in parts else None

    def run(self) -> None:
        for operation in self._mesh.swap(self):
            self._backoff.wait(operation)

    def now(self, here: tuple[bool, ...]) -> list[Progress]:
        """Do as much as can be at once; return what has become of it, nothing if it is done.

        Args:
            here: whether what a peer sends has been received already.
        """
        looks = min(self._backoff.spin, LOOKS)
        return swap(self._handles, here, self._headers, self._places, self._memory, looks) or []

    def left(self, number: int, sent: int) -> list[memoryview]:
        """Return what is still to be sent to the `number`-th peer after `sent` bytes."""
        ours = self.ours[number]
        if ours is None:
            return []
        header = memoryview(self._headers)[2 * number * HEADER.size :][: HEADER.size]
        views = (header[sent:], ours[max(0, sent - HEADER.size) :])
        return [view for view in views if len(view) > 0]

    def free(self) -> None:
        pass


def _place(parts: Mapping[int, slice], peer: int) -> tuple[int, int]:
    part = parts.get(peer)
    return (0, -1) if part is None else (part.start, part.stop - part.start)
