"""What torch.distributed's asynchronous calls return, and the time limit on what they started."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import distributed as dist
from torch.futures import Future

from hvdkit.engine.channel import Channel
from hvdkit.errors import StallError


class Promise(Protocol):
    """An operation under way: a `Handle` of the engine, or a message between two ranks."""

    title: str

    def poll(self) -> bool:
        """Return whether it is complete."""
        ...

    def wait(self, timeout: float | None = None) -> Any:
        """Return when it is complete, or raise what it raised, or TimeoutError."""
        ...

    def when_done(self, callback: Callable[[Any], None]) -> None:
        """Call `callback` with the promise once it is complete."""
        ...


class Work(dist.Work):
    """An operation of a process group.  Its methods are those of `torch.distributed.Work`.

    Args:
        promise: of the operation's end.
        outputs: what it writes: the value of its future.
    """

    def __init__(self, promise: Promise, outputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._promise = promise
        self._outputs = list(outputs)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return True when the operation is complete.  Blocking.

        Args:
            timeout: zero: that of the process group, which ends the operation itself.

        Raises:
            StallError: the operation is not complete; it goes on.
            Whatever the operation raised.
        """
        try:
            self._promise.wait(timeout.total_seconds() or None)
        except TimeoutError as exc:
            raise StallError(str(exc)) from exc
        return True

    def is_completed(self) -> bool:
        return self._promise.poll()

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> Exception | None:
        """Return what the operation raised; None if nothing, or if it is not complete."""
        return _error(self._promise) if self.is_completed() else None

    def result(self) -> list[torch.Tensor]:
        return self._outputs

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        """Return the rank in the group that sent the message which was received."""
        source: int = self._promise.wait()
        return source

    _source_rank = source_rank

    def get_future(self) -> Any:
        """Return a `torch.futures.Future` of the outputs.

        Its callbacks run on the thread that completes the operation.  Collectives of the same
        process group that they start run at once, within the callback: between the operation and
        the next one, as on the other ranks.
        """
        settled: Future[Any] = Future()
        self._promise.when_done(
            lambda promise: settled.set_result((self._outputs, _error(promise)))
        )
        # An exception that is set is a value to C++; one that a callback raises is an error.
        return settled.then(_unwrap)


def _error(promise: Promise) -> Exception | None:
    """Return the error with which an operation ended that is complete."""
    try:
        promise.wait()
    except Exception as exc:
        return exc
    return None


def _unwrap(settled: Future[Any]) -> list[torch.Tensor]:
    outputs, error = settled.value()
    if error is not None:
        raise error
    return list(outputs)


class TimeLimit:
    """Ends a channel, for good, in which an operation takes longer than it may.

    Args:
        channel: whose operations run through `run`.
        seconds: what each may take, if it says nothing else.
    """

    def __init__(self, channel: Channel, seconds: float) -> None:
        self.seconds = seconds
        self._channel = channel
        self._until = math.inf
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def run(
        self, timeout: timedelta | None, operation: Callable[..., None], *arguments: Any
    ) -> None:
        """Run ``operation(group, *arguments)``, on the channel's lane.

        Args:
            timeout: of this operation; None or negative: the usual one.
        """
        own = -1.0 if timeout is None else timeout.total_seconds()
        self._until = time.monotonic() + (own if own > 0 else self.seconds)
        if self._thread is None:
            name = f"hvdkit-{self._channel.key}-time-limit"
            self._thread = threading.Thread(target=self._watch, name=name, daemon=True)
            self._thread.start()
        try:
            operation(self._channel.group, *arguments)
        finally:
            self._until = math.inf

    @property
    def closed(self) -> bool:
        return self._closing.is_set()

    def close(self) -> None:
        """Watch no longer."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() > self._until:
                stage = self._channel.look()
                self._channel.group.abort(
                    StallError(
                        f"{stage.title} took longer than the timeout of {self._channel.key}\n"
                        "Every rank of the group must make the same calls; the group is of no "
                        "more use. A longer timeout goes to init_process_group or new_group."
                    )
                )
                return
