"""Memory of a GPU, as a CUDA-aware MPI library takes it in place of an array."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


@dataclass(frozen=True)
class DeviceArray:
    """Contiguous elements on a device, of which the core knows no more than where they are.

    It has as much of an array's ways as a collective needs that moves it; mpi4py finds the memory
    by ``__cuda_array_interface__``.

    Args:
        address: of the first element.
        shape: of the array.
        dtype: of the elements.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    def reshape(self, length: int) -> DeviceArray:
        """Return all elements in one dimension; `length` is -1 or their number."""
        assert length in (-1, self.size)
        return DeviceArray(self.address, (self.size,), self.dtype)

    def view(self, dtype: DTypeLike) -> DeviceArray:
        """Return the same memory, in one dimension, as elements of another dtype."""
        other = np.dtype(dtype)
        return DeviceArray(self.address, (self.nbytes // other.itemsize,), other)

    def __getitem__(self, part: slice) -> DeviceArray:
        """Return a part of an array of one dimension."""
        start, stop, _ = part.indices(self.size)
        return DeviceArray(self.address + start * self.itemsize, (stop - start,), self.dtype)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if self.size else 0, False),
            "version": 3,
        }


#: What MPI can be given.
Memory = NDArray[Any] | DeviceArray
