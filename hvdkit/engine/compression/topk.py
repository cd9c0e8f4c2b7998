"""Buckets of which only the elements of largest magnitude travel.

        add the gradient to the residual                          [1]
        take the k largest out of it, indices and values          [2]
        all-gather                                                [3]   8k(p-1) bytes
        sum up all ranks' values, densely                         [4]   rank 0's first

[Stich et al., Sparsified SGD with Memory, NeurIPS 2018, algorithm 1; Lin et al., Deep Gradient
Compression, ICLR 2018, section 3, without its momentum correction, which is an optimizer's part.]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit import collectives
from hvdkit.collectives import Group
from hvdkit.engine.bucketing import Bucket, Gradient
from hvdkit.engine.compression.base import (
    FLOAT32,
    FLOATS,
    Allocate,
    BucketCodec,
    Compressor,
    LossyCodec,
    PlainCodec,
    Scaling,
    add,
)
from hvdkit.errors import ArgumentError, UnsupportedError

#: A float32's bits without its sign: as integers in the order of magnitudes, NaN the largest.
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)

#: One element in so many makes the sample; a prime, lest it be a matrix's first columns.
_SAMPLE = 61


@dataclass(frozen=True)
class TopK(Compressor):
    """Of each bucket the `ratio` of its elements that are largest travel, as float32; at least one.

    For buckets of float16, bfloat16, float32 and float64, computed in float32; others travel as
    they are.  What is not sent stays in the residual until it is among the largest.

    The choice is a bucket's, not a gradient's: of all choices of k elements it leaves the smallest
    residual, it costs one selection and one message, and small gradients, of which even one
    element may be much, do not swell it.  Gradients much smaller than the others of their bucket
    travel seldom, but then with all that has come together.

    An element costs 8 bytes for each other rank, so that among p ranks a ratio above 1/p sends more
    than float32 without compression would.

    NaN and infinities count as the largest: they travel at once and leave nothing behind.  Should
    more than fit be there, the rest is dropped from the residual.

    Args:
        ratio: above 0; at most 1, which loses nothing.

    Raises:
        ArgumentError: `ratio` is out of range.
    """

    ratio: float = 0.01

    def __post_init__(self) -> None:
        try:
            ratio = float(self.ratio)
        except (TypeError, ValueError):
            ratio = 0.0
        if not 0.0 < ratio <= 1.0:
            raise ArgumentError(f"ratio must be above 0 and at most 1, not {self.ratio!r}")
        object.__setattr__(self, "ratio", ratio)

    def bind(
        self, bucket: Bucket, gradients: Sequence[Gradient], allocate: Allocate
    ) -> BucketCodec:
        """Return the codec of one bucket.

        Raises:
            UnsupportedError: the bucket has more than 2^32 elements.
        """
        del gradients, allocate  # no buffer is all-reduced
        if bucket.dtype not in FLOATS or not bucket.count:
            return PlainCodec(bucket)
        if bucket.count > 1 << 32:
            raise UnsupportedError(
                f"TopK has indices of 32 bits, too few for a bucket of {bucket.count} elements; "
                "give smaller buckets, or another compression"
            )
        return _TopKCodec(self, bucket)


class _TopKCodec(LossyCodec):
    """What this rank has not sent yet."""

    first = "allgather"

    def __init__(self, compressor: TopK, bucket: Bucket) -> None:
        super().__init__(compressor, bucket)
        self._residual = np.zeros(bucket.count, np.float32)
        chosen = max(1, round(compressor.ratio * bucket.count))
        self._message = np.empty((2, chosen), np.uint32)
        """Indices, and the bits of the values."""
        self._scratch = np.empty(0 if bucket.dtype == FLOAT32 else bucket.count, np.float32)

    def reduce(self, group: Group, buffer: NDArray[Any], scaling: Scaling, label: str) -> None:
        add(self._residual, buffer)
        # From here to the result a float32 buffer is free, and serves as the scratch.
        scratch = buffer if buffer.dtype == FLOAT32 else self._scratch
        self._take_largest(scratch.view(np.int32))
        gathered = collectives.allgather(group, self._message, name=label, algorithm="auto")
        scratch[:] = 0.0
        for indices, values in gathered.reshape(group.size, *self._message.shape):
            scratch[indices] += values.view(np.float32)  # a rank sends no index twice
        np.multiply(scratch, np.float32(scaling.factor), out=buffer, casting="unsafe")

    def _take_largest(self, magnitudes: NDArray[np.int32]) -> None:
        """Move the elements of largest magnitude from the residual to the message.

        Args:
            magnitudes: scratch as long as the residual.
        """
        indices, values = self._message
        bits = self._residual.view(np.int32)
        np.bitwise_and(bits, _MAGNITUDE, out=magnitudes)
        candidates = _candidates(magnitudes, indices.size)
        found = magnitudes[candidates]
        least = np.partition(found, found.size - indices.size)[found.size - indices.size]
        above = candidates[found > least]
        indices[: above.size] = above
        indices[above.size :] = candidates[found == least][: indices.size - above.size]
        values[:] = bits.view(np.uint32)[indices]
        self._residual[indices] = 0.0
        if least >= _INFINITY:
            self._residual[magnitudes >= _INFINITY] = 0.0

    def wire_bytes(self, size: int) -> int:
        return self._message.nbytes * (size - 1)


def _candidates(magnitudes: NDArray[np.int32], chosen: int) -> NDArray[np.int64]:
    """Return indices that include those of the `chosen` largest, and not many more if it can be.

    A sample tells how large those must be; selecting among all takes ten times as long.  Where the
    sample misleads, it is all.
    """
    sample = magnitudes[::_SAMPLE]
    most = int(1.25 * chosen / _SAMPLE) + 32  # the largest of the sample that are likely to do
    if most < sample.size:
        bound = np.partition(sample, sample.size - most)[sample.size - most]
        candidates = np.flatnonzero(magnitudes >= bound)
        if candidates.size >= chosen:
            return candidates
    return np.arange(magnitudes.size)
