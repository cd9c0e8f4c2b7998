"""Handles: the promise of tensors, by an operation under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdkit.engine.handles import Handle


class TensorHandle:
    """An operation under way on tensors."""

    __slots__ = ("_finish", "_handle")

    def __init__(self, handle: Handle[Any], finish: Callable[[Any], Any]) -> None:
        self._handle = handle
        self._finish = finish

    def poll(self) -> bool:
        """Return whether the operation is complete; local, never blocks."""
        return self._handle.poll()

    def wait(self, timeout: float | None = None) -> Any:
        """Return the result, a tensor or several.  Blocking.

        Raises:
            TimeoutError: not complete after `timeout` seconds; the operation goes on.
            Whatever the operation raised.
        """
        return self._finish(self._handle.wait(timeout))


def poll(handle: TensorHandle) -> bool:
    """Return whether an asynchronous operation is complete; local, never blocks."""
    return handle.poll()


def synchronize(handle: TensorHandle, timeout: float | None = None) -> Any:
    """Return the result of an asynchronous operation, when it is complete.  Blocking.

    Args:
        handle: what the operation's function returned.
        timeout: seconds; None: no limit.

    Raises:
        TimeoutError: not complete after `timeout` seconds; the operation goes on.
        MismatchError: on every rank, if ranks asked for different things under the name.
        StallError: a rank did not come; see ``HVDKIT_STALL_SHUTDOWN_TIME_SECONDS``.
        PeerError: another rank died.
    """
    return handle.wait(timeout)
