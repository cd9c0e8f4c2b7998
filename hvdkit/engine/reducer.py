"""Reduce a model's gradients in buckets, each as soon as its last gradient is there.

            backward  ... g5 g4 | g3 g2 | g1 g0
    bucket 0 [g5 g4]            ^ all-reduce while g3 and g2 are computed          [1]
    bucket 1 [g3 g2]                    ^                                          [2]
    bucket 2 [g1 g0]                            ^ wait for all at the end of step  [3]

Buckets start in the order of the plan on every rank, whatever the order in which gradients come.
The buffers live in the shared-memory arena where there is one; an adapter lets gradients be views
of them, so that nothing is packed or unpacked.

The first plan takes gradients in reverse order of creation.  `replan` makes the one for all later
steps, from what the first step has shown: the order in which gradients really come on rank 0, and
which of them do not travel in buckets at all, being sparse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from hvdkit.collectives.adasum import adasum
from hvdkit.collectives.calls import Call
from hvdkit.dtypes import Average, ReduceOp
from hvdkit.engine.bucketing import Bucket, Gradient, plan_buckets, plan_groups
from hvdkit.engine.channel import Channel
from hvdkit.engine.compression import BucketCodec, Compressor, NoCompression
from hvdkit.engine.handles import Handle
from hvdkit.errors import HvdkitError, UnsupportedError


class Staging(Protocol):
    """Moves buckets between a device and the host; see the adapters."""

    def came(self, number: int) -> None:
        """Note that a gradient was put into the bucket on the device.  On its thread."""
        ...

    def filled(self, number: int) -> None:
        """Start to bring the bucket, complete now, into its buffer.  Must not wait for it."""
        ...

    def fetch(self, number: int) -> None:
        """Return when the bucket is in its buffer.  On the lane's thread."""
        ...

    def store(self, number: int) -> None:
        """Start to bring the buffer back to the device.  On the lane's thread."""
        ...


class GradientReducer:
    """The buckets of one model.  Creating it is collective.

    Args:
        gradients: all gradients in order of creation, the same on every rank.
        channel: on which the buckets travel; nothing else does.
        bucket_bytes: the most that travels together.
        op: Average, Sum or Adasum.
        prescale: multiplies each contribution first.
        postscale: multiplies the result last.
        compression: how buckets travel.
        groups: gradients that travel together, instead of buckets by size; the others alone.
        staging: for gradients that are on a device.
    """

    def __init__(
        self,
        gradients: Sequence[Gradient],
        *,
        channel: Channel,
        bucket_bytes: int,
        op: ReduceOp = Average,
        prescale: float = 1.0,
        postscale: float = 1.0,
        compression: Compressor | None = None,
        groups: Sequence[Sequence[int]] | None = None,
        staging: Staging | None = None,
    ) -> None:
        self.gradients = tuple(gradients)
        self.channel = channel
        self.staging = staging
        self._bucket_bytes = bucket_bytes
        self._groups = groups
        self._compression = compression or NoCompression()
        self._op = op
        self._factors = {"prescale": prescale, "postscale": postscale}
        self._order = list(reversed(range(len(gradients))))
        self._arrived: list[int] = []
        self.settled = False
        """Whether the plan stays as it is."""
        self._bind(self._order)

    # The plan

    def _bind(self, order: Sequence[int]) -> None:
        """Make buckets, buffers and views for the gradients in `order`; the others have none."""
        if self._groups is None:
            self.buckets: tuple[Bucket, ...] = plan_buckets(
                self.gradients, self._bucket_bytes, order
            )
        else:
            self.buckets = plan_groups(self.gradients, self._groups, order)
        among = self.channel.group
        self.buffers = [among.empty(bucket.count, bucket.dtype) for bucket in self.buckets]
        self._codecs: list[BucketCodec] = [
            self._compression.bind(bucket, self.gradients, among.empty) for bucket in self.buckets
        ]
        self.views: list[NDArray[Any] | None] = [None] * len(self.gradients)
        """Each gradient's place in its bucket, in the gradient's shape; None: in no bucket."""
        self._bucket_of: dict[int, int] = {}
        for number, (bucket, buffer) in enumerate(zip(self.buckets, self.buffers, strict=True)):
            for index, offset in zip(bucket.members, bucket.offsets, strict=True):
                gradient = self.gradients[index]
                self.views[index] = buffer[offset : offset + gradient.count].reshape(gradient.shape)
                self._bucket_of[index] = number
        self._rewind()

    def replan(self, apart: Sequence[int] = ()) -> list[int]:
        """Settle the plan after the first step; all ranks get the same.  Collective, blocking.

        Args:
            apart: gradients that came in a form for which there is no bucket, on this rank.

        Returns:
            Those of all ranks, which have no view from now on.  If any view has changed, all have.

        Raises:
            UnsupportedError: a rank has joined in its first step, and there are some `apart`.
        """
        try:
            everywhere = self.channel.lane.call(self._replan, sorted(apart))
        except UnsupportedError:
            if apart:
                raise
            self._arrived.clear()
            return []  # one that has joined knows nothing of plans: again after the next step
        self.settled = True
        return everywhere

    def keep_plan(self) -> None:
        """Settle the first plan, as its order is known to be that in which gradients come."""
        self.settled = True

    def _replan(self, apart: Sequence[int]) -> list[int]:
        group = self.channel.group
        group.agree(Call("replan", None))
        # Twice the same gradient, as in a second pass of backward, counts where it came first.
        mine = (list(dict.fromkeys(self._arrived)), list(apart))
        everyone = group.transport.allgather_object(mine)
        everywhere = sorted(set().union(*(theirs for _, theirs in everyone)))
        came = [index for index in everyone[0][0] if index not in everywhere]
        rest = [index for index in self._order if index not in {*came, *everywhere}]
        order = came + rest
        if order != self._order:
            self._order = order
            self._bind(order)
        return everywhere

    # A step

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

    def has_come(self, index: int) -> bool:
        """Return whether a gradient has come since the last `finish`."""
        number = self._bucket_of.get(index)
        return number is not None and index not in self._missing[number]

    def ready(self, index: int) -> None:
        """Note that gradient `index` is in its view; start whichever buckets are now full.

        Raises:
            HvdkitError: the gradient has come already since the last `finish`.
        """
        number = self._bucket_of[index]
        missing = self._missing[number]
        if index not in missing:
            raise HvdkitError(
                f"the gradient of {self.gradients[index].name!r} came a second time before its "
                "bucket was finished"
            )
        missing.remove(index)
        if self.staging is not None:
            self.staging.came(number)
        if not self.settled:
            self._arrived.append(index)
        while len(self._handles) < len(self.buckets) and not self._missing[len(self._handles)]:
            self._start_next()

    def finish(self) -> None:
        """Return when every bucket is reduced.  Blocking.

        What has not come travels as it is in its view: an adapter puts zeros there first.
        """
        try:
            while len(self._handles) < len(self.buckets):
                self._start_next()
        finally:
            errors = [error for handle in self._handles if (error := _outcome(handle)) is not None]
            self._rewind()
        if errors:
            raise errors[0]

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sends in a step, as the compression counts them."""
        return sum(codec.wire_bytes(self.channel.group.size) for codec in self._codecs)

    def _start_next(self) -> None:
        number = len(self._handles)
        if self.staging is not None:
            self.staging.filled(number)
        self._handles.append(self.channel.lane.submit(lambda: self._reduce(number)))

    def _reduce(self, number: int) -> None:
        """All-reduce a bucket.  On the lane's thread."""
        if self.staging is not None:
            self.staging.fetch(number)
        name = f"bucket.{number}"
        if self._op is ReduceOp.ADASUM:
            parts = [
                view for i in self.buckets[number].members if (view := self.views[i]) is not None
            ]
            adasum(self.channel.group, parts, name=name, **self._factors)
        else:
            self._codecs[number].allreduce(
                self.channel.group, self.buffers[number], op=self._op, name=name, **self._factors
            )
        if self.staging is not None:
            self.staging.store(number)

    def _rewind(self) -> None:
        self._missing = [set(bucket.members) for bucket in self.buckets]
        self._handles: list[Handle[Any]] = []


def _outcome(handle: Handle[Any]) -> Exception | None:
    """Return the error with which an operation ended, or None, when it has ended."""
    try:
        handle.wait()
    except Exception as exc:
        return exc
    return None
