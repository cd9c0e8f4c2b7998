"""Which gradients travel together: a pure function of their sizes, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdkit.arrays import ALIGNMENT


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


def plan_buckets(
    gradients: Sequence[Gradient], bucket_bytes: int, order: Sequence[int] | None = None
) -> tuple[Bucket, ...]:
    """Share out gradients over buckets of at most `bucket_bytes`, in the `order` they come in.

    Without `order` it is the reverse order of creation: backward yields the gradients of the last
    layers first, so those fill the first bucket, which can travel while the rest is computed [Li
    et al., PyTorch Distributed, VLDB 2020, section 3.2].  A gradient larger than a bucket has one
    of its own.  Each dtype has buckets of its own; the buckets stand in the order in which their
    last gradient is expected.
    """
    order = list(reversed(range(len(gradients)))) if order is None else order
    closed: list[Bucket] = []
    open_members: dict[np.dtype[Any], list[int]] = {}

    def close(dtype: np.dtype[Any]) -> None:
        closed.append(_layout(gradients, open_members.pop(dtype), dtype))

    for index in order:
        dtype = gradients[index].dtype
        members = open_members.get(dtype, [])
        if members and _padded_bytes(gradients, [*members, index]) > bucket_bytes:
            close(dtype)
        open_members.setdefault(dtype, []).append(index)
    for dtype in list(open_members):
        close(dtype)
    return _in_order(closed, order)


def plan_groups(
    gradients: Sequence[Gradient], groups: Sequence[Sequence[int]], order: Sequence[int]
) -> tuple[Bucket, ...]:
    """Make a bucket of each of `groups`, one for each dtype in it, and of every other gradient.

    Gradients that are not in `order` are in no bucket.
    """
    wanted = set(order)
    grouped = {index for group in groups for index in group}
    alone = [[index] for index in order if index not in grouped]
    buckets = []
    for group in [*groups, *alone]:
        by_dtype: dict[np.dtype[Any], list[int]] = {}
        for index in group:
            if index in wanted:
                by_dtype.setdefault(gradients[index].dtype, []).append(index)
        buckets += [_layout(gradients, members, dtype) for dtype, members in by_dtype.items()]
    return _in_order(buckets, order)


def _in_order(buckets: Sequence[Bucket], order: Sequence[int]) -> tuple[Bucket, ...]:
    """Sort buckets by when their last gradient comes."""
    place = {index: position for position, index in enumerate(order)}
    return tuple(sorted(buckets, key=lambda bucket: max(place[i] for i in bucket.members)))


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
