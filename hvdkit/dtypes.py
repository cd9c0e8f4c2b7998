"""Element types and reduction operations: what is defined for what, in one table."""

from __future__ import annotations

import enum
import warnings
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from hvdkit.errors import ArgumentError, UnsupportedError

bfloat16 = np.dtype(ml_dtypes.bfloat16)

#: Every dtype that hvdkit reduces.  The position is the code that the native module uses.
DTYPES: tuple[np.dtype[Any], ...] = (
    np.dtype(np.bool_),
    np.dtype(np.uint8),
    np.dtype(np.int8),
    np.dtype(np.uint16),
    np.dtype(np.int16),
    np.dtype(np.uint32),
    np.dtype(np.int32),
    np.dtype(np.uint64),
    np.dtype(np.int64),
    np.dtype(np.float16),
    bfloat16,
    np.dtype(np.float32),
    np.dtype(np.float64),
    np.dtype(np.complex64),
    np.dtype(np.complex128),
)

#: The floating-point ones.
FLOATS = (np.dtype(np.float16), bfloat16, np.dtype(np.float32), np.dtype(np.float64))

DTYPE_CODES: dict[np.dtype[Any], int] = {dtype: code for code, dtype in enumerate(DTYPES)}


class ReduceOp(enum.IntEnum):
    """How contributions are combined.  The values are Horovod's."""

    AVERAGE = 0
    SUM = 1
    ADASUM = 2
    MIN = 3
    MAX = 4
    PRODUCT = 5

    def __str__(self) -> str:
        return self.name.capitalize()


Average = ReduceOp.AVERAGE
Sum = ReduceOp.SUM
Adasum = ReduceOp.ADASUM
Min = ReduceOp.MIN
Max = ReduceOp.MAX
Product = ReduceOp.PRODUCT


def as_op(op: Any) -> ReduceOp:
    """Return `op` as a `ReduceOp`; accepts the member, its number or its name.

    Raises:
        ArgumentError: unknown operation; the message lists the known ones.
    """
    if isinstance(op, ReduceOp):
        return op
    try:
        return ReduceOp[op.upper()] if isinstance(op, str) else ReduceOp(op)
    except (KeyError, ValueError):
        known = ", ".join(str(member) for member in ReduceOp)
        raise ArgumentError(f"unknown operation {op!r}; known are {known}") from None


def as_reduction(op: Any, average: bool | None) -> Any:
    """Return the operation that Horovod's older and newer arguments ask for.

    Raises:
        ArgumentError: both are given.
    """
    if average is None:
        return Average if op is None else op
    if op is not None:
        raise ArgumentError("op= supersedes average=: give one of them")
    warnings.warn("average= is deprecated; use op=", DeprecationWarning, stacklevel=3)
    return Average if average else Sum


def check_supported(dtype: np.dtype[Any], op: ReduceOp | None = None) -> None:
    """Refuse a dtype that hvdkit does not carry, or for which `op` is not defined.

    Booleans have Sum and Max (logical or), Product and Min (logical and), but no Average; complex
    numbers have no order, hence no Min or Max.

    Raises:
        UnsupportedError: with the dtypes or operations that are.
    """
    if dtype not in DTYPE_CODES:
        known = ", ".join(known_dtype.name for known_dtype in DTYPES)
        raise UnsupportedError(f"dtype {dtype} is not supported; supported are {known}")
    if op is ReduceOp.ADASUM and dtype not in FLOATS:
        raise UnsupportedError(f"Adasum is defined for floating-point numbers, not for {dtype}")
    if op is ReduceOp.AVERAGE and dtype.kind == "b":
        raise UnsupportedError("Average is not defined for bool; use Min, Max, Sum or Product")
    if op in (ReduceOp.MIN, ReduceOp.MAX) and dtype.kind == "c":
        raise UnsupportedError(f"{op} is not defined for {dtype}: complex numbers have no order")


def exported(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view with the buffer protocol, which ml_dtypes' arrays do not have."""
    return array.view(np.uint16) if array.dtype.kind == "V" else array
