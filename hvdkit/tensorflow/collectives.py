"""What the collectives on tensors share, and those without data.

Names, arguments and defaults are Horovod's.  They are matched between ranks by the order in which
the program makes them, eager or inside tf.function, and are blocking.  ``device_dense`` and
``device_sparse``, which say where Horovod's kernels run, and ``ignore_name_scope`` are without
effect.  Inside tf.function TensorFlow makes an error of its own of ours, with ours as its message.

Gradients are Horovod's, made for variables whose gradients are averaged over ranks afterwards:

    forward            backward, of all ranks' gradients of the outputs
    allreduce          their all-reduce, with the same op and factors
    allgather          this rank's rows of their average
    broadcast          their average on the root, zeros elsewhere
    alltoall           the rows go back to where they came from
    reducescatter      their all-gather, times the factors; times the number of ranks for a Sum

Only Average and Sum are derivatives; Min, Max, Product and Adasum of gradients are what Horovod
makes of these.  Backward is differentiable itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.api import communicator, context
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.tensorflow.graph import call, unconverted

#: Of tensors, and the function from their gradients to those of its arguments.
Differentiated = tuple[list[tf.Tensor], Callable[..., Sequence[Any]]]


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return when every rank of the set has called.  Collective, blocking.

    Raises:
        MismatchError, PeerError: as `allreduce`.
    """
    communicator(process_set).barrier()


@unconverted
def join() -> tf.Tensor:
    """Take part in the others' calls, having no more data, until every rank joins.  Collective.

    Until then the others can all-reduce, to which this rank adds nothing (averages are still over
    all ranks), and wait at barriers; for other collectives they get an error.

    Returns:
        The rank that joined last, int32.
    """
    return number(lambda: context().join())


def number(function: Callable[[], int | None]) -> tf.Tensor:
    """Return what `function` returns when the graph is run, as int32."""

    def now() -> list[tf.Tensor]:
        return [tf.constant(function(), tf.int32)]

    return call(now, [], [tf.TensorSpec((), tf.int32)])[0]


def differentiably(forward: Callable[..., Differentiated], *tensors: tf.Tensor) -> list[tf.Tensor]:
    """Return ``forward(*tensors)``'s tensors, with its gradients for those that have any."""
    if not any(tensor.dtype.is_floating or tensor.dtype.is_complex for tensor in tensors):
        return forward(*tensors)[0]
    return list(tf.custom_gradient(forward)(*tensors))


def spec_of(tensor: tf.Tensor) -> tf.TensorSpec:
    """Return what is known of a tensor."""
    return tf.TensorSpec(tensor.shape, tensor.dtype)


def rows_of(tensor: tf.Tensor) -> tf.TensorSpec:
    """Return what is known of a tensor of the same kind of rows as `tensor`."""
    if tensor.shape.rank is None:
        return tf.TensorSpec(None, tensor.dtype)
    return tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype)


def numbered(name: str | None, place: int) -> str | None:
    return None if name is None else f"{name}.{place}"


def numpy_dtype(dtype: tf.DType) -> np.dtype[Any]:
    """Return the numpy dtype of the same elements."""
    found: np.dtype[Any] = np.dtype(dtype.as_numpy_dtype)
    return found
