"""A schedule on a short message, of which everything is set up once: its memory and its messages.

A step of a short message costs more in Python than on its way.  So the message is copied into
memory of the schedule's own, whose parts are exchanged again and again (see
`Transport.prepare_exchange`), and all steps are one call into the native module::

    copy in  >  exchange, reduce  >  exchange, reduce  >  ...  >  exchange  >  copy out

Behind each chunk travels a mark, which says what call it belongs to, or that ranks differ: marks
are combined and passed on as the chunks are.  An all-reduce combines every rank's contribution to
every chunk, so that in the end all ranks know alike whether all of them have made this call::

    | chunk 0 | mark | chunk 1 | mark | ...

Ranks that expect a call can do without agreeing on it first: see `hvdkit.collectives.short`.

Long messages are the executor's: they are worth no copy, and their segments are reduced while the
next ones arrive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.executor import Executor, StepRecorder
from hvdkit.collectives.frames import signed
from hvdkit.collectives.program import Move, even_bounds, lay_out
from hvdkit.dtypes import DTYPE_CODES, ReduceOp, exported
from hvdkit.errors import HorovodInternalError
from hvdkit.native import quick_schedule
from hvdkit.schedules.registry import Algorithm
from hvdkit.schedules.steps import chunk_indices
from hvdkit.transport.base import Part, Prepared

#: dtype, op, prescale, divisor, postscale and signature of a call, as the arena takes them.
Recipe: TypeAlias = tuple[int, int, float, int, float, int]

#: Returns who wants to know of steps, if anybody.
Tracer: TypeAlias = Callable[[], StepRecorder | None]

#: Schedules kept, the memory and the messages of each.
MOST_KEPT = 64

#: The mark of a chunk to which ranks in different calls have contributed.
DIFFERENT = 0

_MARK = 8
_ALIGNMENT = 64


class _Chunk:
    """A chunk in the message's memory or beside it.

    Args:
        memory: all of it.
        place: where the elements begin.
        nbytes: of them; the mark is behind.
        dtype: of them.
    """

    __slots__ = ("elements", "mark")

    def __init__(
        self, memory: NDArray[np.uint8], place: int, nbytes: int, dtype: np.dtype[Any]
    ) -> None:
        end = place + -(-nbytes // _MARK) * _MARK
        self.elements = memory[place : place + nbytes].view(dtype)
        self.mark = memory[end : end + _MARK].view(np.int64)


class PreparedSchedule:
    """The steps of one rank on messages of one length and dtype.

    Args:
        algorithm: the schedule.
        count, dtype: of the elements.
        executor: has the transport, the kernels and how to wait.
        root: the rank that the schedule calls 0.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        count: int,
        dtype: np.dtype[Any],
        executor: Executor,
        *,
        root: int = 0,
    ) -> None:
        self._executor = executor
        self._dtype = dtype
        self._left_by: BaseException | None = None
        """What ended a call half-way: the other ranks wait in its steps."""
        transport = executor.transport
        chunks = algorithm.chunks(transport.size, 1)
        ends = even_bounds(count, chunks)
        lengths = [(stop - start) * dtype.itemsize for start, stop in pairwise(ends)]
        places = list(accumulate((-(-n // _MARK) * _MARK + _MARK for n in lengths), initial=0))
        stride = -(-places[-1] // _ALIGNMENT) * _ALIGNMENT
        self._memory = np.zeros(2 * stride, np.uint8)
        self._slices = [slice(*both) for both in pairwise(ends)]
        self._work, self._landing = (
            [
                _Chunk(self._memory, offset + place, nbytes, dtype)
                for place, nbytes in zip(places[:-1], lengths, strict=True)
            ]
            for offset in (0, stride)
        )
        steps = list(
            algorithm.steps((transport.rank - root) % transport.size, transport.size, chunks)
        )
        moves = lay_out(steps, transport.size, places, longest=places[-1], root=root)
        reduced = [chunk_indices(step.reduce[1]) if step.reduce else () for step in steps]
        self._steps = [
            (move, self._prepare(move, stride), some)
            for move, some in zip(moves, reduced, strict=True)
        ]
        self._quick = quick_schedule(
            self._memory,
            DTYPE_CODES[dtype],
            stride,
            tuple(zip(places[:-1], lengths, strict=True)),
            tuple(
                (exchange.run, move.source < transport.rank, some)
                for move, exchange, some in self._steps
            ),
        )
        """All of it in the native module, where there is one."""
        self._sent = [
            sum(lengths[chunk] for chunk in chunk_indices(step.send[1])) if step.send else 0
            for step in steps
        ]
        """Bytes of elements that each step sends."""

    def _prepare(self, move: Move, landing: int) -> Prepared:
        """Set up a step's messages; what is to be reduced lands beside the message itself."""
        sends = list(self._parts(move.destination, move.outgoing, 0))
        receives = list(self._parts(move.source, move.incoming, landing if move.reduces else 0))
        executor = self._executor
        return executor.transport.prepare_exchange(self._memory, sends, receives, executor.backoff)

    def _parts(self, rank: int, segments: Sequence[slice], offset: int) -> Iterator[Part]:
        for part in segments:
            yield Part(rank, offset + part.start, offset + part.stop)

    def run(
        self,
        recipe: Recipe,
        source: NDArray[Any],
        target: NDArray[Any],
        recorder: StepRecorder | None = None,
    ) -> bool:
        """Execute it on 1-D `source`; the result is in `target`, which it may be.  Collective.

        Args:
            recipe: of a call; that of a collective which reduces nothing has ones.
            source, target: of the length and dtype of this schedule.
            recorder: is told of the steps.

        Returns:
            Whether all ranks have given this recipe's signature; otherwise `target` is as it was.
        """
        mark = signed(recipe[-1]) or 1
        if recorder is None and self._quick is not None:
            return bool(self._quick(recipe, mark, exported(source), exported(target)))
        _, op, prescale, divisor, postscale, _ = recipe
        kernels = self._executor.kernels
        for chunk, part in zip(self._work, self._slices, strict=True):
            chunk.elements[:] = source[part]
            chunk.mark[0] = mark
            if prescale != 1.0:
                kernels.scale(chunk.elements, factor=prescale)
        self._play(ReduceOp(op), recorder)
        if any(chunk.mark[0] != mark for chunk in self._work):
            return False
        for chunk, part in zip(self._work, self._slices, strict=True):
            target[part] = chunk.elements
        kernels.scale(target, divisor=divisor, factor=postscale)
        return True

    def bind(self, recipe: Recipe, tracer: Tracer) -> Callable[[Any, Any], bool]:
        """Return `run` with all else bound; its arrays are `exported`, of any shape."""
        mark = signed(recipe[-1]) or 1

        def run(source: NDArray[Any], target: NDArray[Any]) -> bool:
            self._check_whole()
            recorder = tracer()
            try:
                if recorder is None and self._quick is not None:
                    return self._quick(recipe, mark, source, target)  # type: ignore[no-any-return]
                elements = source.reshape(-1).view(self._dtype)
                return self.run(recipe, elements, target.reshape(-1).view(self._dtype), recorder)
            except BaseException as exc:
                self._left_by = exc
                raise

        return run

    def _check_whole(self) -> None:
        """Raise an error if this rank has left a call half-way."""
        if isinstance(self._left_by, HorovodInternalError):
            raise self._left_by
        if self._left_by is not None:
            raise HorovodInternalError(
                "a call like this one was interrupted, and the ranks are no longer in step; "
                "restart the job"
            ) from self._left_by

    def refuse(self) -> None:
        """Take part although this rank's call is another, so that all ranks see it.  Collective."""
        self._check_whole()
        for chunk in self._work:
            chunk.mark[0] = DIFFERENT
        for _, exchange, _ in self._steps:
            exchange.run()

    def _play(self, op: ReduceOp, recorder: StepRecorder | None) -> None:
        rank, kernels = self._executor.transport.rank, self._executor.kernels
        for number, (move, exchange, reduced) in enumerate(self._steps):
            began = 0.0 if recorder is None else time.perf_counter()
            exchange.run()
            first = move.source < rank
            for chunk in reduced:
                ours, theirs = self._work[chunk], self._landing[chunk]
                kernels.reduce(ours.elements, theirs.elements, op, incoming_first=first)
                if ours.mark[0] != theirs.mark[0]:
                    ours.mark[0] = DIFFERENT
            if recorder is not None:
                recorder.step(f"step {number}: {move}", began, self._sent[number])

    def free(self) -> None:
        """Let go of the memory, and of what the transport keeps for it.  Local."""
        for _, exchange, _ in self._steps:
            exchange.free()
        self._quick = None
        self._steps, self._work, self._landing = [], [], []
        self._memory = self._memory[:0].copy()


class Kept(Protocol):
    """What `PreparedWays` keeps."""

    def free(self) -> None: ...


class PreparedWays:
    """What was prepared in one group, of which all ranks make the same in the same order.

    Args:
        changed: called when something is no longer there, or has come.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._kept: dict[Hashable, Any] = {}

    def find(self, key: Hashable) -> Any:
        """Return what is kept under `key`, or None."""
        return self._kept.get(key)

    def get(self, key: Hashable, make: Callable[[], Kept]) -> Any:
        """Return what is kept under `key`; made, if nothing is.

        Whatever was made first goes first: what is used last need not be the same on all ranks.
        """
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= MOST_KEPT:
                self._free(next(iter(self._kept)))
            found = self._kept[key] = make()
            self._changed()
        return found

    def _free(self, key: Hashable) -> None:
        self._kept.pop(key).free()
        self._changed()

    def close(self) -> None:
        """Let go of all."""
        for key in list(self._kept):
            self._free(key)
