"""What ranks tell each other by messages before a collective: which it is, and what is small.

Ranks that are in different calls have different things to tell, but an all-gather wants as much of
every rank.  So all send frames of one length, whatever the call::

    | signature | values, or the elements of a small all-reduce | nothing |

A signature that differs is seen by all ranks.  What is too long for the frame follows in an
all-gather of its own, once the ranks know that they agree.  And a frame is as long as the call
needs that came after the last one when that was made before: a training step makes the same calls
in the same order each time.  All ranks have agreed on all calls so far, so they expect the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hvdkit.config import KIB
from hvdkit.transport.base import Transport

_INT = 8

#: Bytes of the frames of all ranks together where nothing is expected; the least and the most of
#: one of these.
FRAMES = 2 * KIB
LEAST = 64
MOST = KIB

#: Bytes of the frames of all ranks together, at most.
LARGEST_FRAMES = 256 * KIB

#: Calls after which another is expected, at most.
MOST_EXPECTED = 4096


class Frames:
    """The frames of one group of ranks."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        size = transport.size
        self._usual = max(LEAST, min(FRAMES // size, MOST)) // _INT
        self._longest = LARGEST_FRAMES // size // _INT
        self._last = 0
        self._following: dict[int, int] = {}

    def gather(self, signature: int, mine: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return each rank's `mine`, ``(size, len(mine))``, or None if signatures differ.

        Collective.

        Args:
            signature: of the call, 64 bits.
            mine: as long on all ranks of one signature.
        """
        length = self._following.get(self._last, self._usual)
        frame = np.zeros(1 + length, np.int64)
        frame[0] = _signed(signature)
        if len(mine) <= length:
            frame[1 : 1 + len(mine)] = mine
        gathered = self._transport.allgather_ints(frame)
        if not (gathered[:, 0] == frame[0]).all():
            self._following.clear()
            self._last = 0
            return None
        self._expect(signature, len(mine))
        if len(mine) > length:
            return self._transport.allgather_ints(mine)
        return gathered[:, 1 : 1 + len(mine)]

    def _expect(self, signature: int, length: int) -> None:
        """Note that a call came after the last one, and how much it had to tell."""
        if self._usual < length <= self._longest:
            if len(self._following) >= MOST_EXPECTED:
                self._following.clear()
            self._following[self._last] = length
        else:
            self._following.pop(self._last, None)
        self._last = signature


def _signed(value: int) -> int:
    """Return an unsigned 64-bit integer as the signed one of the same bits."""
    return value - (1 << 64) if value >> 63 else value
