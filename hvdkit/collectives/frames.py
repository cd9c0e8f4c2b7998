"""What ranks tell each other by messages before a collective: which it is, and what is small.

Ranks that are in different calls have different things to tell, but an all-gather wants as much of
every rank.  So all send frames of one length, whatever the call::

    | signature | values, or the elements of a small all-reduce | nothing |

A signature that differs is seen by all ranks.  What is too long for the frame follows in an
all-gather of its own, once the ranks know that they agree.  And a frame is as long as the call
needs that came after the last two when those were made before: a training step makes the same calls
in the same order each time.  All ranks have agreed on all calls so far, so they expect the same.
Where calls of several lengths come in turn, the frame is as long as where nothing is expected; one
other call among many of a kind, as at the end of a loop, changes nothing.

A call that came after the last two again and again may need no frames at all: see
`hvdkit.collectives.short`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

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


#: What `Frames.state` holds: a number for the last two calls, after which others are expected, and
#: the signature of the last, as signed integers; a number that changes when something is expected
#: after two more calls, and when ways or frames come or go; how many calls were told of; and, from
#: then on, a few counts for each two calls after which something is expected.  The native module
#: knows these.
LAST, LAST_CALL, CHANGES, TOLD, COUNTS = range(5)

#: The counts after a call: whether the frame was longer than it had to be the last time; how sure
#: it is which way comes; and a number that changes with what is expected there.  A gathered call
#: that comes natively resets the first two.
IN_VAIN, SURE, VERSION, _EACH = range(4)

#: The call before the last one counts so many times in the number for both.  Any odd number that is
#: large would do.
_BEFORE = 0x9E3779B97F4A7C15

#: From when on a way is expected; where its count ends, and what it loses where another call came.
EXPECTED = 2
MOST_SURE = 8
LOSS = 4


class Refused(Protocol):
    """What all ranks begin with when they expect it."""

    def refuse(self) -> None:
        """Take part although this rank's call is another.  Collective."""
        ...


def signed(signature: int) -> int:
    """Return an unsigned integer of 64 bits as the signed one that has the same."""
    return signature - (1 << 64) if signature >> 63 else signature


class Frame:
    """The memory of all ranks' frames of one length, and how they are exchanged.

    Args:
        rows: ``(size, 1 + length)``, each rank's signature and what comes after it.
        rank: this one.
        exchange: an all-gather of them.
    """

    __slots__ = ("exchange", "length", "mine", "rows", "run", "signatures")

    def __init__(self, rows: NDArray[np.int64], rank: int, exchange: Prepared) -> None:
        self.length: int = rows.shape[1] - 1
        self.rows = rows
        self.mine = rows[rank]
        self.signatures = rows[:, 0]
        self.exchange = exchange
        self.run = exchange.run


@dataclass(slots=True)
class _Next:
    """What comes after two calls, as far as it did before.

    Args:
        length: of the frame.
        counts: where in the state they are.
        way: that came last.
    """

    length: int
    counts: int
    way: Hashable = None


class Frames:
    """The frames of one group of ranks.

    Args:
        transport: between them.
        prepare: an all-gather of the frames, if not the transport's own.
        find: returns the way that a key stands for; None if it is not there any more.
    """

    def __init__(
        self,
        transport: Transport,
        prepare: Prepare | None = None,
        find: Callable[[Hashable], Refused | None] = lambda _key: None,
    ) -> None:
        self._transport = transport
        self._prepare = prepare
        self._find = find
        size = transport.size
        self._usual = max(LEAST, min(FRAMES // size, MOST)) // _INT
        self._longest = LARGEST_FRAMES // size // _INT
        self.state = np.zeros(COUNTS + _EACH * MOST_EXPECTED, np.int64)
        self._following: dict[int, _Next] = {}
        self._begun = False
        """Whether what is expected was begun with, in vain."""
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
        length = self._length_after(self.state.item(LAST))
        frame = self._kept.get(length)
        if frame is None:
            if len(self._kept) >= MOST_KEPT:
                self.close()
            rows = np.zeros((self._transport.size, 1 + length), np.int64)
            exchange = (self._prepare or self._transport.prepare_allgather)(rows)
            frame = self._kept[length] = Frame(rows, self._transport.rank, exchange)
        return frame

    def expects(self, frame: Frame, last: int, count: int) -> bool:
        """Return whether a call after `last` that tells `count` integers changes nothing more."""
        alike = frame.length <= self._usual or frame.length == self._length_for(count)
        same = self._length_after(last) == frame.length
        return alike and same and self._way_after(last) is None

    def counts(self, last: int) -> int:
        """Return where in the state the counts after a call are; 0: nowhere."""
        following = self._following.get(last)
        return 0 if following is None else following.counts

    def agree(self, frame: Frame, signature: int, count: int, *, way: Hashable = None) -> bool:
        """Exchange the upcoming frame; return whether all ranks have this signature.  Collective.

        Args:
            frame: with what this rank has to tell, where that fits.
            signature: of the call, 64 bits.
            count: how many integers there are to tell; equal on all ranks of one signature.
            way: the key of what this call could have begun with.
        """
        self._refuse()
        mine = signed(signature)
        frame.mine[0] = mine
        self.state[TOLD] += 1
        frame.run()
        if frame.signatures.tolist().count(mine) != len(frame.signatures):
            self.differ()
            return False
        self._expect(self.state.item(LAST), count, way)
        self._ended(mine)
        return True

    # Without frames

    def expected(self) -> Hashable:
        """Return the key of what all ranks begin with, if they expect it of this rank; or None."""
        return self._way_after(self.state.item(LAST))

    def begin(self) -> None:
        """Note that this rank begins with what is expected."""
        self.state[TOLD] += 1

    def refused(self) -> None:
        """Note that it was in vain: a rank is in another call."""
        self._begun = True

    def met(self, signature: int) -> None:
        """Note that all ranks have made the call that was expected."""
        following = self._following[self.state.item(LAST)]
        self._count(following, following.way)
        self._ended(signed(signature))

    def _refuse(self) -> None:
        """Take part in what the other ranks may have begun with."""
        key = None if self._begun else self.expected()
        self._begun = False
        if key is None:
            return
        self.state[TOLD] += 1
        way = self._find(key)
        assert way is not None, "what is expected is there"
        way.refuse()

    # What is expected

    def changed(self) -> None:
        """Ask everyone anew what is expected: something that was may not be there any more."""
        self.state[CHANGES] += 1

    def differ(self) -> None:
        """Expect nothing any more: a rank in another call has not seen what the others told."""
        self._forget()
        self.state[LAST] = self.state[LAST_CALL] = 0
        self.state[CHANGES] += 1

    def _ended(self, mine: int) -> None:
        """Note that all ranks have made a call of this signature."""
        before = self.state.item(LAST_CALL)
        self.state[LAST] = signed((mine + _BEFORE * before) % (1 << 64))
        self.state[LAST_CALL] = mine

    def _length_after(self, last: int) -> int:
        following = self._following.get(last)
        return self._usual if following is None else following.length

    def _way_after(self, last: int) -> Hashable:
        """Return the way that is expected after a call, or None."""
        following = self._following.get(last)
        if following is None or following.way is None:
            return None
        sure = self.state.item(following.counts + SURE) >= EXPECTED
        return following.way if sure and self._find(following.way) is not None else None

    def _expect(self, last: int, count: int, way: Hashable) -> None:
        """Note how much there was to tell after the call `last`, or which way could have come."""
        wanted = self._length_for(count)
        following = self._following.get(last)
        if following is None:
            if wanted == self._usual and way is None:
                return
            if len(self._following) >= MOST_EXPECTED:
                self._forget()
            place = COUNTS + _EACH * len(self._following)
            self._following[last] = _Next(wanted, place, way)
            self.state[place + SURE] = way is not None
            self.state[CHANGES] += 1
            return
        before = following.length
        in_vain = wanted < before
        if not in_vain:
            following.length = wanted
        elif self.state[following.counts + IN_VAIN]:
            following.length = min(before, self._usual)
        self.state[following.counts + IN_VAIN] = in_vain
        self._count(following, way)
        self.state[following.counts + VERSION] += following.length != before

    def _count(self, following: _Next, way: Hashable) -> None:
        """Note which way has come after a call."""
        place = following.counts + SURE
        sure = self.state.item(place)
        before = sure >= EXPECTED
        if way is not None and way == following.way:
            sure = min(sure + 1, MOST_SURE)
        elif before and sure - LOSS >= EXPECTED:
            sure -= LOSS
        else:
            following.way, sure = way, int(way is not None)
        self.state[place] = sure
        self.state[following.counts + VERSION] += before != (sure >= EXPECTED)

    def _forget(self) -> None:
        self._following.clear()
        self.state[COUNTS:] = 0

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
