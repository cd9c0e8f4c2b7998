"""A lane: collectives of one group of ranks, one at a time, in the order of submission.

A synchronous call on an idle lane runs on the calling thread.  Everything else runs on the lane's
own thread, which starts with the first asynchronous call and sleeps when there is none.  Lanes know
nothing of each other: what waits in one holds up no other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from hvdkit.engine.handles import Handle
from hvdkit.errors import NotInitializedError

T = TypeVar("T")


class Lane:
    """Runs collectives, one at a time.  Threads may share it; ranks must submit in one order.

    Args:
        name: of the lane's thread, and in messages.
        threaded: whether another thread than the caller's may communicate.  If not (an MPI that
            was started without thread support), asynchronous calls complete before they return.
    """

    def __init__(self, name: str = "lane", *, threaded: bool) -> None:
        self.name = name
        self._threaded = threaded
        self._busy = threading.Lock()
        self.free = True
        """Whether nothing is queued and the lane is open: then `take(False)` may take it."""
        self.take = self._busy.acquire
        self.leave = self._busy.release
        """Takes the lane for a synchronous call; lets others communicate again."""
        self.busy = self._busy.locked
        """Tells whether a collective is under way."""
        self._queue: deque[tuple[Handle[Any], Callable[[], Any]]] = deque()
        self._current: Handle[Any] | None = None  # None while a caller's own thread communicates
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, work: Callable[[], T]) -> Handle[T]:
        """Queue `work` for the lane's thread; returns at once."""
        handle: Handle[T] = Handle()
        if not self._threaded:
            with self._busy:
                self._check_open()
                handle.run(work)
            return handle
        with self._wake:
            self._check_open()
            if self._thread is None:
                thread = threading.Thread(
                    target=self._progress, name=f"hvdkit-{self.name}", daemon=True
                )
                thread.start()  # or not: then the next call tries again
                self._thread = thread
            self.free = False
            self._queue.append((handle, work))
            self._wake.notify()
        return handle

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run `function` after all that was submitted before it, and return its result."""
        if self.free and self.take(False):
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()
        return self.submit(lambda: function(*args, **kwargs)).wait()

    def awaited(self) -> bool:
        """Return whether a thread waits for what is under way, or for what is queued behind it."""
        with self._wake:
            handles = [self._current, *(handle for handle, _ in self._queue)]
            return self.busy() and any(handle is None or handle.waiters for handle in handles)

    def stop(self) -> None:
        """Begin nothing more: cancel what is queued, and refuse what comes.  Does not wait."""
        with self._wake:
            self._closed = True
            self.free = False
            pending, self._queue = list(self._queue), deque()
            self._wake.notify()
        for handle, _ in pending:
            handle.fail(NotInitializedError("hvdkit was shut down before the operation began"))

    def close(self) -> None:
        """Finish what is in flight, cancel what is queued behind it, and end the thread."""
        self.stop()
        if self._thread is not None:
            self._thread.join()
        with self._busy:  # a synchronous call on another thread ends first
            pass

    def _check_open(self) -> None:
        if self._closed:
            raise NotInitializedError("hvdkit was shut down")

    def _progress(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closed:
                    self._wake.wait()
                if not self._queue:
                    return
            # Busy before the operation leaves the queue: a synchronous call that finds the queue
            # empty must not overtake it.
            with self._busy:
                with self._wake:
                    queued = self._queue.popleft() if self._queue else None
                    self.free = not self._queue and not self._closed
                    self._current = None if queued is None else queued[0]
                if queued is not None:
                    queued[0].run(queued[1])
                    queued = self._current = None  # a lane that sleeps keeps nobody's memory alive
