"""What ranks tell each other by messages before a collective: which it is, and what is small.

Ranks that are in different calls have different things to tell, but an all-gather wants as much of
every rank.  So all send frames of one length, whatever the call::

    | signature | values, or the elements of a small all-reduce | nothing |

A signature that differs is seen by all ranks.  What is too long for the frame follows in an
all-gather of its own, once the ranks know that they agree.  And a frame is as long as the call
needs that came after the last one when that was made before: a training step makes the same calls
in the same order each time.  All ranks have agreed on all calls so far, so they expect the same.
Where calls of several lengths come in turn, the frame is as long as where nothing is expected; one
other call among many of a kind, as at the end of a loop, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hvdkit.config import KIB
from hvdkit.transport.base import Prepared, Transport

Prepare = Callable[[NDArray[np.int64]], Prepared]

_INT = 8

#: Bytes of the frames of all ranks together where nothing is expected; the least and the most of
#: one of these.
FRAMES = 2 * KIB
LEAST = 64
MOST = KIB

#: Bytes of the frames of all ranks together, at most.
LARGEST_FRAMES = 256 * KIB

#: Frames of different lengths that are kept, with the memory of all ranks' and the messages' own.
MOST_KEPT = 32

#: Calls after which another is expected, at most.
MOST_EXPECTED = 4096


#: What `Frames.state` holds: the signature of the last call, as a signed integer; a number that
#: changes with what is expected; how many calls were told of; and, from then on, for each call
#: after which something is expected whether the frame was longer than it had to be the last time.
#: The native module knows these.
LAST, CHANGES, TOLD, IN_VAIN = range(4)


class Frame:
    """The memory of all ranks' frames of one length, and how they are exchanged.

    Args:
        rows: ``(size, 1 + length)``, each rank's signature and what comes after it.
        rank: this one.
        exchange: an all-gather of them.
        differ: what the frames do where signatures differ.
    """

    __slots__ = ("differ", "exchange", "length", "mine", "rows", "run", "signatures")

    def __init__(
        self,
        rows: NDArray[np.int64],
        rank: int,
        exchange: Prepared,
        differ: Callable[[], None],
    ) -> None:
        self.length: int = rows.shape[1] - 1
        self.rows = rows
        self.mine = rows[rank]
        self.signatures = rows[:, 0]
        self.exchange = exchange
        self.run = exchange.run
        self.differ = differ


class Frames:
    """The frames of one group of ranks.

    Args:
        transport: between them.
        prepare: an all-gather of the frames, if not the transport's own.
    """

    def __init__(self, transport: Transport, prepare: Prepare | None = None) -> None:
        self._transport = transport
        self._prepare = prepare
        size = transport.size
        self._usual = max(LEAST, min(FRAMES // size, MOST)) // _INT
        self._longest = LARGEST_FRAMES // size // _INT
        self.state = np.zeros(IN_VAIN + MOST_EXPECTED, np.int64)
        self._following: dict[int, int] = {}
        self._marks: dict[int, int] = {}
        self._kept: dict[int, Frame] = {}

    def gather(self, signature: int, mine: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return each rank's `mine`, ``(size, len(mine))``, or None if signatures differ.

        Collective.

        Args:
            signature: of the call, 64 bits.
            mine: as long on all ranks of one signature.
        """
        frame, count = self.upcoming(), len(mine)
        fits = count <= frame.length
        if fits:
            frame.mine[1 : 1 + count] = mine
        if not self.agree(frame, signature, count):
            return None
        return frame.rows[:, 1 : 1 + count].copy() if fits else self._transport.allgather_ints(mine)

    def upcoming(self) -> Frame:
        """Return the frame in which the next call is told of; it stays this group's own."""
        length = self._following.get(self.state.item(LAST), self._usual)
        frame = self._kept.get(length)
        if frame is None:
            if len(self._kept) >= MOST_KEPT:
                self.close()
            rows = np.zeros((self._transport.size, 1 + length), np.int64)
            exchange = (self._prepare or self._transport.prepare_allgather)(rows)
            frame = self._kept[length] = Frame(rows, self._transport.rank, exchange, self.differ)
        return frame

    def expects(self, frame: Frame, last: int) -> bool:
        """Return whether a call after `last` is told of in `frame` from now on."""
        return self._following.get(last, self._usual) == frame.length

    def mark(self, last: int) -> int:
        """Return where the state says that the frame after `last` was too long; 0: nowhere."""
        return self._marks.get(last, 0)

    def agree(self, frame: Frame, signature: int, count: int) -> bool:
        """Exchange the upcoming frame; return whether all ranks have this signature.  Collective.

        Args:
            frame: with what this rank has to tell, where that fits.
            signature: of the call, 64 bits.
            count: how many integers there are to tell; equal on all ranks of one signature.
        """
        signed = signature - (1 << 64) if signature >> 63 else signature
        frame.mine[0] = signed
        self.state[TOLD] += 1
        frame.run()
        if frame.signatures.tolist().count(signed) != len(frame.signatures):
            self.differ()
            return False
        self._expect(self.state.item(LAST), count)
        self.state[LAST] = signed
        return True

    def differ(self) -> None:
        """Expect nothing any more: a rank in another call has not seen what the others told."""
        self._forget()
        self.state[LAST] = 0
        self.state[CHANGES] += 1

    def _expect(self, last: int, count: int) -> None:
        """Note how much there was to tell after the call `last`."""
        wanted = self._length_for(count)
        expected = self._following.get(last)
        following = wanted
        if expected is not None:
            in_vain = wanted < expected
            if in_vain:
                again = self.state[self._marks[last]]
                following = min(expected, self._usual) if again else expected
            self.state[self._marks[last]] = in_vain
        if following == (self._usual if expected is None else expected):
            return
        if expected is None and len(self._following) >= MOST_EXPECTED:
            self._forget()
        self._marks.setdefault(last, IN_VAIN + len(self._marks))
        self._following[last] = following
        self.state[CHANGES] += 1

    def _forget(self) -> None:
        self._following.clear()
        self._marks.clear()
        self.state[IN_VAIN:] = 0

    def _length_for(self, count: int) -> int:
        """Return the length of a frame that is expected to hold `count` integers."""
        if count <= LEAST // _INT:
            return LEAST // _INT
        return count if self._usual < count <= self._longest else self._usual

    def close(self) -> None:
        """Let go of the memory and of what the transport keeps for it."""
        self.state[CHANGES] += 1
        for frame in self._kept.values():
            frame.exchange.free()
        self._kept.clear()
