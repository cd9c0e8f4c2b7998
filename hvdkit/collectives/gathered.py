"""The all-reduce of small arrays over messages: everybody gets everything, and reduces it alone.

A small message costs what its rounds cost.  Ranks that are about to reduce have to compare what
they are about to do, which takes an all-gather of a number each; the elements go with it::

    rank 0   signature, a0       \\                  a0 + a1 + a2
    rank 1   signature, a1        >  all-gather  >   a0 + a1 + a2
    rank 2   signature, a2       /                   a0 + a1 + a2

so that an all-reduce is one collective, not two.  All ranks combine in rank order, and end with the
same bits.  Bytes received a rank (p-1)n: more than any other algorithm, which is why it is for few
ranks and few bytes.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.frames import LAST, Frame, signed
from hvdkit.collectives.group import Group
from hvdkit.collectives.repeat import Bound
from hvdkit.dtypes import DTYPES, ReduceOp, bfloat16
from hvdkit.native import quick_gathered, recurring

_INT = np.dtype(np.int64).itemsize

#: Operations whose result is one of the operands: nothing is gained by combining in float32.
_CHOICES = (ReduceOp.MIN, ReduceOp.MAX)


def bind_gathered(group: Group, recipe: tuple[Any, ...], shape: tuple[int, ...]) -> Bound:
    """Return the gathered all-reduce of arrays of a shape, with all else bound.

    Args:
        group: the ranks.
        recipe: dtype, op, prescale, divisor, postscale and signature, as the arena takes them.
        shape: of the arrays.
    """
    general = GatheredAllreduce(group, recipe, shape)
    general.quick = recurring(general, signed(recipe[-1]))
    return general if general.quick is None else general.quick


class GatheredAllreduce:
    """The gathered all-reduce of arrays like one, in Python; fulfils `Bound`.

    Args:
        group, recipe, shape: as in `bind_gathered`.
    """

    def __init__(self, group: Group, recipe: tuple[Any, ...], shape: tuple[int, ...]) -> None:
        self.calls = 0
        self.nanoseconds = 0
        self.quick: Any = None
        """Does the same as this, as long as it is as the last time."""
        self._recipe = recipe
        dtype, op, self._prescale, self._divisor, self._postscale, self._signature = recipe
        self._group = group
        self._dtype = DTYPES[dtype]
        self._op = ReduceOp(op)
        self._widens = self._dtype in (np.float16, bfloat16) and self._op not in _CHOICES
        self._nbytes = self._dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        self._count = -(-self._nbytes // _INT)

    def __call__(self, source: NDArray[Any], target: NDArray[Any]) -> int:
        """Reduce `source` of all ranks into `target`, which it may be; blocking.  Collective.

        Both are as `exported` has them.

        Returns:
            Nonzero if signatures differ: `target` is as it was.
        """
        began = time.perf_counter_ns()
        frames, mine = self._group.frames, source.reshape(-1).view(self._dtype)
        frame, last = frames.upcoming(), frames.state.item(LAST)
        fits = self._count <= frame.length
        if fits:
            self._elements(frame.mine[1:])[:] = mine
        if not frames.agree(frame, self._signature, self._count):
            return 1
        everyone = frame.rows[:, 1:] if fits else self._apart(mine)
        self._combine(everyone, target.reshape(-1).view(self._dtype))
        if self.quick is not None and fits and frames.expects(frame, last, self._count):
            self._prepare(frame, last)
        self.calls += 1
        self.nanoseconds += time.perf_counter_ns() - began
        return 0

    def _prepare(self, frame: Frame, last: int) -> None:
        """Let the native module make the next such call that comes after `last`."""
        group, frames = self._group, self._group.frames
        run = quick_gathered(self._recipe, frame.rows, group.rank, group.size, frame.run)
        self.quick.prepare(frames.state, last, frames.counts(last), False, run, self._differs)

    def _differs(self, _source: object, _target: object) -> int:
        self._group.frames.differ()
        return 1

    def _apart(self, mine: NDArray[Any]) -> NDArray[np.int64]:
        """Return everyone's elements, which did not fit in the frame: they follow on their own."""
        packed = np.zeros(self._count, np.int64)
        self._elements(packed)[:] = mine
        return self._group.transport.allgather_ints(packed)

    def _elements(self, packed: NDArray[np.int64]) -> NDArray[Any]:
        return packed.view(np.uint8)[: self._nbytes].view(self._dtype)

    def _combine(self, everyone: NDArray[np.int64], target: NDArray[Any]) -> None:
        """Set `target` to the result; sums and products of 16-bit floats are rounded once."""
        kernels = self._group.kernels
        with np.errstate(all="ignore"):
            rows = [self._elements(row) for row in everyone]
            if self._widens:
                rows = [row.astype(np.float32) for row in rows]
            if self._prescale != 1.0:
                for row in rows:
                    kernels.scale(row, factor=self._prescale)
            total = rows[0]
            for theirs in rows[1:]:
                kernels.reduce(total, theirs, self._op, incoming_first=False)
            kernels.scale(total, divisor=self._divisor, factor=self._postscale)
            target[:] = total
