"""A schedule on a short message, of which everything is set up once: its memory and its messages.

A step of a short message costs more in Python than on its way.  So the message is copied into
memory of the schedule's own, whose parts are exchanged again and again (see
`Transport.prepare_exchange`), and a step is a call into the native module, and one that reduces::

    copy in  >  exchange, reduce  >  exchange, reduce  >  ...  >  exchange  >  copy out

Long messages are the executor's: they are worth no copy, and their segments are reduced while the
next ones arrive.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.executor import Executor, StepRecorder
from hvdkit.collectives.program import Move
from hvdkit.config import KIB
from hvdkit.dtypes import ReduceOp
from hvdkit.transport.base import Part, Prepared

#: Bytes of a message, at most: where copying it twice takes as long as Python does for a few steps.
LONGEST = 128 * KIB

#: So many segments of a message are one still.
SEGMENTS = 4

#: Schedules kept, the memory and the messages of each; the one not used for longest goes first.
MOST_KEPT = 64

_ALIGNMENT = 64


def is_short(nbytes: int, segment_bytes: int) -> bool:
    """Return whether a message is not worth cutting in segments of so many bytes."""
    return nbytes <= min(LONGEST, SEGMENTS * segment_bytes)


class PreparedSchedule:
    """The steps of one rank on messages of one length and dtype.

    Args:
        moves: of the schedule, whole: no step is cut in segments.
        count, dtype: of the elements.
        executor: has the transport, the kernels and how to wait.
    """

    def __init__(
        self, moves: Sequence[Move], count: int, dtype: np.dtype[Any], executor: Executor
    ) -> None:
        self._executor = executor
        self._width = dtype.itemsize
        stride = -(-count * self._width // _ALIGNMENT) * _ALIGNMENT
        self._memory = np.zeros(2 * stride, np.uint8)
        self._work = self._memory[: count * self._width].view(dtype)
        self._landing = self._memory[stride : stride + count * self._width].view(dtype)
        self._steps = [(move, self._prepare(move, stride)) for move in moves]

    def _prepare(self, move: Move, landing: int) -> Prepared:
        """Set up a step's messages; what is to be reduced lands beside the message itself."""
        sends = list(self._parts(move.destination, move.outgoing, 0))
        receives = list(self._parts(move.source, move.incoming, landing if move.reduces else 0))
        executor = self._executor
        return executor.transport.prepare_exchange(self._memory, sends, receives, executor.backoff)

    def _parts(self, rank: int, segments: Sequence[slice], offset: int) -> Iterator[Part]:
        for part in segments:
            yield Part(rank, offset + part.start * self._width, offset + part.stop * self._width)

    def run(
        self, target: NDArray[Any], op: ReduceOp, *, recorder: StepRecorder | None = None
    ) -> None:
        """Execute it on 1-D `target`, as `Executor.run` does.  Collective."""
        self._work[:] = target
        rank, kernels = self._executor.transport.rank, self._executor.kernels
        for number, (move, exchange) in enumerate(self._steps):
            began = 0.0 if recorder is None else time.perf_counter()
            exchange.run()
            if move.reduces:
                for part in move.incoming:
                    first = move.source < rank
                    kernels.reduce(self._work[part], self._landing[part], op, incoming_first=first)
            if recorder is not None:
                nbytes = sum(part.stop - part.start for part in move.outgoing) * self._width
                recorder.step(f"step {number}: {move}", began, nbytes)
        target[:] = self._work

    def free(self) -> None:
        """Let go of what the transport keeps for it.  Local."""
        for _, exchange in self._steps:
            exchange.free()


class PreparedSchedules:
    """The prepared schedules of one group, of which all ranks use the same in the same order.

    Args:
        executor: as `PreparedSchedule` has it.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._kept: OrderedDict[Hashable, PreparedSchedule] = OrderedDict()

    def get(
        self, schedule: tuple[Hashable, ...], moves: Sequence[Move], target: NDArray[Any]
    ) -> PreparedSchedule:
        """Return a schedule for arrays like `target`: one that is kept, if there is one.

        Args:
            schedule: tells it from all others.
            moves: of it, of one segment a run of chunks.
            target: an array; only its length and dtype matter.
        """
        key = (*schedule, target.size, target.dtype)
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            return found
        if len(self._kept) >= MOST_KEPT:
            self._kept.popitem(last=False)[1].free()
        made = PreparedSchedule(moves, target.size, target.dtype, self._executor)
        self._kept[key] = made
        return made

    def close(self) -> None:
        """Let go of all."""
        while self._kept:
            self._kept.popitem()[1].free()
