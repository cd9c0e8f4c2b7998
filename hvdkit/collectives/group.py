"""A group of ranks: how they reach each other, and how they agree on what they are about to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from hvdkit.arrays import Results
from hvdkit.collectives.calls import JOIN, JOINABLE, Call, joined_error, mismatch
from hvdkit.collectives.executor import Executor
from hvdkit.collectives.frames import TOLD, Frames, Prepare
from hvdkit.collectives.pick import NO_HIERARCHY
from hvdkit.collectives.prepared import PreparedWays
from hvdkit.errors import (
    HorovodInternalError,
    HvdkitError,
    MismatchError,
    PeerError,
    UnsupportedError,
)
from hvdkit.native import Kernels
from hvdkit.transport.arena import Arena
from hvdkit.transport.base import Transport
from hvdkit.tuning.estimates import Estimates

if TYPE_CHECKING:
    from hvdkit.collectives.hierarchical import Hierarchy

#: How long word may take of why a rank gave up.
SECONDS_FOR_A_REASON = 1.0

#: Plans kept: calls that differ in name, shape, dtype or arguments.  A training step has hundreds.
MOST_PLANS = 4096


class Recorder(Protocol):
    """Whoever wants to know what was done."""

    @property
    def tracing(self) -> bool:
        """Whether steps of schedules are wanted as well."""
        ...

    def operation(
        self, call: Call, algorithm: str, nbytes: int, began: float, *, counted: bool
    ) -> None:
        """Note a collective that has ended, and when it began (`time.perf_counter`).

        One that is `counted` elsewhere is wanted for the timeline only.
        """
        ...

    def step(self, name: str, began: float, nbytes: int) -> None:
        """Note a step of a schedule."""
        ...


class Group:
    """Ranks that communicate, with all that a collective among them needs.

    Args:
        transport: messages between the ranks.
        kernels: how chunks are reduced.
        arena: the memory that all the ranks share, or why they share none.
        segment_bytes: the length of a message.
        spin: how often to look before giving up the core.
        hierarchy: of their nodes, or why there is none.

    One collective at a time; the engine sees to that.
    """

    def __init__(
        self,
        transport: Transport,
        kernels: Kernels,
        arena: Arena | str,
        *,
        segment_bytes: int,
        spin: int,
        hierarchy: Hierarchy | str = NO_HIERARCHY,
    ) -> None:
        self.transport = transport
        self.rank = transport.rank
        self.size = transport.size
        self.kernels = kernels
        self.arena = None if isinstance(arena, str) else arena
        self.no_arena = arena if isinstance(arena, str) else ""
        self.hierarchy = None if isinstance(hierarchy, str) else hierarchy
        self.no_hierarchy = hierarchy if isinstance(hierarchy, str) else ""
        self.segment_bytes = segment_bytes
        self.estimates = Estimates(None, transport.size, usual_segment=segment_bytes)
        """How long collectives take here, by what was measured: see `adopt`."""
        self.executor = Executor(transport, kernels, spin=spin)
        self.results = Results()
        self.recorder: Recorder | None = None
        self.doing: Any = None
        """The call under way, or the last one; an all-reduce's plan stands for its call."""
        self.prepared = PreparedWays(self._ways_changed)
        self.frames = Frames(transport, self._prepare_frames(), self.prepared.find)
        self._failure: HorovodInternalError | None = None
        self._plans: dict[Any, Any] = {}
        self._retired: list[tuple[str, str, str, int, int, float]] = []

    def _ways_changed(self) -> None:
        self.frames.changed()

    def _prepare_frames(self) -> Prepare | None:
        """Return how frames are exchanged where nodes have several ranks; None: plainly."""
        hierarchy = self.hierarchy
        if hierarchy is None or hierarchy.layout.per_node == 1:
            return None
        return partial(hierarchy.prepare_allgather, self)

    def adopt(self, estimates: Estimates) -> None:
        """Choose by `estimates`, of these ranks, from now on.  Local, and alike on all ranks."""
        self.estimates = estimates
        if self.hierarchy is not None:
            self.hierarchy.adopt(estimates)
        self._retired = list(self.counts())
        self._plans.clear()
        self.prepared.close()

    # What the engine watches

    @property
    def operations(self) -> int:
        """How many operations this rank has begun: equal on ranks that are in the same one."""
        return self.frames.state.item(TOLD) + (
            self.arena.native.operations if self.arena is not None else 0
        )

    @property
    def failure(self) -> HorovodInternalError | None:
        """Why the group is of no more use, if so."""
        return self._failure

    def abort(self, error: HorovodInternalError) -> None:
        """End whatever waits in this group, now and later, with `error`.  From any thread."""
        if self._failure is None:
            self._failure = error
        self.executor.backoff.stop = self._failure
        self.transport.interrupt(self._failure)
        if self.arena is not None:
            self.arena.native.abort()
        if self.hierarchy is not None:
            self.hierarchy.abort(self._failure)

    def close(self, *, in_step: bool = True) -> None:
        """Let go of the memory and the messages.  Collective.

        Args:
            in_step: whether all ranks have ended the same operations.  Otherwise messages may be
                under way; they must not come to whoever communicates next, so the transport stays.
        """
        if self.arena is not None:
            self.arena.close()
        in_step = in_step and self._failure is None and not self.executor.backoff.abandoned
        if in_step:
            self.prepared.close()
            self.frames.close()
        if self.hierarchy is not None:
            self.hierarchy.close(in_step=in_step)
        if in_step:
            self.transport.close()

    def record(
        self, call: Call, algorithm: str, nbytes: int, began: float, *, counted: bool = False
    ) -> None:
        """Tell the recorder of a collective that has ended.

        `counted` is what the native module counts itself; see `counts`.
        """
        if self.recorder is not None and not (counted and not self.recorder.tracing):
            self.recorder.operation(call, algorithm, nbytes, began, counted=counted)

    def counts(self) -> Iterator[tuple[str, str, str, int, int, float]]:
        """Yield what the native module has counted.

        As ``(kind, dtype, algorithm, operations, bytes, seconds)``.
        """
        yield from self._retired
        for plan in list(self._plans.values()):
            if (count := getattr(plan, "tally", None)) is not None:
                yield count

    @property
    def tracer(self) -> Recorder | None:
        """The recorder, if it wants to know of single steps."""
        return self.recorder if self.recorder is not None and self.recorder.tracing else None

    def begin(self, call: Call) -> float:
        """Note what is about to be done; return the time."""
        self.doing = call
        if self._failure is not None:
            raise self._failure
        return time.perf_counter()

    def recall(self, key: Any) -> Any:
        """Return the plan kept under `key`, or None."""
        try:
            return self._plans.get(key)
        except TypeError:  # an argument that nobody expects cannot even be looked up
            return None

    def keep(self, key: Any, plan: Any) -> None:
        """Keep a plan for the next call like this one."""
        if len(self._plans) >= MOST_PLANS:
            self._retired = list(self.counts())
            self._plans.clear()
        self._plans[key] = plan

    # Agreement

    def agree(self, call: Call, values: Sequence[int] = ()) -> NDArray[np.int64]:
        """Check that every rank makes the same call, and learn each rank's `values`.  Collective.

        Returns:
            int64 ``(size, len(values))``.

        Raises:
            MismatchError: on every rank, if any asked for something else.
        """
        self.begin(call)
        if self.arena is not None:
            while (gathered := self.exchange(call, values)) is None:
                self.settle(call)
            return gathered
        return self.gather(call, np.array(values, np.int64))

    def gather(self, call: Call, mine: NDArray[np.int64]) -> NDArray[np.int64]:
        """Do as `agree`, by messages.  Collective."""
        while (gathered := self._gather(call, mine)) is None:
            self.settle(call)
        return gathered

    def differs(self, call: Call) -> bool:
        """Return whether ranks' calls differ, as found by messages.  Collective."""
        return self._gather(call, np.empty(0, np.int64)) is None

    def _gather(self, call: Call, mine: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return self.frames.gather(call.signature, mine)

    def exchange(self, call: Call, values: Sequence[int]) -> NDArray[np.int64] | None:
        """Return each rank's `values` through the arena, or None if ranks' calls differ."""
        assert self.arena is not None
        payload = np.array(values, np.int64).tobytes()
        gathered = self.arena_call(self.arena.native.exchange, payload, call.signature)
        if gathered is None:
            return None
        return np.frombuffer(b"".join(gathered), np.int64).reshape(self.size, len(values))

    def settle(self, call: Call) -> None:
        """Find out why ranks' signatures differed; return if they should try again.  Collective.

        That is so where lengths changed (see `hvdkit.collectives.learning`), and where the others
        have joined: they know by then what call to take part in.

        Raises:
            MismatchError: the ranks make different calls.
            UnsupportedError: a rank has joined that cannot take part in such a call.
        """
        calls = self.transport.allgather_object(call)
        joined = [rank for rank, theirs in enumerate(calls) if theirs.kind == JOIN]
        others = {rank: theirs for rank, theirs in enumerate(calls) if theirs.kind != JOIN}
        if any(theirs != call for theirs in others.values()):
            raise mismatch(list(others.values()), ranks=list(others))
        if joined and call.kind not in JOINABLE:
            raise joined_error(call, joined)

    def settling(self, call: Call) -> Callable[[object], None]:
        """Return `settle` for this call, as the short way wants it."""

        def settle(_array: object) -> None:
            self.settle(call)

        return settle

    def refuse(self, kind: str, name: str | None, error: Exception) -> NoReturn:
        """Raise `error` here, and tell the ranks that wait in the same call why.  Collective."""
        with suppress(MismatchError):
            self.agree(Call.refused(kind, name, error))
        raise error

    # Shared memory

    def arena_call(self, operation: Any, *arguments: Any) -> Any:
        """Call an operation of the native arena, and translate its error."""
        try:
            return operation(*arguments)
        except HvdkitError:
            raise
        except RuntimeError as exc:
            error = self.peer_error(exc)
            raise error from (None if error is self._failure else exc)

    def peer_error(self, exc: RuntimeError) -> HorovodInternalError:
        """Return the native arena's error as the one that hvdkit's users know.

        If a rank gave up or left in an orderly way, word of the reason is on its way to this one.
        """
        if "gave up" in str(exc) or "closed" in str(exc):
            deadline = time.monotonic() + SECONDS_FOR_A_REASON
            while self._failure is None and time.monotonic() < deadline:
                time.sleep(0.01)
        return self._failure or PeerError(
            f"{exc}\nThe ranks of this node cannot go on together; restart the job."
        )

    def empty(self, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return `count` zeroed elements, in the arena if there is one with room.  Collective."""
        buffer = None if self.arena is None else self.arena.empty(count, dtype)
        return np.zeros(count, dtype) if buffer is None else buffer

    def library(self, count: int = 0) -> Any:
        """Return the transport as the MPI library, whose own collectives are asked for.

        Args:
            count: the largest number of elements that any rank counts in the call.

        Raises:
            UnsupportedError: the ranks are not MPI processes, or the library cannot count so far.
        """
        library: Any = self.transport
        if not hasattr(library, "library_allreduce"):
            raise UnsupportedError("algorithm 'mpi' needs ranks that are MPI processes")
        if count > library.largest_count:
            raise UnsupportedError(
                f"this MPI library counts in 32 bits, and the message has {count}; "
                "take another algorithm than 'mpi'"
            )
        return library
