"""Tensors as numpy arrays over the same memory, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvdkit.dtypes import bfloat16
from hvdkit.errors import UnsupportedError


def check_tensor(tensor: Any, *, in_place: bool = False) -> None:
    """Refuse what is not a dense tensor on the CPU or a CUDA device.

    Raises:
        UnsupportedError: with what to do.
    """
    if not isinstance(tensor, torch.Tensor):
        raise UnsupportedError(f"expected a torch.Tensor, not {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise UnsupportedError(f"{tensor.layout} tensors are not supported; call .to_dense()")
    if tensor.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"the tensor is on {tensor.device}; hvdkit handles CPU and CUDA tensors: call .cpu()"
        )
    if in_place and (tensor.is_conj() or tensor.is_neg()):
        raise UnsupportedError(
            "the tensor is a lazy conjugate or negation, which cannot be changed in place: "
            "call .resolve_conj().resolve_neg() first"
        )


def array_of(tensor: Any, *, in_place: bool = False) -> NDArray[Any]:
    """Return the array that shares the memory of a tensor on the CPU.

    A tensor whose conjugation or negation torch has put off is read as what it stands for, by a
    copy; that cannot be had `in_place`.

    Raises:
        UnsupportedError: not a dense tensor in this machine's memory, or of a dtype that numpy
            does not know.
    """
    check_tensor(tensor, in_place=in_place)
    plain: torch.Tensor = tensor.detach() if tensor.requires_grad else tensor
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().view(bfloat16)
    try:
        return plain.numpy()
    except TypeError as exc:
        raise UnsupportedError(f"dtype {tensor.dtype} is not supported") from exc


def tensor_of(array: NDArray[Any]) -> torch.Tensor:
    """Return the tensor that shares `array`'s memory."""
    if array.dtype == bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the numpy dtype of the same elements."""
    return array_of(torch.empty(0, dtype=dtype)).dtype
