"""The kernels in numpy, for where the compiled module is missing: same bits, less speed."""

from __future__ import annotations

import numpy as np

from hvdkit.dtypes import ReduceOp, bfloat16
from hvdkit.native.interface import Array, Kernels

#: Elements worked on at a time, so that the temporaries stay in the cache.
BLOCK = 65536

_HALVES = (np.dtype(np.float16), bfloat16)


def _widen(array: Array) -> Array:
    """Return a 16-bit float array as float32."""
    if array.dtype == bfloat16:  # the upper half of a float32; twice as fast as ml_dtypes' astype
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _select(left: Array, right: Array, op: ReduceOp) -> Array:
    """Return the smaller or larger of floats; a NaN wins, the first one if both are.

    Spelled out because np.minimum's choice between +0 and -0 depends on the machine.
    """
    if left.dtype == np.float16:  # of equal float16 the first is taken, of other floats the second
        wins = left <= right if op is ReduceOp.MIN else left >= right
    else:
        wins = left < right if op is ReduceOp.MIN else left > right
    is_nan = left != left
    return np.where(wins | is_nan, left, right)


def _multiply_complex(left: Array, right: Array) -> Array:
    """Return the product by the schoolbook formula; numpy's own fuses operations on some CPUs."""
    result = np.empty_like(left)
    result.real = left.real * right.real - left.imag * right.imag
    result.imag = left.real * right.imag + left.imag * right.real
    return result


def _combine(left: Array, right: Array, op: ReduceOp) -> Array:
    """Return ``op(left, right)`` for two arrays of one dtype."""
    dtype = left.dtype
    if dtype.kind == "b":
        is_or = op in (ReduceOp.SUM, ReduceOp.AVERAGE, ReduceOp.MAX)
        return np.logical_or(left, right) if is_or else np.logical_and(left, right)
    if op in (ReduceOp.MIN, ReduceOp.MAX):
        if dtype.kind == "c":
            raise TypeError("Min and Max are not defined for complex numbers")
        if dtype.kind in "iu":
            return np.minimum(left, right) if op is ReduceOp.MIN else np.maximum(left, right)
        return _select(left, right, op)
    if dtype in _HALVES:
        wide = _widen(left), _widen(right)
        return (wide[0] * wide[1] if op is ReduceOp.PRODUCT else wide[0] + wide[1]).astype(dtype)
    if op is not ReduceOp.PRODUCT:
        return left + right
    return _multiply_complex(left, right) if dtype.kind == "c" else left * right


def _divide_integers(array: Array, divisor: int) -> Array:
    """Return the quotients, truncated toward zero."""
    if divisor > np.iinfo(array.dtype).max:  # only the most negative number can be that large
        low = -divisor == np.iinfo(array.dtype).min
        return np.where(array == np.iinfo(array.dtype).min, -1 if low else 0, 0)
    quotient: Array = array // array.dtype.type(divisor)  # toward minus infinity
    if array.dtype.kind == "i":
        quotient += (array < 0) & (quotient * array.dtype.type(divisor) != array)
    return quotient


def _multiply_integers(array: Array, factor: float) -> Array:
    """Return the products as float64, truncated toward zero, to the nearest that fits."""
    limits = np.iinfo(array.dtype)
    product = np.nan_to_num(
        array.astype(np.float64) * factor, nan=0.0, posinf=np.inf, neginf=-np.inf
    )
    high = product >= float(limits.max) + (0.0 if limits.bits == 64 else 1.0)
    low = product <= float(limits.min)
    result = np.where(high | low, 0.0, product).astype(array.dtype)
    result[high] = limits.max
    result[low] = limits.min
    return result


def _scale(array: Array, divisor: int, factor: float) -> Array:
    """Return ``array / divisor * factor`` in the array's own precision."""
    result = array
    if array.dtype.kind in "iu":
        if divisor != 1:
            result = _divide_integers(result, divisor).astype(array.dtype)
        return result if factor == 1.0 else _multiply_integers(result, factor)
    if divisor != 1:
        result = result / array.dtype.type(divisor)
    if factor != 1.0:
        result = result * array.dtype.type(factor)
    return result


class NumpyKernels(Kernels):
    """Blocks of an array through numpy's own loops."""

    @property
    def name(self) -> str:
        return "numpy"

    def reduce(self, out: Array, incoming: Array, op: ReduceOp, *, incoming_first: bool) -> None:
        with np.errstate(all="ignore"):
            for start in range(0, out.size, BLOCK):
                block = slice(start, start + BLOCK)
                left, right = out[block], incoming[block]
                if incoming_first:
                    left, right = right, left
                out[block] = _combine(left, right, op)

    def convert(self, out: Array, source: Array) -> None:
        with np.errstate(all="ignore"):
            np.copyto(out, source, casting="unsafe")

    def scale(self, array: Array, *, divisor: int = 1, factor: float = 1.0) -> None:
        if divisor < 1:
            raise ValueError(f"divisor must be 1 or more, not {divisor}")
        if divisor == 1 and factor == 1.0:
            return
        if array.dtype.kind == "b":
            raise TypeError("bool can be neither divided nor scaled")
        if array.dtype.kind == "c":  # by components, as infinities stay apart from the other part
            array = array.view(array.real.dtype)
        with np.errstate(all="ignore"):
            for start in range(0, array.size, BLOCK):
                block = slice(start, start + BLOCK)
                if array.dtype in _HALVES:
                    array[block] = _scale(_widen(array[block]), divisor, factor).astype(array.dtype)
                else:
                    array[block] = _scale(array[block], divisor, factor)
