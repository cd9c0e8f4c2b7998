"""Which gradients travel together: a pure function of their sizes, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Gradients begin at multiples of this many bytes in their bucket, for vector loads.
ALIGNMENT = 64


@dataclass(frozen=True)
class Gradient:
    """What is known of a gradient before it exists."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def __str__(self) -> str:
        return f"{self.dtype.name} {self.shape}"


@dataclass(frozen=True)
class Bucket:
    """Gradients of one dtype in one buffer: which, and at what element offsets."""

    dtype: np.dtype[Any]
    members: tuple[int, ...]
    offsets: tuple[int, ...]
    count: int
    """Elements of the buffer, gaps for alignment included."""


def plan_buckets(gradients: Sequence[Gradient], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Share out gradients over buckets of at most `bucket_bytes`, in reverse order of creation.

    Backward yields the gradients of the last layers first, so those fill the first bucket, which
    can travel while the rest is computed [Li et al., PyTorch Distributed, VLDB 2020, section 3.2].
    A gradient larger than a bucket has one of its own.  Each dtype has buckets of its own; the
    buckets stand in the order in which their last gradient is expected.
    """
    closed: list[Bucket] = []
    open_members: dict[np.dtype[Any], list[int]] = {}

    def close(dtype: np.dtype[Any]) -> None:
        closed.append(_layout(gradients, open_members.pop(dtype), dtype))

    for index in reversed(range(len(gradients))):
        dtype = gradients[index].dtype
        members = open_members.get(dtype, [])
        if members and _padded_bytes(gradients, [*members, index]) > bucket_bytes:
            close(dtype)
        open_members.setdefault(dtype, []).append(index)
    for dtype in list(open_members):
        close(dtype)
    return tuple(sorted(closed, key=lambda bucket: -bucket.members[-1]))


def _layout(gradients: Sequence[Gradient], members: list[int], dtype: np.dtype[Any]) -> Bucket:
    offsets, end = [], 0
    for index in members:
        offsets.append(end)
        end += _padded_count(gradients[index])
    return Bucket(dtype, tuple(members), tuple(offsets), end)


def _padded_bytes(gradients: Sequence[Gradient], members: Sequence[int]) -> int:
    return sum(_padded_count(gradients[i]) * gradients[i].dtype.itemsize for i in members)


def _padded_count(gradient: Gradient) -> int:
    step = ALIGNMENT // gradient.dtype.itemsize
    return -(-gradient.count // step) * step
