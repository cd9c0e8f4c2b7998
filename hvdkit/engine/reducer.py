"""Average a model's gradients in buckets, each as soon as its last gradient is there.

            backward  ... g5 g4 | g3 g2 | g1 g0
    bucket 0 [g5 g4]            ^ all-reduce while g3 and g2 are computed          [1]
    bucket 1 [g3 g2]                    ^                                          [2]
    bucket 2 [g1 g0]                            ^ wait for all at the end of step  [3]

Buckets start in the order of the plan on every rank, whatever the order in which gradients come.
The buffers live in the shared-memory arena where there is one; an adapter lets gradients be views
of them, so that nothing is packed or unpacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.engine.bucketing import Bucket, Gradient, plan_buckets
from hvdkit.engine.progress import Handle
from hvdkit.errors import HvdkitError

#: Starts an in-place all-reduce of a bucket's buffer: ``(buffer, name) -> handle``.
StartAllreduce = Callable[[NDArray[Any], str], Handle[Any]]


class GradientReducer:
    """The buckets of one model.

    Args:
        gradients: all gradients in order of creation, the same on every rank.
        bucket_bytes: the most that travels together.
        allocate: returns a buffer of ``(count, dtype)``; the same calls on every rank.
        start: starts the all-reduce of a buffer.
    """

    def __init__(
        self,
        gradients: Sequence[Gradient],
        *,
        bucket_bytes: int,
        allocate: Callable[[int, np.dtype[Any]], NDArray[Any]],
        start: StartAllreduce,
    ) -> None:
        self.gradients = tuple(gradients)
        self.buckets: tuple[Bucket, ...] = plan_buckets(self.gradients, bucket_bytes)
        self.buffers = [allocate(bucket.count, bucket.dtype) for bucket in self.buckets]
        self.views: list[NDArray[Any]] = [np.empty(0)] * len(self.gradients)
        """Each gradient's place in its bucket, in the gradient's shape."""
        self._bucket_of = [0] * len(self.gradients)
        for number, (bucket, buffer) in enumerate(zip(self.buckets, self.buffers, strict=True)):
            for index, offset in zip(bucket.members, bucket.offsets, strict=True):
                gradient = self.gradients[index]
                self.views[index] = buffer[offset : offset + gradient.count].reshape(gradient.shape)
                self._bucket_of[index] = number
        self._start = start
        self._missing: list[set[int]] = []
        self._handles: list[Handle[Any]] = []
        self._rewind()

    @property
    def in_flight(self) -> bool:
        """Whether gradients have come since the last `finish`."""
        return bool(self._handles) or any(
            len(missing) < len(bucket.members)
            for missing, bucket in zip(self._missing, self.buckets, strict=True)
        )

    def missing(self) -> list[int]:
        """Return the gradients that have not come since the last `finish`, in plan order."""
        return [
            index
            for bucket, missing in zip(self.buckets, self._missing, strict=True)
            for index in bucket.members
            if index in missing
        ]

    def ready(self, index: int) -> None:
        """Note that gradient `index` is in its view; start whichever buckets are now full.

        Raises:
            HvdkitError: the gradient has come already since the last `finish`.
        """
        missing = self._missing[self._bucket_of[index]]
        if index not in missing:
            raise HvdkitError(
                f"the gradient of {self.gradients[index].name!r} came a second time before step(): "
                "call step() or synchronize() after each backward(); to accumulate gradients over "
                "several backward passes, sum up their losses into one"
            )
        missing.remove(index)
        while len(self._handles) < len(self.buckets) and not self._missing[len(self._handles)]:
            self._start_next()

    def finish(self) -> None:
        """Count absent gradients as zeros, and return when every bucket is reduced.  Blocking."""
        try:
            while len(self._handles) < len(self.buckets):
                for index in self._missing[len(self._handles)]:
                    self.views[index][...] = 0
                self._start_next()
        finally:
            errors = [error for handle in self._handles if (error := _outcome(handle)) is not None]
            self._rewind()
        if errors:
            raise errors[0]

    def _start_next(self) -> None:
        number = len(self._handles)
        self._handles.append(self._start(self.buffers[number], f"bucket.{number}"))

    def _rewind(self) -> None:
        self._missing = [set(bucket.members) for bucket in self.buckets]
        self._handles = []


def _outcome(handle: Handle[Any]) -> Exception | None:
    """Return the error with which an operation ended, or None, when it has ended."""
    try:
        handle.wait()
    except Exception as exc:
        return exc
    return None
