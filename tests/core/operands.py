"""What all-reduces are compared on, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.dtypes import ReduceOp

FACTORS = [(1.0, 1.0), (0.3, 1.0), (1.0, 2.7), (3, 0.1)]


def reductions(dtype: np.dtype[Any]) -> Iterator[dict[str, Any]]:
    """Yield the operations that `dtype` has, with several factors, as an all-reduce takes them."""
    for op in ReduceOp:
        if op is ReduceOp.ADASUM or (dtype.kind == "b" and op is ReduceOp.AVERAGE):
            continue
        if dtype.kind == "c" and op in (ReduceOp.MIN, ReduceOp.MAX):
            continue
        for prescale, postscale in FACTORS[:1] if dtype.kind == "b" else FACTORS:
            yield {"op": op, "prescale": prescale, "postscale": postscale}


def operand(dtype: np.dtype[Any], rank: int) -> NDArray[Any]:
    """Return a rank's elements."""
    return (np.random.default_rng(rank).standard_normal(37) * 50).astype(dtype)
