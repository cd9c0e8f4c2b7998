"""A group of ranks: how they reach each other, and how they agree on what they are about to do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.calls import Call, mismatch
from hvdkit.collectives.executor import Executor
from hvdkit.collectives.program import Move, bounds_of, even_bounds, lay_out
from hvdkit.dtypes import ReduceOp
from hvdkit.errors import MismatchError, PeerError, UnsupportedError
from hvdkit.native import Kernels
from hvdkit.schedules import registry
from hvdkit.transport.arena import Arena
from hvdkit.transport.base import Transport

#: Plans kept: calls that differ in name, shape, dtype or arguments.  A training step has hundreds.
MOST_PLANS = 4096


class Group:
    """Ranks that communicate, with all that a collective among them needs.

    Args:
        transport: messages between the ranks.
        kernels: how chunks are reduced.
        arena: the memory that all the ranks share, or why they share none.
        segment_bytes: the length of a message.
        spin: how often to look before giving up the core.

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
    ) -> None:
        self.transport = transport
        self.rank = transport.rank
        self.size = transport.size
        self.kernels = kernels
        self.arena = None if isinstance(arena, str) else arena
        self.no_arena = arena if isinstance(arena, str) else ""
        self.segment_bytes = segment_bytes
        self.executor = Executor(transport, kernels, spin=spin)
        self._plans: dict[Any, Any] = {}

    def recall(self, key: Any) -> Any:
        """Return the plan kept under `key`, or None."""
        try:
            return self._plans.get(key)
        except TypeError:  # an argument that nobody expects cannot even be looked up
            return None

    def keep(self, key: Any, plan: Any) -> None:
        """Keep a plan for the next call like this one."""
        if len(self._plans) >= MOST_PLANS:
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
        if self.arena is not None:
            gathered = self.exchange(call, values)
            if gathered is None:
                self.settle(call)
                gathered = self.exchange(call, values)
            if gathered is None:
                self.raise_mismatch(call)
            return gathered
        # The signature travels alone: ranks in different calls have different numbers of values.
        mine = np.array([_signed(call.signature)], np.int64)
        if np.any(self.transport.allgather_ints(mine) != mine[0]):
            self.raise_mismatch(call)
        if not values:
            return np.empty((self.size, 0), np.int64)
        return self.transport.allgather_ints(np.array(values, np.int64))

    def exchange(self, call: Call, values: Sequence[int]) -> NDArray[np.int64] | None:
        """Return each rank's `values` through the arena, or None if ranks' calls differ."""
        assert self.arena is not None
        payload = np.array(values, np.int64).tobytes()
        gathered = self.arena_call(self.arena.native.exchange, payload, call.signature)
        if gathered is None:
            return None
        return np.frombuffer(b"".join(gathered), np.int64).reshape(self.size, len(values))

    def settle(self, call: Call) -> None:
        """Return if every rank makes the same call after all, else raise.  Collective."""
        calls = self.transport.allgather_object(call)
        if any(theirs != call for theirs in calls):
            raise mismatch(calls)

    def refuse(self, kind: str, name: str | None, error: Exception) -> NoReturn:
        """Raise `error` here, and tell the ranks that wait in the same call why.  Collective."""
        with suppress(MismatchError):
            self.agree(Call.refused(kind, name, error))
        raise error

    def raise_mismatch(self, call: Call) -> NoReturn:
        """Raise the error that shows what each rank asked for; pairs with `settle`.  Collective."""
        raise mismatch(self.transport.allgather_object(call))

    # Shared memory

    def arena_call(self, operation: Any, *arguments: Any) -> Any:
        """Call an operation of the native arena, and translate its error."""
        try:
            return operation(*arguments)
        except RuntimeError as exc:
            raise peer_error(exc) from exc

    # Schedules

    def run_schedule(
        self,
        kind: str,
        algorithm: str,
        target: NDArray[Any],
        *,
        counts: Sequence[int] | None = None,
        source: NDArray[Any] | None = None,
        source_counts: Sequence[int] | None = None,
        op: ReduceOp = ReduceOp.SUM,
        root: int = 0,
    ) -> None:
        """Run a schedule over 1-D `target`, cut evenly or into `counts` elements a chunk.

        `source`, of the same dtype, is what is sent, if not `target`: `source_counts` a chunk.
        """
        if counts is not None:
            moves = self._lay_out(kind, algorithm, target, counts, source_counts, root)
        else:
            key = (kind, algorithm, target.size, target.itemsize, root)
            moves = self.recall(key)
            if moves is None:
                moves = self._lay_out(kind, algorithm, target, None, None, root)
                self.keep(key, moves)
        self.executor.run(moves, target, source=source, op=op)

    def _lay_out(
        self,
        kind: str,
        algorithm: str,
        target: NDArray[Any],
        counts: Sequence[int] | None,
        source_counts: Sequence[int] | None,
        root: int,
    ) -> tuple[Move, ...]:
        found = registry.get(kind, algorithm)
        chunks = found.chunks(self.size, max(1, -(-target.nbytes // self.segment_bytes)))
        return lay_out(
            found.steps((self.rank - root) % self.size, self.size, chunks),
            self.size,
            even_bounds(target.size, chunks) if counts is None else bounds_of(counts),
            source=None if source_counts is None else bounds_of(source_counts),
            longest=max(1, self.segment_bytes // target.itemsize),
            root=root,
        )

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


def peer_error(exc: RuntimeError) -> PeerError:
    """Return the native arena's error as the one that hvdkit's users know."""
    return PeerError(f"{exc}\nThe ranks of this node cannot go on together; restart the job.")


def _signed(value: int) -> int:
    """Return an unsigned 64-bit integer as the signed one of the same bits."""
    return value - (1 << 64) if value >> 63 else value
