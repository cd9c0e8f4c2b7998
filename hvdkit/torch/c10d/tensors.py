"""Tensors of torch.distributed as arrays over their memory.

Unlike `Tensor.numpy`, this leaves the storage resizable: FSDP and some of DDP's hooks resize what
they have communicated.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvdkit.errors import UnsupportedError
from hvdkit.torch.convert import numpy_dtype


class Target:
    """A tensor that is written: directly where it is contiguous, else by `store`.

    Args:
        tensor: on the CPU, of any strides.
        moved: its elements are only moved, so that any dtype will do.

    Raises:
        UnsupportedError: not such a tensor, or of a dtype that is not reduced.
    """

    __slots__ = ("_strided", "array")

    def __init__(self, tensor: torch.Tensor, *, moved: bool = False) -> None:
        _check(tensor)
        if tensor.is_conj() or tensor.is_neg():
            raise UnsupportedError(
                "the tensor is a lazy conjugate or negation, which cannot be written: "
                "call .resolve_conj().resolve_neg() first"
            )
        self._strided = _memory(tensor, moved)
        self.array: NDArray[Any] = np.ascontiguousarray(self._strided).reshape(self._strided.shape)
        """The elements, C-contiguous, in the tensor's shape."""

    @property
    def flat(self) -> NDArray[Any]:
        """The elements in one dimension."""
        return self.array.reshape(-1)

    def store(self) -> None:
        """Make sure that the tensor has what is in `array`."""
        if not self._strided.flags.c_contiguous:
            self._strided[...] = self.array


def source(tensor: torch.Tensor, *, moved: bool = False) -> NDArray[Any]:
    """Return a tensor's elements, C-contiguous, in its shape; a copy only if it must be.

    Raises:
        UnsupportedError: as `Target`.
    """
    _check(tensor)
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return _memory(plain, moved)


def _check(tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise UnsupportedError(f"expected a torch.Tensor, not {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise UnsupportedError(f"{tensor.layout} tensors are not supported; call .to_dense()")
    if tensor.device.type != "cpu":
        raise UnsupportedError(
            f"the tensor is on {tensor.device}, and hvdkit's process groups take CPU tensors: "
            "call .cpu(), or give new_group() another backend"
        )


class _Memory:
    """A tensor's memory as numpy understands it; keeps the tensor alive."""

    __slots__ = ("__array_interface__", "_tensor")

    def __init__(self, tensor: torch.Tensor, typestr: str, itemsize: int) -> None:
        self._tensor = tensor
        strides = None
        if not tensor.is_contiguous():
            strides = tuple(step * itemsize for step in tensor.stride())
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "typestr": typestr,
            "strides": strides,
        }


def _memory(tensor: torch.Tensor, moved: bool) -> NDArray[Any]:
    """Return the array over a tensor's memory."""
    typestr, dtype = _dtypes(tensor.dtype, moved)
    array = np.asarray(_Memory(tensor, typestr, dtype.itemsize))
    return array if array.dtype == dtype else array.view(dtype)


@lru_cache
def _dtypes(dtype: torch.dtype, moved: bool) -> tuple[str, np.dtype[Any]]:
    """Return the dtype to read elements of `dtype` as, by its code, and the one to see them as."""
    try:
        same = numpy_dtype(dtype)
    except UnsupportedError:
        if not moved or dtype.itemsize != 1:
            raise
        same = np.dtype(np.uint8)  # such as float8
    return (same.str if same.kind != "V" else "<u2"), same
