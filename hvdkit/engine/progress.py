"""The engine: collectives one at a time, in the order of submission, beside the caller's own work.

A synchronous call on an idle engine runs on the calling thread.  Everything else runs on one
progress thread, which starts with the first asynchronous call and sleeps when there is none.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from hvdkit.errors import NotInitializedError

T = TypeVar("T")


class Handle(Generic[T]):
    """The promise of an asynchronous operation's result."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], T] | None = work
        self._done = threading.Event()
        self._result: T
        self._error: BaseException | None = None

    def poll(self) -> bool:
        """Return whether the operation is complete; local, never blocks."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> T:
        """Return the result when the operation is complete.

        Raises:
            TimeoutError: it is not, after `timeout` seconds; it goes on.
            Whatever the operation raised.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"the operation did not complete within {timeout} s")
        if self._error is not None:
            raise self._error
        return self._result

    def run(self) -> None:
        """Do the work; called once, by the engine."""
        assert self._work is not None
        try:
            self._result = self._work()
        except BaseException as exc:
            self._error = exc
        self._work = None
        self._done.set()

    def cancel(self, error: BaseException) -> None:
        """Complete with `error` instead of doing the work."""
        self._error = error
        self._work = None
        self._done.set()


class Engine:
    """Runs collectives, one at a time.  Threads may share it; ranks must submit in one order.

    Args:
        threaded: whether another thread than the caller's may communicate.  If not (an MPI that
            was started without thread support), asynchronous calls complete before they return.
    """

    def __init__(self, *, threaded: bool) -> None:
        self._threaded = threaded
        self._busy = threading.Lock()
        self.free = True
        """Whether nothing is queued and the engine is open: then `take(False)` may take it."""
        self.take = self._busy.acquire
        self.leave = self._busy.release
        """Takes the engine for a synchronous call; lets others communicate again."""
        self._queue: deque[Handle[Any]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, work: Callable[[], T]) -> Handle[T]:
        """Queue `work` for the progress thread; returns at once."""
        handle = Handle(work)
        if not self._threaded:
            with self._busy:
                self._check_open()
                handle.run()
            return handle
        with self._wake:
            self._check_open()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._progress, name="hvdkit-progress", daemon=True
                )
                self._thread.start()
            self.free = False
            self._queue.append(handle)
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

    def close(self) -> None:
        """Finish what is in flight, cancel what is queued behind it, and end the thread."""
        with self._wake:
            self._closed = True
            self.free = False
            pending, self._queue = list(self._queue), deque()
            self._wake.notify()
        for handle in pending:
            handle.cancel(NotInitializedError("hvdkit was shut down before the operation began"))
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
                    handle = self._queue.popleft() if self._queue else None
                    self.free = not self._queue and not self._closed
                if handle is not None:
                    handle.run()
