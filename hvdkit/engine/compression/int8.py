"""Buckets that travel as 8-bit integers, each block of them with a scale.

        p = 3       quantise the blocks, residual added           [1]
                    all-to-all: rank r gets the blocks of shard r [2]   n(p-1)/p bytes
                    sum up the p contributions to a shard         [3]   in float32, rank 0's first
                    quantise the sum, residual added              [4]
                    all-gather the shards                         [5]   n(p-1)/p bytes

The collectives are those of a ring all-reduce, reduce-scatter and all-gather, with n a quarter of
float32's and a scale a block.  What is quantised twice has an error to feed back twice: [1] each
rank's own, of all the bucket; [4] the sum's, of this rank's shard [Tang et al., DoubleSqueeze, ICML
2019].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit import collectives
from hvdkit.collectives import Group
from hvdkit.collectives.reducescatter import rows_per_rank
from hvdkit.engine.bucketing import Bucket, Gradient
from hvdkit.engine.compression.base import (
    FLOATS,
    SLAB,
    Allocate,
    BucketCodec,
    Compressor,
    LossyCodec,
    PlainCodec,
    Scaling,
    add,
    allreduce_bytes,
    positive_whole,
)

#: The largest step; -128 is left out, for a range as wide on either side of zero.
_STEPS = 127


@dataclass(frozen=True)
class Int8(Compressor):
    """Blocks of `block` elements travel as int8 steps of the block's largest magnitude / 127.

    For buckets of float16, bfloat16, float32 and float64, computed in float32; others travel as
    they are.  A contribution is off by half a step at the most, and so is their sum by half of its
    own.  A block below 127 * 2^-126 throughout travels as zeros and waits in the residual.

    A block with a NaN or an infinity arrives as NaN throughout, and its residuals start again from
    zero: the next step's result has no trace of it.

    Args:
        block: elements that share a scale.  Smaller ones follow the gradients more closely; a scale
            costs 4 bytes.

    Raises:
        ArgumentError: `block` is not a whole number of at least 1.
    """

    block: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", positive_whole("block", self.block))

    def bind(
        self, bucket: Bucket, gradients: Sequence[Gradient], allocate: Allocate
    ) -> BucketCodec:
        del gradients, allocate  # no buffer is all-reduced
        if bucket.dtype not in FLOATS or not bucket.count:
            return PlainCodec(bucket)
        return _Int8Codec(self, bucket)


class _Int8Codec(LossyCodec):
    """What this rank has to send yet: of its own, and of the sum of its shard."""

    first = "alltoall"

    def __init__(self, compressor: Int8, bucket: Bucket) -> None:
        super().__init__(compressor, bucket)
        self._blocks = _Blocks(bucket.count, min(compressor.block, bucket.count))
        self._shard: _Blocks | None = None

    def reduce(self, group: Group, buffer: NDArray[Any], scaling: Scaling, label: str) -> None:
        rows = rows_per_rank(len(self._blocks.records), group.size)
        own = rows[group.rank]
        if self._shard is None:
            width = self._blocks.width
            self._shard = _Blocks(own * width, width)
        add(self._blocks.flat[: buffer.size], buffer)
        self._blocks.quantise()
        received, _ = collectives.alltoall(
            group, _as_bytes(self._blocks.records), rows, name=label, algorithm="auto"
        )
        contributions = self._blocks.as_records(received)
        for rank in range(group.size):
            self._shard.add(contributions[rank * own : (rank + 1) * own])
        self._shard.quantise()
        everything = collectives.allgather(
            group, _as_bytes(self._shard.records), name=label, algorithm="auto"
        )
        self._blocks.dequantise(self._blocks.as_records(everything), buffer, scaling.factor)

    def wire_bytes(self, size: int) -> int:
        return allreduce_bytes(self._blocks.records.nbytes, size)


class _Blocks:
    """Float32 values yet to be sent, in blocks, and the records in which they are.

    Args:
        count: values; the last block is filled up with zeros.
        width: values of a block.
    """

    def __init__(self, count: int, width: int) -> None:
        rows = -(-count // width)
        self.width = width
        self.residual = np.zeros((rows, width), np.float32)
        self.flat = self.residual.reshape(-1)
        record = np.dtype([("scale", np.float32), ("steps", np.int8, (width,))])
        self.records = np.zeros(rows, record)
        self._rows_at_once = max(1, SLAB // width)
        self._scratch = np.empty((min(rows, self._rows_at_once), width), np.float32)

    def quantise(self) -> None:
        """Move the residual into the records; what they cannot hold stays."""
        for rows, scratch in self._slabs(len(self.records)):
            values, records = self.residual[rows], self.records[rows]
            peak = np.abs(values, out=scratch).max(axis=1)
            broken = ~np.isfinite(peak)
            if broken.any():
                values[broken] = 0.0
                peak[broken] = 0.0
            scale = peak / np.float32(_STEPS)
            scale[scale < np.finfo(np.float32).tiny] = 0.0  # too few bits for 127 steps to fit
            per_step = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
            np.rint(np.multiply(values, per_step[:, None], out=scratch), out=scratch)
            np.copyto(records["steps"], scratch, casting="unsafe")
            values -= np.multiply(scratch, scale[:, None], out=scratch)
            scale[broken] = np.nan
            records["scale"] = scale

    def add(self, records: NDArray[Any]) -> None:
        """Add another rank's records of these blocks."""
        for rows, scratch in self._slabs(len(records)):
            self._decode(records[rows], scratch, 1.0)
            self.residual[rows] += scratch

    def dequantise(self, records: NDArray[Any], out: NDArray[Any], factor: float) -> None:
        """Write all blocks' records times `factor` to 1-D `out`, without the last one's filling."""
        for rows, scratch in self._slabs(len(records)):
            self._decode(records[rows], scratch, factor)
            part = out[rows.start * self.width : rows.stop * self.width]
            np.copyto(part, scratch.reshape(-1)[: part.size], casting="unsafe")

    def as_records(self, received: NDArray[np.uint8]) -> NDArray[Any]:
        """Return received bytes as the records that they are."""
        return received.reshape(-1).view(self.records.dtype)

    def _slabs(self, count: int) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield slices of `count` rows, each with scratch as large."""
        for start in range(0, count, self._rows_at_once):
            stop = min(start + self._rows_at_once, count)
            yield slice(start, stop), self._scratch[: stop - start]

    @staticmethod
    def _decode(records: NDArray[Any], out: NDArray[np.float32], factor: float) -> None:
        np.copyto(out, records["steps"])
        out *= (records["scale"] * np.float32(factor))[:, None]


def _as_bytes(records: NDArray[Any]) -> NDArray[np.uint8]:
    """Return records as rows of bytes, over the same memory."""
    return records.view(np.uint8).reshape(len(records), records.itemsize)
