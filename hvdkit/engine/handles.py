"""Handles: the promise of an asynchronous operation's result."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger("hvdkit")


class Handle(Generic[T]):
    """The promise of an asynchronous operation's result.  Threads may share it.

    Args:
        title: what the operation is, for errors; such as ``"allreduce 'loss'"``.
    """

    __slots__ = ("_callbacks", "_done", "_error", "_lock", "_result", "hurry", "title", "waiters")

    def __init__(self, title: str = "the operation") -> None:
        self.title = title
        self.hurry: Callable[[], None] | None = None
        """Called by whoever begins to wait."""
        self.waiters = 0
        """Threads that wait for the result at this moment, however long it takes."""
        self._done = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Handle[T]], None]] = []
        self._lock = threading.Lock()  # an Event costs ten times as much, and there are thousands
        self._lock.acquire()

    def poll(self) -> bool:
        """Return whether the operation is complete; local, never blocks."""
        return self._done

    def wait(self, timeout: float | None = None) -> T:
        """Return the result when the operation is complete.

        Raises:
            TimeoutError: it is not, after `timeout` seconds; it goes on.
            Whatever the operation raised.
        """
        if not self._done:
            self.waiters += timeout is None
            try:
                if self.hurry is not None:
                    self.hurry()
                longest = -1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX)
                if not self._lock.acquire(timeout=longest):
                    raise TimeoutError(f"{self.title} did not complete within {timeout} s")
                self._lock.release()
            finally:
                self.waiters -= timeout is None
        if self._error is not None:
            raise self._error
        result: T = self._result
        return result

    def when_done(self, callback: Callable[[Handle[T]], None]) -> None:
        """Call `callback` with this handle once it is complete, on whichever thread sees that.

        What it raises is logged.
        """
        self._callbacks.append(callback)
        if self._done:
            self._call_back()

    def run(self, work: Callable[[], T]) -> None:
        """Complete with what `work` returns or raises."""
        try:
            result = work()
        except BaseException as exc:
            self.fail(exc)
        else:
            self.complete(result)

    def complete(self, result: T) -> None:
        """Complete with a result; once."""
        self._result = result
        self._finish()

    def fail(self, error: BaseException) -> None:
        """Complete with an error; once."""
        self._error = error
        self._finish()

    def _finish(self) -> None:
        self._done = True
        self._lock.release()
        self._call_back()

    def _call_back(self) -> None:
        while self._callbacks:
            try:
                callback = self._callbacks.pop(0)
            except IndexError:  # another thread was quicker
                return
            try:
                callback(self)
            except Exception:  # the thread that completes handles has others to complete
                log.exception("a callback of %s failed", self.title)
