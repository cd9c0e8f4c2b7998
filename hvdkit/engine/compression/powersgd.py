"""Gradients that travel as the product of two thin matrices.

        M = gradient + residual, n x m, on each rank              [1]
        P = M Q, all-reduced                                      [2]   Q: of the step before
        P = orthonormalised P                                     [3]   the same bits on all ranks
        Q = M' P, all-reduced                                     [4]
        the sum of all gradients is about P Q'                    [5]
        residual = M - P Q', with this rank's own Q               [6]

One step of subspace iteration a training step [Vogels et al., PowerSGD, NeurIPS 2019, algorithms 1
and 2]; an all-reduce sends 4r(n + m) bytes instead of 4nm.  The authors' code, as torch's, has all
ranks' mean product in [6]; as [4] is linear, the sum of the residuals is the same, but a rank's
own then also gathers up, step after step, what distinguishes its gradients from the others'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives import Group
from hvdkit.engine.bucketing import Bucket, Gradient
from hvdkit.engine.compression.base import (
    FLOAT32,
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
    sum_in_place,
)

#: What is left of a column without the ones before it, at or below this part of it, is noise: the
#: product that it comes from was rounded to float32.
_NOISE = 1e-6


@dataclass(frozen=True)
class PowerSGD(Compressor):
    """Gradients travel as matrices of `rank`, first dimension by rest, where that halves the bytes.

    For buckets of float16, bfloat16, float32 and float64, computed in float32; others travel as
    they are.  So do, together in one all-reduce, gradients of one dimension and those too small to
    gain.  A sum of gradients that has the rank comes out exact but for rounding; of others, the
    rest stays in the residual.

    A NaN or an infinity on any rank makes the whole matrix NaN on all; its residual and Q start
    again, and the next step's result has no trace of it.

    Args:
        rank: columns of P and Q; the least of a matrix's dimensions where that is less.  Meant for
            1 to some tens: orthonormalising takes time in proportion to its square.

    Raises:
        ArgumentError: `rank` is not a whole number of at least 1.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", positive_whole("rank", self.rank))

    def bind(
        self, bucket: Bucket, gradients: Sequence[Gradient], allocate: Allocate
    ) -> BucketCodec:
        if bucket.dtype not in FLOATS or not bucket.count:
            return PlainCodec(bucket)
        matrices = []
        for index, offset in zip(bucket.members, bucket.offsets, strict=True):
            gradient = gradients[index]
            if self._gains(gradient):
                place = slice(offset, offset + gradient.count)
                matrices.append(_Matrix(place, gradient.shape[0], self.rank, seed=index))
        if not matrices:
            return PlainCodec(bucket)
        return _PowerSGDCodec(self, bucket, matrices, allocate)

    def _gains(self, gradient: Gradient) -> bool:
        """Return whether the two thin matrices have at most half of a gradient's bytes."""
        if len(gradient.shape) < 2 or not gradient.count:
            return False
        rows, columns = gradient.shape[0], gradient.count // gradient.shape[0]
        thin = min(self.rank, rows, columns) * (rows + columns) * FLOAT32.itemsize
        return 2 * thin <= gradient.count * gradient.dtype.itemsize


class _PowerSGDCodec(LossyCodec):
    """The matrices of a bucket, and the buffers in which all their factors travel together."""

    def __init__(
        self,
        compressor: PowerSGD,
        bucket: Bucket,
        matrices: list[_Matrix],
        allocate: Allocate,
    ) -> None:
        super().__init__(compressor, bucket)
        self._matrices = matrices
        self._places = _between([matrix.place for matrix in matrices], bucket.count)
        """What is not compressed, the gaps between gradients included."""
        self._left = allocate(sum(m.rank * m.rows for m in matrices), FLOAT32)
        self._right = allocate(sum(m.rank * m.columns for m in matrices), FLOAT32)
        uncompressed = sum(place.stop - place.start for place in self._places)
        self._uncompressed = (
            allocate(uncompressed, bucket.dtype) if uncompressed else np.empty(0, bucket.dtype)
        )
        left = right = 0
        for matrix in matrices:
            matrix.left = _cut(self._left, left, matrix.rank, matrix.rows)
            matrix.right = _cut(self._right, right, matrix.rank, matrix.columns)
            left, right = left + matrix.left.size, right + matrix.right.size
        self._scratch = np.empty(
            (2, max(max(m.columns, min(SLAB, m.rows * m.columns)) for m in matrices)), np.float32
        )

    def reduce(self, group: Group, buffer: NDArray[Any], scaling: Scaling, label: str) -> None:
        for matrix in self._matrices:
            matrix.begin(buffer)
        sum_in_place(group, self._left, f"{label}: P")
        for matrix in self._matrices:
            matrix.split(self._scratch[0])
        sum_in_place(group, self._right, f"{label}: Q")
        for matrix in self._matrices:
            matrix.finish(buffer, scaling.factor, self._scratch)
        self._reduce_uncompressed(group, buffer, scaling, label)

    def _reduce_uncompressed(
        self, group: Group, buffer: NDArray[Any], scaling: Scaling, label: str
    ) -> None:
        """All-reduce what is not compressed as `NoCompression` would, in one message."""
        wire = self._uncompressed
        if not wire.size:
            return
        np.concatenate([buffer[place] for place in self._places], out=wire)
        self._plain.allreduce(
            group,
            wire,
            op=scaling.op,
            name=f"{label}: uncompressed",
            prescale=scaling.prescale,
            postscale=scaling.postscale,
        )
        start = 0
        for place in self._places:
            stop = start + place.stop - place.start
            buffer[place] = wire[start:stop]
            start = stop

    def wire_bytes(self, size: int) -> int:
        wires = self._left, self._right, self._uncompressed
        return sum(allreduce_bytes(wire.nbytes, size) for wire in wires)


class _Matrix:
    """One gradient: its residual, and its factors P and Q, transposed.

    Args:
        place: where it is in the bucket.
        rows: its first dimension.
        rank: columns of its factors, at the most.
        seed: of the first Q; the same on all ranks.
    """

    def __init__(self, place: slice, rows: int, rank: int, *, seed: int) -> None:
        count = place.stop - place.start
        self.place = place
        self.rows, self.columns = rows, count // rows
        self.rank = min(rank, self.rows, self.columns)
        self.residual = np.zeros((self.rows, self.columns), np.float32)
        self.left: NDArray[np.float32] = np.empty(0, np.float32)
        self.right: NDArray[np.float32] = self.left
        """P' and Q', ``(rank, rows)`` and ``(rank, columns)``, in the buffers that travel."""
        # Uniform, because it takes integers only: the logarithms of normal ones may round apart.
        drawn = np.random.default_rng(seed).random((self.rank, self.columns), np.float32)
        self._first_right = drawn - np.float32(0.5)

    def begin(self, buffer: NDArray[Any]) -> None:
        """Add the gradient to the residual, and multiply by Q."""
        add(self.residual, buffer[self.place].reshape(self.residual.shape))
        self._renew_right()
        np.matmul(self.right, self.residual.T, out=self.left)

    def _renew_right(self) -> None:
        """Scale Q's columns to a largest element of 1, and replace those that are of no use.

        Columns are zeros at the start, and where the step before had no use for as many; they are
        not finite after a NaN.  Both would last for ever.
        """
        peak = np.abs(self.right).max(axis=1)
        useless = ~((peak > 0) & np.isfinite(peak))
        peak[useless] = 1.0
        self.right /= peak[:, None]
        self.right[useless] = self._first_right[useless]

    def split(self, scratch: NDArray[np.float32]) -> None:
        """Given the sum of all P, compute this rank's Q and the residual.

        The sum is finite if all ranks' matrices are.  If not, all ranks see so.
        """
        if not np.isfinite(self.left).all():
            self.left[:] = self.right[:] = np.nan
            return
        orthonormalise(self.left)
        np.matmul(self.left, self.residual, out=self.right)
        for rows in self._slabs():
            values = self.residual[rows]
            product = _cut(scratch, 0, *values.shape)
            values -= np.matmul(self.left[:, rows].T, self.right, out=product)

    def finish(self, buffer: NDArray[Any], factor: float, scratch: NDArray[np.float32]) -> None:
        """Given the sum of all Q, write the product times `factor` to the gradient's place.

        Element by element, which rounds alike on every machine, as BLAS does not, but takes time in
        proportion to the rank.
        """
        if not np.isfinite(self.right).all():  # nor, then, need the residual be
            self.residual[:] = 0.0
        right = self.right * np.float32(factor)
        target = buffer[self.place].reshape(self.residual.shape)
        for rows in self._slabs():
            part = target[rows]
            total = part if part.dtype == FLOAT32 else _cut(scratch[0], 0, *part.shape)
            term = _cut(scratch[1], 0, *part.shape)
            np.multiply(self.left[0, rows, None], right[0], out=total)
            for k in range(1, self.rank):
                total += np.multiply(self.left[k, rows, None], right[k], out=term)
            if total is not part:
                np.copyto(part, total, casting="unsafe")

    def _slabs(self) -> Iterator[slice]:
        """Yield the rows in slices that the scratch holds."""
        at_once = max(1, SLAB // self.columns)
        for start in range(0, self.rows, at_once):
            yield slice(start, min(start + at_once, self.rows))


def orthonormalise(rows: NDArray[np.float32]) -> None:
    """Make the rows of a ``(r, n)`` array orthogonal, of length 1, in place; or zeros.

    Gram-Schmidt in float64, each row twice [Giraud et al., Numer. Math. 101, 2005].  numpy's sums
    have one order of additions, so that ranks with equal rows get equal bits.  A row that the ones
    before it span becomes zeros: it has nothing to add.
    """
    basis = rows.astype(np.float64)
    for k in range(len(basis)):
        row, before = basis[k], basis[:k]
        length = _length(row)
        for _ in range(2):
            row -= ((before * row).sum(axis=1)[:, None] * before).sum(axis=0)
        rest = _length(row)
        row *= 1.0 / rest if rest > _NOISE * length else 0.0
    rows[:] = basis


def _length(row: NDArray[np.float64]) -> float:
    return math.sqrt((row * row).sum())


def _between(places: list[slice], count: int) -> list[slice]:
    """Return what ascending `places` leave of `count` elements."""
    starts = [0, *(place.stop for place in places)]
    stops = [*(place.start for place in places), count]
    return [slice(a, b) for a, b in zip(starts, stops, strict=True) if a < b]


def _cut(array: NDArray[np.float32], start: int, rows: int, columns: int) -> NDArray[np.float32]:
    """Return a part of 1-D `array` as a matrix, over the same memory."""
    return array[start : start + rows * columns].reshape(rows, columns)
