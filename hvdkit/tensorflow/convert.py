"""Tensors as numpy arrays over the same memory, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hvdkit.arrays import ALIGNMENT, aligned_empty
from hvdkit.dtypes import bfloat16
from hvdkit.errors import UnsupportedError


def as_tensor(x: Any) -> tf.Tensor:
    """Return a tensor, a variable of TensorFlow or Keras, an array or a number as a tensor.

    A variable is read without a copy in eager mode.

    Raises:
        UnsupportedError: `x` cannot be a dense tensor.
    """
    if isinstance(x, tf.IndexedSlices | tf.SparseTensor | tf.RaggedTensor):
        raise UnsupportedError(
            f"{type(x).__name__} is not supported here; call tf.convert_to_tensor() or "
            "tf.sparse.to_dense() first"
        )
    try:
        tensor = tf.convert_to_tensor(variable_of(x))
    except (TypeError, ValueError) as exc:
        raise UnsupportedError(f"{type(x).__name__} cannot be read as a tensor: {exc}") from exc
    if tensor.dtype in (tf.string, tf.resource, tf.variant):
        raise UnsupportedError(f"{tensor.dtype.name} tensors are not supported")
    return tensor


def variable_of(x: Any) -> Any:
    """Return the tf.Variable in a variable of Keras; anything else as it is."""
    inner = getattr(x, "value", None)
    return inner if isinstance(inner, tf.Variable) else x


def array_of(tensor: tf.Tensor) -> NDArray[Any]:
    """Return the array that shares an eager tensor's memory; of one on a GPU, a copy.

    It must not be written to, for TensorFlow takes a tensor's value as unchangeable.

    Raises:
        UnsupportedError: of a dtype that numpy does not know.
    """
    try:
        # A scalar of bfloat16 shows numpy no array.
        array: NDArray[Any] = np.asarray(tensor if tensor.shape.rank else tensor.numpy())
    except (TypeError, ValueError, NotImplementedError) as exc:
        raise UnsupportedError(f"dtype {tensor.dtype.name} is not supported") from exc
    if array.dtype.names or array.dtype == object:
        raise UnsupportedError(f"dtype {tensor.dtype.name} is not supported")
    return array


def tensor_of(array: NDArray[Any]) -> tf.Tensor:
    """Return a tensor of `array`, which nobody may write to any more.

    Its memory is shared if it is aligned, as that of `aligned_empty` is, and copied if not.
    """
    if array.ctypes.data % ALIGNMENT or not array.flags.c_contiguous or not array.size:
        return tf.convert_to_tensor(array)
    if array.dtype == bfloat16:  # of which numpy cannot tell others
        return tf.bitcast(_shared(array.view(np.uint16)), tf.bfloat16)
    return _shared(array)


def _shared(array: NDArray[Any]) -> tf.Tensor:
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def copied(array: NDArray[Any]) -> NDArray[Any]:
    """Return a copy whose memory a tensor can share."""
    copy = aligned_empty(array.shape, array.dtype)
    np.copyto(copy, array)
    return copy
