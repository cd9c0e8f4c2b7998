"""All-reduce of tensors and of tf.IndexedSlices; see `hvdkit.tensorflow.collectives`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit.api import communicator
from hvdkit.dtypes import Average, ReduceOp, Sum, as_op, as_reduction
from hvdkit.errors import UnsupportedError
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.tensorflow.collectives import Differentiated, differentiably, numbered, rows_of, spec_of
from hvdkit.tensorflow.compression import Compression
from hvdkit.tensorflow.convert import array_of, as_tensor, copied, tensor_of
from hvdkit.tensorflow.graph import call, unconverted


@unconverted
def allreduce(
    tensor: Any,
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
) -> Any:
    """Return the combination of all ranks' `tensor` as a new tensor.  Collective, blocking.

    Args:
        tensor: a tensor or variable, of equal shape and dtype on all ranks; or tf.IndexedSlices,
            of which all ranks' are gathered.
        average: deprecated, Horovod's older way to say `op`.
        compression: `Compression.none`, ``fp16`` or ``bf16``: as what the tensor travels.
        op: `Average` (the default), `Sum`, `Min`, `Max`, `Product` or `Adasum`; for IndexedSlices
            one of the first two.
        prescale_factor: multiplies each contribution first.
        postscale_factor: multiplies the result last.
        name: named in errors; ranks must give the same one.
        process_set: whose ranks take part.
        device_dense, device_sparse, ignore_name_scope: without effect.

    Raises:
        MismatchError: on every rank, showing what each had, if ranks disagree.
        ArgumentError, UnsupportedError: what cannot be; the other ranks get a MismatchError.
        PeerError: another rank died.
    """
    return grouped_allreduce(
        [tensor],
        average,
        device_dense,
        device_sparse,
        compression,
        op,
        prescale_factor,
        postscale_factor,
        process_set,
        ignore_name_scope,
        name,
    )[0]


@unconverted
def grouped_allreduce(
    tensors: Sequence[Any],
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
    name: str | None = None,
) -> list[Any]:
    """Return the combinations of all ranks' `tensors`, in order.  Collective, blocking.

    Arguments and errors are `allreduce`'s.
    """
    del device_dense, device_sparse, ignore_name_scope
    how = (as_reduction(op, average), prescale_factor, postscale_factor)
    names = [name if len(tensors) == 1 else numbered(name, i) for i in range(len(tensors))]
    results: list[Any] = list(tensors)
    dense = [i for i, x in enumerate(tensors) if not isinstance(x, tf.IndexedSlices)]
    for i in sorted(set(range(len(tensors))) - set(dense)):
        results[i] = allreduce_slices(tensors[i], how, names[i], process_set)
    packed, forms = [], []
    for i in dense:
        travelling, form = compression.compress(as_tensor(tensors[i]))
        packed.append(travelling)
        forms.append(form)
    if packed:
        reduced = _allreduce(packed, how, [names[i] for i in dense], process_set)
        for i, tensor, form in zip(dense, reduced, forms, strict=True):
            results[i] = compression.decompress(tensor, form)
    return results


def _allreduce(
    tensors: Sequence[tf.Tensor],
    how: tuple[Any, float, float],
    names: Sequence[str | None],
    process_set: ProcessSet,
) -> list[tf.Tensor]:
    """All-reduce dense tensors."""
    op, prescale, postscale = how

    def reduce(*values: tf.Tensor) -> list[tf.Tensor]:
        among = communicator(process_set)
        return [
            tensor_of(among.allreduce(target, op, name, prescale, postscale, in_place=True))
            for target, name in zip(map(copied, map(array_of, values)), names, strict=True)
        ]

    def forward(*inputs: tf.Tensor) -> Differentiated:
        def backward(*gradients: tf.Tensor) -> list[tf.Tensor]:
            theirs = [None if name is None else f"{name}.gradient" for name in names]
            return _allreduce(gradients, how, theirs, process_set)

        return call(reduce, inputs, [spec_of(tensor) for tensor in inputs]), backward

    return differentiably(forward, *tensors)


def allreduce_slices(
    slices: tf.IndexedSlices,
    how: tuple[Any, float, float],
    name: str | None,
    process_set: ProcessSet,
) -> tf.IndexedSlices:
    """Return all ranks' slices together, which stand for the sum; divided for an average.

    Raises:
        UnsupportedError: an operation that slices do not have.
    """
    op = as_op(how[0])
    if op not in (Average, Sum):
        raise UnsupportedError(
            f"{op} is not defined for tf.IndexedSlices; make them dense: sparse_as_dense=True, or "
            "tf.convert_to_tensor()"
        )

    def gather(*parts: tf.Tensor) -> list[tf.Tensor]:
        among = communicator(process_set)
        return [tensor_of(among.allgather(array_of(part), name=name)) for part in parts]

    parts = as_tensor(slices.values), as_tensor(slices.indices)
    values, indices = call(gather, parts, [rows_of(part) for part in parts])
    factor = how[1] * how[2]
    if op is ReduceOp.AVERAGE:
        factor /= communicator(process_set).size
    if factor != 1.0:
        whole = not (values.dtype.is_floating or values.dtype.is_complex)
        exact = tf.float64 if whole else values.dtype
        values = tf.cast(tf.cast(values, exact) * tf.constant(factor, exact), values.dtype)
    return tf.IndexedSlices(values, indices, slices.dense_shape)
