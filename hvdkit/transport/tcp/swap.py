"""Small all-gathers among few ranks: everyone writes its row to everyone, and looks for theirs.

    send the row to each peer, and look for what comes          in the native module, for a while
    what has not gone, or not come, goes on as messages do      and so does what was not expected

The messages are those of the transport's channel, so that it makes no difference who is quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hvdkit.native import swap
from hvdkit.transport.base import Backoff
from hvdkit.transport.tcp.link import HEADER

if TYPE_CHECKING:
    from hvdkit.transport.tcp.mesh import Mesh

#: How often to look for the others' rows before yielding, at most; a look is a system call.
LOOKS = 500

#: What has become of a message each way: bytes sent; the header and the row as far as received.
Progress = tuple[int, bytes, bytes]
NOTHING: Progress = (0, b"", b"")


class Swap:
    """A prepared all-gather over the links of a mesh.

    Args:
        mesh: has the links.
        channel: of the messages.
        members: the ranks of the job that have a row each.
        rows: ``(size, length)``.
        backoff: how to wait.
    """

    def __init__(
        self,
        mesh: Mesh,
        channel: int,
        members: Sequence[int],
        *,
        rows: NDArray[np.int64],
        backoff: Backoff,
    ) -> None:
        self._mesh = mesh
        self._backoff = backoff
        self._rows = rows
        self._rank = members.index(mesh.rank)
        self._places = tuple(rank for rank in range(len(members)) if rank != self._rank)
        self.channel = channel
        self.peers = tuple(members[rank] for rank in self._places)
        self.mine = rows[self._rank].view(np.uint8).data
        self.theirs = [rows[rank].view(np.uint8).data for rank in self._places]
        self._header = HEADER.pack(channel, len(self.mine))

    def run(self) -> None:
        for operation in self._mesh.swap(self):
            self._backoff.wait(operation)

    def now(self, handles: tuple[int, ...], here: tuple[bool, ...]) -> list[Progress] | None:
        """Do as much as can be at once; return what has become of it, None if it is done.

        Args:
            handles: of the sockets.
            here: whether a peer's row has been received already.
        """
        looks = min(self._backoff.spin, LOOKS)
        size = len(self._rows)
        places = self._places
        return swap(handles, places, here, self._header, self._rows, self._rank, size, looks)

    def left(self, sent: int) -> list[memoryview]:
        """Return what is still to be sent after `sent` bytes."""
        header = memoryview(self._header)
        return [
            view
            for view in (header[sent:], self.mine[max(0, sent - len(header)) :])
            if len(view) > 0
        ]

    def free(self) -> None:
        pass
