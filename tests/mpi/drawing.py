"""Property tests in which every rank draws the same cases, and none shrinks alone."""

from __future__ import annotations

import functools
import traceback

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import hvdkit as hvd
from hvdkit.dtypes import DTYPES, bfloat16

OPS = {hvd.Sum, hvd.Average, hvd.Min, hvd.Max, hvd.Product}


def same_on_all_ranks(examples: int):
    """Decorate a property test so that all ranks draw the same examples in the same order.

    A failure ends the job at once: hypothesis would otherwise repeat the example on this rank
    alone, and wait for the others for ever.
    """

    def decorate(function):
        @functools.wraps(function)
        def ending_the_job(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except Exception:
                if hvd.size() == 1:
                    raise
                from conftest import fail

                fail(f"{function.__name__}{args}{kwargs}", traceback.format_exc())

        return settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(ending_the_job)

    return decorate


def defined(op, dtype: np.dtype) -> bool:
    """Return whether `op` is defined for `dtype`."""
    if dtype.kind == "b":
        return op is not hvd.Average
    return dtype.kind != "c" or op not in (hvd.Min, hvd.Max)


@st.composite
def op_and_dtype(draw):
    dtype = draw(st.sampled_from(DTYPES))
    op = draw(st.sampled_from(sorted(op for op in OPS if defined(op, dtype))))
    return op, dtype


def shapes(least_dimensions: int = 0):
    """Strategy of shapes: scalars, empty ones, fewer elements than ranks, odd ones, larger ones."""
    size = hvd.size()
    sides = st.sampled_from([0, 1, max(1, size - 1), size, size + 1, 7, 64])
    few = st.lists(sides, min_size=least_dimensions, max_size=3).map(tuple)
    return few | st.sampled_from([(4099,), (70_001,)])


def data_of(rank: int, seed: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return what `rank` contributes: small numbers, so that sums are exact where they can be."""
    rng = np.random.default_rng([seed, rank])
    if dtype.kind == "b":
        return np.array(rng.integers(0, 2, shape), dtype)
    low = 0 if dtype.kind == "u" else -4
    numbers = rng.integers(low, 5, shape)
    if dtype.kind == "c":
        numbers = numbers + 1j * rng.integers(-4, 5, shape)
    return np.array(numbers, dtype)


def strided(array: np.ndarray) -> np.ndarray:
    """Return an equal array that is not contiguous."""
    if array.ndim == 0:
        return array
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1] + 1), array.dtype)
    view = wide[..., 1::2]
    view[...] = array
    return view


def expected(op, contributions: list[np.ndarray]) -> np.ndarray:
    """Return numpy's answer, of the contributions' dtype."""
    dtype = contributions[0].dtype
    stack = np.stack(contributions)
    if dtype.kind == "b":
        return np.asarray(stack.any(0) if op in (hvd.Sum, hvd.Max) else stack.all(0))
    if op in (hvd.Min, hvd.Max):
        return np.asarray(stack.min(0) if op is hvd.Min else stack.max(0))
    wide = stack.astype(np.float32) if dtype in (np.float16, bfloat16) else stack
    reduce = np.multiply.reduce if op is hvd.Product else np.add.reduce
    result = np.asarray(reduce(wide, 0, dtype=wide.dtype))
    if op is hvd.Average and dtype.kind in "iu":
        result = np.trunc(result / len(contributions))
    elif op is hvd.Average and dtype.kind == "c":  # a part at a time, as a real divisor should
        size = wide.real.dtype.type(len(contributions))
        result = result.real / size + 1j * (result.imag / size)
    elif op is hvd.Average:
        result = result / wide.dtype.type(len(contributions))
    return np.asarray(result).astype(dtype)
