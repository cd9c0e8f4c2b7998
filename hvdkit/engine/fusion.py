"""Several all-reduces in one message: small arrays are packed, large ones go by themselves.

Packing costs two passes over the data, a message of its own costs a constant time.  In shared
memory the constant is so small that only small arrays gain; between nodes it is larger.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.arrays import ALIGNMENT
from hvdkit.collectives.adasum import adasum
from hvdkit.collectives.allreduce import allreduce
from hvdkit.collectives.group import Group
from hvdkit.config import KIB
from hvdkit.dtypes import ReduceOp

#: Up to this many bytes an array is packed with others: in shared memory, and over messages.
PACKED_IN_ARENA = 256 * KIB
PACKED_OVER_MESSAGES = 1024 * KIB

Pair = tuple[NDArray[Any], NDArray[Any]]


class Packer:
    """All-reduces several arrays of one group; keeps the buffers that it packs them in."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._buffers: dict[np.dtype[Any], NDArray[Any]] = {}
        self._limit = PACKED_OVER_MESSAGES if group.arena is None else PACKED_IN_ARENA

    def allreduce(self, pairs: Sequence[Pair], **how: Any) -> None:
        """Reduce each pair's source into its target; blocking.  Collective.

        Args:
            pairs: C-contiguous; the same shapes and dtypes in the same order on all ranks.
            how: op, prescale, postscale and algorithm, as `hvdkit.collectives.allreduce` has them.
        """
        if how["op"] is ReduceOp.ADASUM:
            for source, target in pairs:
                np.copyto(target, source)
            factors = {"prescale": how["prescale"], "postscale": how["postscale"]}
            adasum(self.group, [target for _, target in pairs], name=None, **factors)
            return
        packed: dict[np.dtype[Any], list[Pair]] = {}
        for source, target in pairs:
            if source.nbytes <= self._limit:
                packed.setdefault(source.dtype, []).append((source, target))
            else:
                allreduce(self.group, source, target, name=None, **how)
        for dtype, several in packed.items():
            if len(several) == 1:
                allreduce(self.group, *several[0], name=None, **how)
            else:
                self._allreduce_packed(dtype, several, **how)

    def _allreduce_packed(self, dtype: np.dtype[Any], pairs: Sequence[Pair], **how: Any) -> None:
        step = ALIGNMENT // dtype.itemsize
        offsets, end = [], 0
        for source, _ in pairs:
            offsets.append(end)
            end += -(-source.size // step) * step
        buffer = self._buffer(dtype, end)
        tracer, began = self.group.tracer, time.perf_counter()
        for (source, _), offset in zip(pairs, offsets, strict=True):
            buffer[offset : offset + source.size] = source.reshape(-1)
        if tracer is not None:
            tracer.step(f"pack {len(pairs)} arrays", began, buffer.nbytes)
        allreduce(self.group, buffer, buffer, name=None, **how)
        began = time.perf_counter()
        for (_, target), offset in zip(pairs, offsets, strict=True):
            target.reshape(-1)[:] = buffer[offset : offset + target.size]
        if tracer is not None:
            tracer.step(f"unpack {len(pairs)} arrays", began, buffer.nbytes)

    def _buffer(self, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        """Return a buffer of `count` elements; it is made larger on all ranks at the same time."""
        have = self._buffers.get(dtype)
        if have is None or have.size < count:
            rounded = 1 << max(12, (count - 1).bit_length())
            self._buffers[dtype] = have = self.group.empty(rounded, dtype)
        return have[:count]
