"""A world of ranks that are threads of one process: for tests, and for stepping through a schedule.

A send completes only when its receive has taken the data: there is no buffering whatever, so an
algorithm that depends on it hangs here, where a test can see it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hvdkit.transport.base import (
    Backoff,
    Bytes,
    GeneralAllgather,
    GeneralExchange,
    Part,
    Prepared,
)

T = TypeVar("T")


class _Message:
    """One half of a transfer; complete when its other half has come and the bytes are copied."""

    def __init__(self, world: ThreadWorld, data: Bytes) -> None:
        self.world = world
        self.data = data
        self.done = False

    def Test(self) -> bool:  # noqa: N802  (the protocol's name)
        self.world.check()
        return self.done


class ThreadWorld:
    """Ranks as threads, with the mailboxes between them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.failure: BaseException | None = None
        self.interrupted: Exception | None = None
        self.lock = threading.Lock()
        self.barrier = threading.Barrier(size)
        self.board: list[Any] = [None] * size
        self._sends: dict[tuple[int, int], deque[_Message]] = {}
        self._receives: dict[tuple[int, int], deque[_Message]] = {}

    def run(self, function: Callable[[ThreadTransport], T], *, timeout: float = 60.0) -> list[T]:
        """Call `function` on each rank's thread and return the results in rank order.

        Raises:
            The first exception of any rank; TimeoutError after `timeout` seconds.
        """
        results: list[Any] = [None] * self.size

        def body(rank: int) -> None:
            try:
                results[rank] = function(ThreadTransport(self, rank))
            except BaseException as exc:
                with self.lock:
                    if self.failure is None:
                        self.failure = exc
                self.barrier.abort()

        threads = [
            threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
        if self.failure is not None:
            raise self.failure
        if any(thread.is_alive() for thread in threads):
            self.failure = TimeoutError(f"ranks did not finish within {timeout} s")
            raise self.failure
        return results

    def check(self) -> None:
        """Raise the error with which waits were interrupted, or one if a rank has failed."""
        if self.interrupted is not None:
            raise self.interrupted
        if self.failure is not None:
            raise RuntimeError("another rank failed") from self.failure

    def wait_for_all(self) -> None:
        """Return when every rank is here."""
        try:
            self.barrier.wait()
        except threading.BrokenBarrierError:
            self.check()
            raise

    def post(self, data: Bytes, *, pair: tuple[int, int], sending: bool) -> _Message:
        """Post one half of a transfer; whoever comes second copies the bytes."""
        message = _Message(self, data)
        mine, theirs = (self._sends, self._receives) if sending else (self._receives, self._sends)
        with self.lock:
            waiting = theirs.setdefault(pair, deque())
            if not waiting:
                mine.setdefault(pair, deque()).append(message)
                return message
            other = waiting.popleft()
            source, target = (message, other) if sending else (other, message)
            if source.data.nbytes != target.data.nbytes:
                raise RuntimeError(
                    f"rank {pair[0]} sends {source.data.nbytes} bytes to rank {pair[1]}, "
                    f"which expects {target.data.nbytes}"
                )
            target.data[:] = source.data
            source.done = target.done = True
        return message

    def incoming(self, rank: int) -> tuple[int, int] | None:
        """Return ``(source, bytes)`` of a message that waits for `rank` to receive it, or None."""
        with self.lock:
            for (source, destination), waiting in self._sends.items():
                if destination == rank and waiting:
                    return source, waiting[0].data.nbytes
        return None


class ThreadTransport:
    """One rank's end of a `ThreadWorld`; fulfils `hvdkit.transport.base.Transport`."""

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.size = world.size

    def isend(self, data: Bytes, destination: int) -> _Message:
        return self.world.post(data, pair=(self.rank, destination), sending=True)

    def irecv(self, data: Bytes, source: int) -> _Message:
        return self.world.post(data, pair=(source, self.rank), sending=False)

    def incoming(self) -> tuple[int, int] | None:
        """Return ``(source, bytes)`` of a message that can be received now, or None."""
        return self.world.incoming(self.rank)

    def allgather_object(self, value: T) -> list[T]:
        self.world.board[self.rank] = value
        self.world.wait_for_all()
        values = list(self.world.board)
        self.world.wait_for_all()
        return values

    def allgather_ints(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.stack(self.allgather_object(values.copy()))

    def prepare_allgather(self, rows: NDArray[np.int64]) -> Prepared:
        return GeneralAllgather(self, rows)

    def prepare_exchange(
        self, memory: Bytes, sends: Sequence[Part], receives: Sequence[Part], backoff: Backoff
    ) -> Prepared:
        return GeneralExchange(self, memory, sends, receives, backoff=backoff)

    def broadcast_object(self, value: Any, root: int) -> Any:
        return self.allgather_object(value)[root]

    def close(self) -> None:
        pass

    def new_backoff(self, spin: int) -> Backoff:
        return Backoff(spin)

    def interrupt(self, error: Exception) -> None:
        self.world.interrupted = error
        self.world.barrier.abort()
