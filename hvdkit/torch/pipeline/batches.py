"""Batches in parts: tensors, or tuples, lists and dicts of them, along their first dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvdkit.errors import ArgumentError


def rows_of(batch: Any) -> int:
    """Return how many rows a batch has.

    Raises:
        ArgumentError: its tensors disagree, or it has none.
    """
    found: set[int] = set()
    _map(batch, lambda tensor: found.add(tensor.shape[0] if tensor.ndim else 0))
    if len(found) != 1 or 0 in found:
        raise ArgumentError(
            "a batch is a tensor, or a tuple, list or dict of tensors, with one number of rows, 1 "
            f"or more; this one has tensors of {sorted(found)} rows"
        )
    return found.pop()


def split(batch: Any, count: int) -> list[Any]:
    """Return a batch in `count` parts; the first have one row more where they do not divide."""
    return [_map(batch, lambda tensor, i=i: tensor.tensor_split(count)[i]) for i in range(count)]


def joined(parts: Sequence[Any]) -> Any:
    """Return the batch of which these are the parts."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat([part if part.ndim else part[None] for part in parts])
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    return type(first)(joined(several) for several in zip(*parts, strict=True))


def _map(batch: Any, function: Callable[..., Any]) -> Any:
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: _map(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_map(value, function) for value in batch)
    raise ArgumentError(f"a batch is made of tensors, not of {type(batch).__name__}")
