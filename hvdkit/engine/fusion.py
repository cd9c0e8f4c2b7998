"""Several all-reduces at once.

In shared memory the native module takes them one after the other, without coming back to Python in
between.  Over messages, each of which costs a constant time, small arrays are packed in one, and
large ones go by themselves: packing costs two passes over the data.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.adasum import adasum
from hvdkit.collectives.allreduce import allreduce
from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.collectives.reduction import Reduction, plan_reduction
from hvdkit.config import KIB
from hvdkit.dtypes import ReduceOp, exported
from hvdkit.engine.bucketing import ALIGNMENT

#: Up to this many bytes an array is packed with others.
LARGEST_PACKED = 1024 * KIB

Pair = tuple[NDArray[Any], NDArray[Any]]


class Packer:
    """All-reduces several arrays of one group; keeps the buffers that it packs them in."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._buffers: dict[np.dtype[Any], NDArray[Any]] = {}

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
        if self.group.arena is not None:
            for dtype in dict.fromkeys(source.dtype for source, _ in pairs):
                self._in_arena([pair for pair in pairs if pair[0].dtype == dtype], **how)
            return
        packed: dict[np.dtype[Any], list[Pair]] = {}
        for source, target in pairs:
            if source.nbytes <= LARGEST_PACKED:
                packed.setdefault(source.dtype, []).append((source, target))
            else:
                allreduce(self.group, source, target, name=None, **how)
        for dtype, several in packed.items():
            if len(several) == 1:
                allreduce(self.group, *several[0], name=None, **how)
            else:
                self._allreduce_packed(dtype, several, **how)

    def _in_arena(self, pairs: Sequence[Pair], **how: Any) -> None:
        """Reduce arrays of one dtype in shared memory."""
        group = self.group
        assert group.arena is not None
        sizes = tuple([source.size for source, _ in pairs])
        key = ("several", pairs[0][0].dtype, sizes, *how.values())
        found: tuple[Call, Reduction] | None = group.recall(key)
        if found is None:
            plan = plan_reduction(group, "allreduce", pairs[0][0].reshape(-1), name=None, **how)
            parts = (*plan.call.parts, ("sizes", str(sizes)))
            found = Call("allreduce", f"{len(pairs)} together", parts), plan
            group.keep(key, found)
        call, plan = found
        began = group.begin(call)
        sources = tuple([exported(source) for source, _ in pairs])
        targets = tuple([exported(target) for _, target in pairs])
        many = group.arena.native.allreduce_many
        while group.arena_call(many, sources, targets, *plan.native[:-1], call.signature):
            group.settle(call)
        group.record(call, "shm", sum(sizes) * pairs[0][0].itemsize, began)

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
