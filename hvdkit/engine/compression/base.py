"""What every compressor is, and what the lossy ones share.

A `Compressor` is the choice that a user makes; bound to a bucket it becomes a `BucketCodec`, which
keeps what goes from one step to the next.  Most lossy codecs feed their error back [Seide et al.,
1-bit SGD, Interspeech 2014; Karimireddy et al., ICML 2019]:

        step t      c = gradient + residual     [1]
                    send C(c)                   [2]   C: the compression
                    residual = c - C(c)         [3]   sent in later steps

so that a sum over steps lacks no more than the last residuals.  Residuals are in the gradients' own
units, before prescale, average and postscale: these may change from one step to the next.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hvdkit import collectives
from hvdkit.collectives import Group
from hvdkit.dtypes import Average, ReduceOp, Sum, bfloat16
from hvdkit.engine.bucketing import Bucket, Gradient
from hvdkit.errors import ArgumentError

#: Returns a zeroed 1-D buffer of ``(count, dtype)``, in the arena where there is one.  Collective.
Allocate: TypeAlias = Callable[[int, np.dtype[Any]], NDArray[Any]]

#: What the lossy compressors compute in; a float64 beyond its range is an infinity to them.
FLOAT32 = np.dtype(np.float32)

#: Dtypes that the lossy compressors take.  Buckets of others travel as they are.
FLOATS = (np.dtype(np.float16), bfloat16, FLOAT32, np.dtype(np.float64))

#: Elements worked on at a time, so that the temporaries stay in the cache.
SLAB = 65536


class Compressor(ABC):
    """How gradients travel.  Immutable; equal `repr` on two ranks means equal bytes on the wire."""

    @abstractmethod
    def bind(
        self, bucket: Bucket, gradients: Sequence[Gradient], allocate: Allocate
    ) -> BucketCodec:
        """Return the codec of one bucket.  Collective if `allocate` is; one order on all ranks.

        Args:
            bucket: what travels together.
            gradients: the model's, which the members of `bucket` are numbers of.
            allocate: makes the buffers that are all-reduced in place.
        """


class BucketCodec(ABC):
    """A compressor's state for one bucket, among one group of ranks."""

    @abstractmethod
    def allreduce(
        self,
        group: Group,
        buffer: NDArray[Any],
        *,
        op: ReduceOp,
        name: str,
        prescale: float,
        postscale: float,
    ) -> None:
        """Reduce `buffer` over all ranks, in place; collective, blocking.

        All ranks end with the same bits.  What a failed call leaves in `buffer` is undefined.

        Args:
            group: the same in every call.
            buffer: the bucket's: 1-D, contiguous.
            op: Sum or Average.
            name: for messages and the check; of this bucket alone.
            prescale: factor of each contribution.
            postscale: factor of the result, after an average is divided.

        Raises:
            ArgumentError: another op.  The other ranks get a MismatchError that says so.
            MismatchError: on every rank, if ranks disagree.
            PeerError: another rank died.
        """

    @abstractmethod
    def wire_bytes(self, size: int) -> int:
        """Return the bytes that one of `size` ranks sends a step.

        By the algorithms that send least: 2n(p-1)/p for an all-reduce of n bytes, n(p-1) for an
        all-gather of n bytes a rank.
        """


@dataclass(frozen=True)
class NoCompression(Compressor):
    """Buckets travel as they are, of whatever dtype."""

    def bind(
        self, bucket: Bucket, gradients: Sequence[Gradient], allocate: Allocate
    ) -> BucketCodec:
        del gradients, allocate
        return PlainCodec(bucket)


class PlainCodec(BucketCodec):
    """An all-reduce of the buffer itself.  Takes every op that the dtype has."""

    def __init__(self, bucket: Bucket) -> None:
        self._nbytes = bucket.count * bucket.dtype.itemsize

    def allreduce(
        self,
        group: Group,
        buffer: NDArray[Any],
        *,
        op: ReduceOp,
        name: str,
        prescale: float,
        postscale: float,
    ) -> None:
        collectives.allreduce(
            group,
            buffer,
            buffer,
            op=op,
            name=name,
            prescale=prescale,
            postscale=postscale,
            algorithm="auto",
        )

    def wire_bytes(self, size: int) -> int:
        return allreduce_bytes(self._nbytes, size)


@dataclass(frozen=True)
class Scaling:
    """What becomes of a sum of contributions."""

    op: ReduceOp
    prescale: float
    divisor: int
    postscale: float

    @property
    def factor(self) -> float:
        """All of it in one number."""
        return self.prescale * self.postscale / self.divisor


class LossyCodec(BucketCodec):
    """What the lossy codecs share: a rank alone, or an empty bucket, loses nothing.

    Args:
        compressor: whose codec this is; its `repr` is part of what the ranks agree on.
        bucket: of one of `FLOATS`.
    """

    first: ClassVar[str] = "allreduce"
    """The collective in which other ranks wait for one that refuses."""

    def __init__(self, compressor: Compressor, bucket: Bucket) -> None:
        self._compressor = compressor
        self._plain = PlainCodec(bucket)

    def allreduce(
        self,
        group: Group,
        buffer: NDArray[Any],
        *,
        op: ReduceOp,
        name: str,
        prescale: float,
        postscale: float,
    ) -> None:
        if op not in (Sum, Average):
            error = ArgumentError(f"{self._compressor} has Sum and Average, not {op}")
            group.refuse(self.first, name, error)
        if group.size == 1 or buffer.size == 0:
            self._plain.allreduce(
                group, buffer, op=op, name=name, prescale=prescale, postscale=postscale
            )
            return
        scaling = Scaling(op, prescale, group.size if op == Average else 1, postscale)
        # What a collective of the compressed form does not show, its name does: ranks that differ
        # in the compressor, the op or a factor get an error, without another round to compare.
        label = f"{name} ({self._compressor}, {op!s}, factors {prescale} and {postscale})"
        with np.errstate(all="ignore"):
            self.reduce(group, buffer, scaling, label)

    @abstractmethod
    def reduce(self, group: Group, buffer: NDArray[Any], scaling: Scaling, label: str) -> None:
        """Reduce a `buffer` that is not empty over two ranks or more, as `allreduce` says."""


def sum_in_place(group: Group, wire: NDArray[Any], label: str) -> None:
    """Replace `wire` by the sum of all ranks' wires; collective, blocking."""
    collectives.allreduce(
        group, wire, wire, op=Sum, name=label, prescale=1.0, postscale=1.0, algorithm="auto"
    )


def add(residual: NDArray[np.float32], gradient: NDArray[Any]) -> None:
    """Add a gradient of any of `FLOATS` to a residual of the same shape, in float32."""
    np.add(residual, gradient, out=residual, dtype=FLOAT32, casting="unsafe")


def allreduce_bytes(nbytes: int, size: int) -> int:
    """Return what a rank sends in an all-reduce of `nbytes`, at the least."""
    return 2 * nbytes * (size - 1) // size


def positive_whole(label: str, value: SupportsIndex) -> int:
    """Return `value` as an int.

    Raises:
        ArgumentError: it is not a whole number, or less than one.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ArgumentError(f"{label} must be a whole number, 1 or more, not {value!r}")
    return number
