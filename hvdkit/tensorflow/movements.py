"""All-gather, broadcast, all-to-all and reduce-scatter; see `hvdkit.tensorflow.collectives`.

They are each other's gradients.  The tensors of a group go in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit import collectives
from hvdkit.api import communicator, rank
from hvdkit.arrays import aligned_empty
from hvdkit.dtypes import Average, ReduceOp, as_op
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.tensorflow.all_reduce import grouped_allreduce
from hvdkit.tensorflow.collectives import Differentiated, differentiably, numbered, rows_of, spec_of
from hvdkit.tensorflow.compression import Compression
from hvdkit.tensorflow.convert import array_of, as_tensor, tensor_of
from hvdkit.tensorflow.graph import call, unconverted

# All-gather


@unconverted
def allgather(
    tensor: Any,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> tf.Tensor:
    """Return all ranks' `tensor` joined along the first dimension.  Collective, blocking.

    Args:
        tensor: its first dimension may differ between ranks.  A scalar counts as one row.
        name, process_set: as in `allreduce`.
        ignore_name_scope: without effect.

    Raises:
        MismatchError, ArgumentError, UnsupportedError, PeerError: as `allreduce`.
    """
    del ignore_name_scope
    return _allgather([as_tensor(tensor)], name, process_set)[0]


@unconverted
def grouped_allgather(
    tensors: Sequence[Any],
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> list[tf.Tensor]:
    """Return all ranks' `tensors`, each joined with its like.  Collective, blocking."""
    del ignore_name_scope
    return _allgather([as_tensor(tensor) for tensor in tensors], name, process_set)


def _allgather(
    tensors: Sequence[tf.Tensor], name: str | None, process_set: ProcessSet
) -> list[tf.Tensor]:
    if not tensors:
        return []
    names = _names(name, len(tensors))

    def gather(*values: tf.Tensor) -> list[tf.Tensor]:
        among = communicator(process_set)
        return [
            tensor_of(
                among.call(
                    collectives.allgather,
                    array_of(value),
                    name=title,
                    algorithm="auto",
                    allocate=aligned_empty,
                )
            )
            for value, title in zip(values, names, strict=True)
        ]

    def forward(*inputs: tf.Tensor) -> Differentiated:
        shapes = [tf.shape(tensor, tf.int64) for tensor in inputs]

        def backward(*gradients: tf.Tensor) -> list[tf.Tensor]:
            means = _means(gradients, _of_gradient(name), process_set)
            begins = _rows_before(shapes, _of_gradient(name), process_set)
            return [
                tf.reshape(mean[begin : begin + tf.reduce_prod(shape[:1])], shape)
                for mean, begin, shape in zip(means, begins, shapes, strict=True)
            ]

        return call(gather, inputs, [rows_of(tensor) for tensor in inputs]), backward

    return differentiably(forward, *tensors)


def _rows_before(
    shapes: Sequence[tf.Tensor], name: str | None, process_set: ProcessSet
) -> list[tf.Tensor]:
    """Return, of tensors of these shapes on each rank, how many rows lower ranks have together."""

    def count(*values: tf.Tensor) -> list[tf.Tensor]:
        among = communicator(process_set)
        rows = np.array([[np.prod(array_of(shape)[:1]) for shape in values]], np.int64)
        everyone = among.allgather(rows, name=name)
        return [tf.constant(n) for n in everyone[: among.rank].sum(0)]

    return call(count, shapes, [tf.TensorSpec((), tf.int64)] * len(shapes))


# Broadcast


@unconverted
def broadcast(
    tensor: Any,
    root_rank: int,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> tf.Tensor:
    """Return the root's `tensor` on every rank.  Collective, blocking.

    Args:
        tensor: equal shape and dtype on all ranks.
        root_rank: the rank whose `tensor` it is, counted among all ranks.
        name, process_set: as in `allreduce`.
        ignore_name_scope: without effect.

    Raises:
        MismatchError, ArgumentError, UnsupportedError, PeerError: as `allreduce`.
    """
    del ignore_name_scope
    return _broadcast(as_tensor(tensor), root_rank, name, process_set)


def _broadcast(
    tensor: tf.Tensor, root_rank: int, name: str | None, process_set: ProcessSet
) -> tf.Tensor:
    def fetch(value: tf.Tensor) -> list[tf.Tensor]:
        return [root_value(value, root_rank, name, process_set)]

    def forward(x: tf.Tensor) -> Differentiated:
        def backward(gradient: tf.Tensor) -> list[tf.Tensor]:
            mean = _means([gradient], _of_gradient(name), process_set)[0]
            # Chosen, not left out: what is differentiated again must visit all ranks again.
            return [tf.where(rank() == root_rank, mean, tf.zeros_like(mean))]

        return call(fetch, [x], [spec_of(x)]), backward

    return differentiably(forward, tensor)[0]


def root_value(
    value: tf.Tensor, root_rank: int, name: str | None, process_set: ProcessSet
) -> tf.Tensor:
    """Return the root's `value`, which has one, on every rank.  Collective, blocking."""
    among = communicator(process_set)
    source = array_of(value)
    target = aligned_empty(source.shape, source.dtype)
    if rank() == root_rank:
        target[...] = source
    return tensor_of(among.broadcast(target, root_rank, name=name, in_place=True))


# All-to-all


@unconverted
def alltoall(
    tensor: Any,
    splits: Any = None,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send rows of `tensor` to every rank, and return the rows received.  Collective, blocking.

    Args:
        tensor: the rows for rank 0 come first, then those for rank 1, and so on.
        splits: how many rows go to each rank, a tensor or a list; None: equally many.
        name, process_set: as in `allreduce`.
        ignore_name_scope: without effect.

    Returns:
        The rows received, in rank order; with `splits` also a tensor of how many came from each.

    Raises:
        MismatchError, ArgumentError, UnsupportedError, PeerError: as `allreduce`.
    """
    del ignore_name_scope
    counts = [] if splits is None else [as_tensor(splits)]
    received = _alltoall(as_tensor(tensor), counts, name, process_set)
    return received[0] if splits is None else tuple(received)


def _alltoall(
    tensor: tf.Tensor, splits: Sequence[tf.Tensor], name: str | None, process_set: ProcessSet
) -> list[tf.Tensor]:
    """Return the rows received and from where; `splits` is one tensor or none."""
    kind = splits[0].dtype if splits else tf.int32

    def exchange(value: tf.Tensor, *given: tf.Tensor) -> list[tf.Tensor]:
        wanted = array_of(given[0]).tolist() if given else None
        rows, counts = communicator(process_set).alltoall(array_of(value), wanted, name=name)
        return [tensor_of(rows), tf.constant(counts, kind)]

    def forward(x: tf.Tensor) -> Differentiated:
        rows, counts = call(exchange, [x, *splits], [rows_of(x), tf.TensorSpec((None,), kind)])

        def backward(*gradients: tf.Tensor) -> list[tf.Tensor]:
            return _alltoall(gradients[0], [counts], _of_gradient(name), process_set)[:1]

        return [rows, counts], backward

    return differentiably(forward, tensor)


# Reduce-scatter


@unconverted
def reducescatter(
    tensor: Any,
    device_dense: str = "",
    compression: Any = Compression.none,
    op: Any = Average,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> tf.Tensor:
    """Return this rank's rows of the combination of all ranks' `tensor`.  Collective, blocking.

    Args:
        tensor: of at least one dimension; equal shape and dtype on all ranks.  Its rows are shared
            out in order; the first ranks get one more where they do not divide.
        op: `Average`, `Sum`, `Min`, `Max` or `Product`.
        compression, name, process_set, prescale_factor, postscale_factor: as in `allreduce`.
        device_dense, ignore_name_scope: without effect.

    Raises:
        MismatchError, ArgumentError, UnsupportedError, PeerError: as `allreduce`.
    """
    del device_dense, ignore_name_scope
    how = (op, prescale_factor, postscale_factor)
    return _compressed([tensor], compression, how, name, process_set)[0]


@unconverted
def grouped_reducescatter(
    tensors: Sequence[Any],
    device_dense: str = "",
    compression: Any = Compression.none,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[tf.Tensor]:
    """Return this rank's rows of the combinations of all ranks' `tensors`.  Blocking."""
    del device_dense
    how = (op, prescale_factor, postscale_factor)
    return _compressed(tensors, compression, how, None, process_set)


def _compressed(
    tensors: Sequence[Any],
    compression: Any,
    how: tuple[Any, float, float],
    name: str | None,
    process_set: ProcessSet,
) -> list[tf.Tensor]:
    packed = [compression.compress(as_tensor(tensor)) for tensor in tensors]
    parts = _reducescatter([tensor for tensor, _ in packed], how, name, process_set)
    return [
        compression.decompress(part, form) for part, (_, form) in zip(parts, packed, strict=True)
    ]


def _reducescatter(
    tensors: Sequence[tf.Tensor],
    how: tuple[Any, float, float],
    name: str | None,
    process_set: ProcessSet,
) -> list[tf.Tensor]:
    if not tensors:
        return []
    op, prescale, postscale = how
    names = _names(name, len(tensors))

    def reduce(*values: tf.Tensor) -> list[tf.Tensor]:
        among = communicator(process_set)
        parts = [
            among.reducescatter(
                array_of(value),
                op=op,
                name=title,
                prescale_factor=prescale,
                postscale_factor=postscale,
            )
            for value, title in zip(values, names, strict=True)
        ]
        return [tensor_of(part) for part in parts]

    def forward(*inputs: tf.Tensor) -> Differentiated:
        def backward(*gradients: tf.Tensor) -> list[tf.Tensor]:
            size = communicator(process_set).size if as_op(op) is ReduceOp.SUM else 1
            factor = prescale * postscale * size
            scaled = [gradient * factor for gradient in gradients]
            return _allgather(scaled, _of_gradient(name), process_set)

        return call(reduce, inputs, [rows_of(tensor) for tensor in inputs]), backward

    return differentiably(forward, *tensors)


# What they share


def _means(
    tensors: Sequence[tf.Tensor], name: str | None, process_set: ProcessSet
) -> list[tf.Tensor]:
    return grouped_allreduce(tensors, op=Average, name=name, process_set=process_set)


def _names(name: str | None, count: int) -> list[str | None]:
    """Return the names of the tensors of a group, of which one alone has the group's."""
    return [name if count == 1 else numbered(name, place) for place in range(count)]


def _of_gradient(name: str | None) -> str | None:
    return None if name is None else f"{name}.gradient"
