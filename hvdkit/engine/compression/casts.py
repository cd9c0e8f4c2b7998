"""Buckets that travel as 16-bit floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hvdkit.collectives import Group
from hvdkit.dtypes import bfloat16
from hvdkit.engine.bucketing import Bucket, Gradient
from hvdkit.engine.compression.base import (
    Allocate,
    BucketCodec,
    Compressor,
    LossyCodec,
    PlainCodec,
    Scaling,
    allreduce_bytes,
    sum_in_place,
)
from hvdkit.errors import ArgumentError

_HALVES = (np.dtype(np.float16), bfloat16)
_WIDER = (np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True)
class Cast(Compressor):
    """Buckets of float32 and float64 travel, and are summed, in 16 bits; others as they are.

    Contributions are scaled in their own precision and rounded once to `dtype`; each of the
    additions, of which a result has p-1, rounds once more; division and postscale are done in the
    bucket's precision again.  Nothing is fed back: the error is half a unit in the last place of
    16 bits, and a NaN or an infinity leaves nothing behind.

    A value or a sum beyond float16's 65504 becomes an infinity, as in a cast; one below 2^-25
    becomes 0.  A prescale, such as 1/p with Sum in place of Average, keeps sums in range.  bfloat16
    has float32's range, and 8 significant bits instead of float16's 11.

    Args:
        dtype: float16 or bfloat16.

    Raises:
        ArgumentError: another dtype.
    """

    dtype: DTypeLike

    def __post_init__(self) -> None:
        try:
            dtype = np.dtype(self.dtype)
        except TypeError:
            dtype = np.dtype(object)
        if dtype not in _HALVES:
            raise ArgumentError(f"Cast takes float16 or bfloat16, not {self.dtype!r}")
        object.__setattr__(self, "dtype", dtype)

    def __repr__(self) -> str:
        return f"Cast({np.dtype(self.dtype).name})"

    def bind(
        self, bucket: Bucket, gradients: Sequence[Gradient], allocate: Allocate
    ) -> BucketCodec:
        del gradients
        if bucket.dtype not in _WIDER or not bucket.count:
            return PlainCodec(bucket)
        return _CastCodec(self, bucket, allocate(bucket.count, np.dtype(self.dtype)))


class _CastCodec(LossyCodec):
    """The bucket's buffer in 16 bits."""

    def __init__(self, compressor: Cast, bucket: Bucket, wire: NDArray[Any]) -> None:
        super().__init__(compressor, bucket)
        self._wire = wire

    def reduce(self, group: Group, buffer: NDArray[Any], scaling: Scaling, label: str) -> None:
        wire = self._wire
        if scaling.prescale != 1.0:
            group.kernels.scale(buffer, factor=scaling.prescale)
        group.kernels.convert(wire, buffer)
        sum_in_place(group, wire, label)
        group.kernels.convert(buffer, wire)
        group.kernels.scale(buffer, divisor=scaling.divisor, factor=scaling.postscale)

    def wire_bytes(self, size: int) -> int:
        return allreduce_bytes(self._wire.nbytes, size)
