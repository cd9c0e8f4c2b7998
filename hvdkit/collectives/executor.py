"""Run a schedule on real buffers, over any transport.

        step k      post receives   [1]   up to WINDOW segments ahead, into scratch to reduce
                    post sends      [2]   up to WINDOW segments ahead, straight from the buffer
                    poll both       [3]   a segment is reduced while the next ones arrive
        step k+1    ...

The two directions of a step make progress independently of each other, as the verifier assumes
when it proves a schedule free of deadlock without any buffering.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.program import Move
from hvdkit.dtypes import ReduceOp
from hvdkit.native import Kernels
from hvdkit.transport.base import Bytes, Request, Transport

#: Segments in flight in each direction: enough to keep a link busy while one is reduced, few
#: enough for the scratch they arrive in to stay in the cache.
WINDOW = 4


class StepRecorder(Protocol):
    """Whoever wants to know of single steps."""

    def step(self, name: str, began: float, nbytes: int) -> None:
        """Note a step that has ended, when it began and how many bytes this rank sent."""
        ...


class _Stream:
    """One direction of a step: its segments in order, at most `WINDOW` of them in flight."""

    def __init__(self, segments: tuple[slice, ...]) -> None:
        self.segments = segments
        self.done = 0
        self.requests: list[Request] = [
            self.post(i, segments[i]) for i in range(min(WINDOW, len(segments)))
        ]

    def post(self, number: int, segment: slice) -> Request:
        """Start the message of a segment."""
        raise NotImplementedError

    def finish(self, number: int, segment: slice) -> None:
        """Do what is to be done with a segment whose message is complete."""

    def ready(self) -> bool:
        """Return whether the oldest segment is complete."""
        return self.requests[self.done % WINDOW].Test()

    def advance(self) -> bool:
        """Finish the oldest segment if it is complete, post another; return whether it was."""
        if not self.ready():
            return False
        done, segments = self.done, self.segments
        self.finish(done, segments[done])
        following = done + WINDOW
        if following < len(segments):
            self.requests[done % WINDOW] = self.post(following, segments[following])
        self.done = done + 1
        return True


class _Sending(_Stream):
    """Segments sent straight from the buffer."""

    def __init__(self, move: Move, data: Bytes, width: int, transport: Transport) -> None:
        self.peer, self.data, self.width, self.transport = move.destination, data, width, transport
        super().__init__(move.outgoing)

    def post(self, _number: int, segment: slice) -> Request:
        part = self.data[segment.start * self.width : segment.stop * self.width]
        return self.transport.isend(part, self.peer)


class _Storing(_Stream):
    """Segments received straight into the buffer."""

    def __init__(self, move: Move, data: Bytes, width: int, transport: Transport) -> None:
        self.peer, self.data, self.width, self.transport = move.source, data, width, transport
        super().__init__(move.incoming)

    def post(self, _number: int, segment: slice) -> Request:
        part = self.data[segment.start * self.width : segment.stop * self.width]
        return self.transport.irecv(part, self.peer)


class _Reducing(_Stream):
    """Segments received into scratch, and reduced into the buffer from there."""

    def __init__(
        self,
        move: Move,
        data: NDArray[Any],
        landing: list[NDArray[Any]],
        *,
        op: ReduceOp,
        executor: Executor,
    ) -> None:
        self.peer, self.data, self.landing, self.op = move.source, data, landing, op
        self.executor = executor
        self.leaving: _Sending | None = None
        """What sends the same segments, each of which must have left before it changes."""
        super().__init__(move.incoming)

    def post(self, number: int, segment: slice) -> Request:
        part = self.landing[number % WINDOW][: segment.stop - segment.start]
        return self.executor.transport.irecv(part.view(np.uint8), self.peer)

    def ready(self) -> bool:
        if self.leaving is not None and self.leaving.done <= self.done:
            return False
        return super().ready()

    def finish(self, number: int, segment: slice) -> None:
        self.executor.kernels.reduce(
            self.data[segment],
            self.landing[number % WINDOW][: segment.stop - segment.start],
            self.op,
            incoming_first=self.peer < self.executor.transport.rank,
        )


class Executor:
    """Executes schedules for one rank.  Not for several threads at once."""

    def __init__(self, transport: Transport, kernels: Kernels, *, spin: int) -> None:
        self.transport = transport
        self.kernels = kernels
        self.backoff = transport.new_backoff(spin)
        self._scratch = np.empty(0, np.uint8)

    def run(
        self,
        moves: Iterable[Move],
        target: NDArray[Any],
        *,
        source: NDArray[Any] | None = None,
        op: ReduceOp = ReduceOp.SUM,
        recorder: StepRecorder | None = None,
    ) -> None:
        """Execute a schedule that is laid out; blocking.  Collective.

        Args:
            moves: this rank's.
            target: 1-D contiguous; received into and, without `source`, also sent from.
            source: 1-D contiguous, of the same dtype; sent from (all-to-all).
            op: how arriving segments are combined; the lower rank's operand comes first.
            recorder: is told of every step.
        """
        sent = (target if source is None else source).view(np.uint8)
        stored = target.view(np.uint8)
        width = target.itemsize
        for number, move in enumerate(moves):
            began = 0.0 if recorder is None else time.perf_counter()
            streams: list[_Stream] = []
            if move.incoming:
                streams.append(
                    self._reducing(move, target, op)
                    if move.reduces
                    else _Storing(move, stored, width, self.transport)
                )
            if move.outgoing:
                sending = _Sending(move, sent, width, self.transport)
                if move.in_turn and isinstance(streams[0], _Reducing):
                    streams[0].leaving = sending
                streams.append(sending)
            self._complete(streams)
            if recorder is not None:
                nbytes = sum(s.stop - s.start for s in move.outgoing) * width
                recorder.step(f"step {number}: {move}", began, nbytes)

    def _complete(self, pending: list[_Stream]) -> None:
        """Poll until every stream is done."""
        self.backoff.reset()
        try:
            while pending:
                moved = [stream.advance() for stream in pending]
                if any(moved):
                    pending = [s for s in pending if s.done < len(s.segments)]
                    self.backoff.reset()
                else:
                    self.backoff.pause()
        except BaseException:
            self.backoff.abandoned.append(pending)
            raise

    def _reducing(self, move: Move, target: NDArray[Any], op: ReduceOp) -> _Reducing:
        """Return the stream, with `WINDOW` landing places as long as its longest segment."""
        longest = max(s.stop - s.start for s in move.incoming) * target.itemsize
        stride = -(-longest // 64) * 64
        if self._scratch.size < WINDOW * stride:
            self._scratch = np.empty(WINDOW * stride, np.uint8)
        landing = [
            self._scratch[i * stride : i * stride + longest].view(target.dtype)
            for i in range(min(WINDOW, len(move.incoming)))
        ]
        return _Reducing(move, target, landing, op=op, executor=self)
