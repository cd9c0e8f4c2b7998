"""What users hand over, as numpy arrays over the same memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hvdkit.errors import UnsupportedError

#: Where vector loads are at their best, and where TensorFlow takes an array's memory for its own.
ALIGNMENT = 64


def as_array(x: Any) -> NDArray[Any]:
    """Return `x` as a numpy array, without a copy where its memory can be read in place.

    Raises:
        UnsupportedError: `x` is not an array of numbers in this machine's memory.
    """
    if isinstance(x, np.ndarray):
        return x
    if hasattr(x, "__cuda_array_interface__"):
        raise UnsupportedError("the array is in a GPU's memory; copy it to the host first")
    has_numpy_face = hasattr(x, "__array__") or hasattr(x, "__array_interface__")
    try:
        if hasattr(x, "__dlpack__") and not has_numpy_face:
            return np.from_dlpack(x)
        array = np.asarray(x)
    except (TypeError, ValueError, BufferError, RuntimeError) as exc:
        raise UnsupportedError(f"{type(x).__name__} cannot be read as an array: {exc}") from exc
    if array.dtype == object:
        raise UnsupportedError(f"{type(x).__name__} is not an array of numbers")
    return array


def contiguous(x: Any) -> NDArray[Any]:
    """Return `x` as an array that is contiguous in C order; a copy only if it must be.

    Raises:
        UnsupportedError: as `as_array`.
    """
    if type(x) is np.ndarray and x.flags.c_contiguous:
        return x
    return np.asarray(as_array(x), order="C")


def writable(x: Any) -> NDArray[Any]:
    """Return `x` itself, as an array that can be changed in place.

    Raises:
        UnsupportedError: it is not a writable numpy array.
    """
    if not isinstance(x, np.ndarray) or not x.flags.writeable:
        kind = "read-only array" if isinstance(x, np.ndarray) else type(x).__name__
        raise UnsupportedError(f"an in-place collective needs a writable numpy array, not a {kind}")
    return x


def aligned_empty(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """Return new memory that begins at a multiple of `ALIGNMENT` bytes."""
    kind = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + nbytes].view(kind).reshape(shape)


class Results:
    """Makes arrays for results; keeps the memory of one large one that is gone, for the next.

    Memory of this size is new to the process each time, and the kernel fills it with zeros page by
    page: for an all-gather that takes as long as the transfer.
    """

    LARGE = 32 << 20  #: from here on the C library asks the kernel each time [glibc, mallopt(3)]

    def __init__(self) -> None:
        self._spare: NDArray[np.uint8] | None = None

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array of whatever values."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < self.LARGE:
            return np.empty(shape, dtype)
        memory, self._spare = self._spare, None
        if memory is None or memory.nbytes != nbytes:
            memory = np.empty(nbytes, np.uint8)
        # The base of all views of it; were its own an array, that would be theirs instead.
        owner = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(owner, self._keep, memory).atexit = False
        return owner.view(dtype).reshape(shape)

    def _keep(self, memory: NDArray[np.uint8]) -> None:
        self._spare = memory
