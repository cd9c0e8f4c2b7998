"""A schedule on a short message, of which everything is set up once: its memory and its messages.

A step of a short message costs more in Python than on its way.  So the message is copied into
memory of the schedule's own, whose parts are exchanged again and again (see
`Transport.prepare_exchange`), those of steps that need nothing of each other at once (see
`hvdkit.schedules.flights`), and all of it is one call into the native module::

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
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.executor import Executor, StepRecorder
from hvdkit.collectives.frames import signed
from hvdkit.collectives.program import even_bounds, lay_out
from hvdkit.dtypes import DTYPE_CODES, ReduceOp, exported
from hvdkit.errors import HorovodInternalError
from hvdkit.native import quick_schedule
from hvdkit.schedules.flights import flights_of
from hvdkit.schedules.registry import Algorithm
from hvdkit.schedules.steps import Exchange, chunk_indices, contiguous_runs
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


def _marked(nbytes: int) -> int:
    """Return the bytes of a chunk with its mark."""
    return -(-nbytes // _MARK) * _MARK + _MARK


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
        end = place + _marked(nbytes)
        self.elements = memory[place : place + nbytes].view(dtype)
        self.mark = memory[end - _MARK : end].view(np.int64)


@dataclass(frozen=True, slots=True)
class _Landing:
    """Where a chunk arrives that is combined with this rank's own.

    Args:
        number: of the chunk.
        place: in the memory.
        arrived: the chunk there.
        first: whether it is the first operand.
    """

    number: int
    place: int
    arrived: _Chunk
    first: bool


@dataclass(frozen=True, slots=True)
class _Flight:
    """Steps whose messages are in flight together.

    Args:
        name: which steps, and what they do.
        exchange: of their messages.
        landings: in the order in which they are combined.
        sent: bytes of elements.
    """

    name: str
    exchange: Prepared
    landings: tuple[_Landing, ...]
    sent: int


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
        size = executor.transport.size
        chunks = algorithm.chunks(size, 1)
        ends = even_bounds(count, chunks)
        self._slices = [slice(*both) for both in pairwise(ends)]
        self._lengths = [(stop - start) * dtype.itemsize for start, stop in pairwise(ends)]
        self._places = list(accumulate((_marked(n) for n in self._lengths), initial=0))
        self._beside = -(-self._places[-1] // _ALIGNMENT) * _ALIGNMENT
        """Where the message's own memory ends, and what is to be combined with it arrives."""
        flights = flights_of(algorithm.steps((executor.transport.rank - root) % size, size, chunks))
        arriving = max((sum(self._reduced(step) for step in some) for some in flights), default=0)
        self._memory = np.zeros(self._beside + arriving, np.uint8)
        self._work = [self._chunk(number, place) for number, place in enumerate(self._places[:-1])]
        self._flights: list[_Flight] = []
        done = 0
        for some in flights:
            self._flights.append(self._prepare(some, done, root))
            done += len(some)
        self._quick = quick_schedule(
            self._memory,
            DTYPE_CODES[dtype],
            tuple(zip(self._places[:-1], self._lengths, strict=True)),
            tuple(
                (now.exchange.run, tuple((at.number, at.place, at.first) for at in now.landings))
                for now in self._flights
            ),
        )
        """All of it in the native module, where there is one."""

    def _chunk(self, number: int, place: int) -> _Chunk:
        return _Chunk(self._memory, place, self._lengths[number], self._dtype)

    def _reduced(self, step: Exchange) -> int:
        """Return the bytes that arrive in a step to be combined, with their marks."""
        chunks = chunk_indices(step.reduce[1]) if step.reduce else ()
        return sum(_marked(self._lengths[number]) for number in chunks)

    def _prepare(self, steps: Sequence[Exchange], done: int, root: int) -> _Flight:
        """Set up the messages of steps that are in flight together, after so many others."""
        transport, places = self._executor.transport, self._places
        moves = lay_out(steps, transport.size, places, longest=places[-1], root=root)
        sends: list[Part] = []
        receives: list[Part] = []
        landings: list[_Landing] = []
        end, sent = self._beside, 0
        for step, move in zip(steps, moves, strict=True):
            sends += [Part(move.destination, part.start, part.stop) for part in move.outgoing]
            if step.send is not None:
                sent += sum(self._lengths[number] for number in chunk_indices(step.send[1]))
            if step.reduce is None:
                receives += [Part(move.source, part.start, part.stop) for part in move.incoming]
                continue
            first = move.source < transport.rank
            for begin, stop in contiguous_runs(step.reduce[1]):
                at = end - places[begin]
                receives.append(Part(move.source, end, places[stop] + at))
                for number in range(begin, stop):
                    place = places[number] + at
                    landings.append(_Landing(number, place, self._chunk(number, place), first))
                end = places[stop] + at
        executor = self._executor
        exchange = transport.prepare_exchange(self._memory, sends, receives, executor.backoff)
        numbers = f"step {done}" if len(steps) == 1 else f"steps {done} to {done + len(steps) - 1}"
        name = f"{numbers}: {'; '.join(map(str, moves))}"
        return _Flight(name, exchange, tuple(landings), sent)

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
        for now in self._flights:
            now.exchange.run()

    def _play(self, op: ReduceOp, recorder: StepRecorder | None) -> None:
        kernels = self._executor.kernels
        for now in self._flights:
            began = 0.0 if recorder is None else time.perf_counter()
            now.exchange.run()
            for at in now.landings:
                ours, theirs = self._work[at.number], at.arrived
                kernels.reduce(ours.elements, theirs.elements, op, incoming_first=at.first)
                if ours.mark[0] != theirs.mark[0]:
                    ours.mark[0] = DIFFERENT
            if recorder is not None:
                recorder.step(now.name, began, now.sent)

    def free(self) -> None:
        """Let go of the memory, and of what the transport keeps for it.  Local."""
        for now in self._flights:
            now.exchange.free()
        self._quick = None
        self._flights, self._work = [], []
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
