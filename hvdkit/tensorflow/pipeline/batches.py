"""Batches in parts, along their first dimension; and tensors in the form in which they travel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvdkit.errors import ArgumentError, UnsupportedError
from hvdkit.parallel.pipeline.executor import Bundle
from hvdkit.tensorflow.convert import array_of, tensor_of


def rows_of(batch: Any) -> int:
    """Return how many rows a batch has.

    Args:
        batch: a tensor or an array, or any structure of them that ``tf.nest`` knows.

    Raises:
        ArgumentError: its tensors disagree, or it has none.
    """
    shapes = [tuple(np.shape(tensor)) for tensor in tf.nest.flatten(batch)]
    found = {shape[0] if shape else 0 for shape in shapes}
    if len(found) != 1 or 0 in found:
        raise ArgumentError(
            "a batch is a tensor, or a tuple, list or dict of tensors, with one number of rows, 1 "
            f"or more; this one has tensors of {sorted(found)} rows"
        )
    return int(found.pop())


def sizes_of(rows: int, count: int) -> list[int]:
    """Return the rows of each of `count` parts; the first have one more if they do not divide."""
    return [rows // count + (part < rows % count) for part in range(count)]


def split(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Return a batch in parts of so many rows, of tensors."""
    cut = [tf.split(tf.convert_to_tensor(tensor), sizes) for tensor in tf.nest.flatten(batch)]
    return [tf.nest.pack_sequence_as(batch, list(part)) for part in zip(*cut, strict=True)]


def joined(parts: Sequence[Any]) -> Any:
    """Return the batch of which these are the parts, of arrays."""
    return tf.nest.map_structure(lambda *several: np.concatenate(several), *parts)


class Packed(NamedTuple):
    """What goes from stage to stage: what one layer returns and the next is called with.

    A mask, which Keras attaches to a tensor, would be lost on the way; so it goes along.
    """

    form: Any
    """`ONE` tensor, a `TUPLE` of them, or a `LIST`."""
    tensors: tuple[tf.Tensor, ...]
    masks: tuple[tf.Tensor | None, ...]


ONE, TUPLE, LIST = range(3)


def packed(x: Any) -> Packed:
    """Return tensors as they travel.

    Raises:
        UnsupportedError: they stand in another structure.
    """
    form = TUPLE if isinstance(x, tuple) else LIST if isinstance(x, list) else ONE
    tensors = (x,) if form == ONE else tuple(x)
    if not all(tf.is_tensor(tensor) for tensor in tensors):
        raise UnsupportedError(
            "the last layer of a stage returns a tensor, or a tuple or list of tensors; not "
            f"{x!r}: give partition= other lengths, or change the layer"
        )
    return Packed(form, tensors, tuple(getattr(tensor, "_keras_mask", None) for tensor in tensors))


def unpacked(what: Packed) -> Any:
    """Return what was packed, for a layer to be called with."""
    for tensor, mask in zip(what.tensors, what.masks, strict=True):
        if mask is not None:
            tensor._keras_mask = mask
    if what.form == ONE:
        return what.tensors[0]
    return list(what.tensors) if what.form == LIST else what.tensors


def bundle_of(what: Packed) -> Bundle:
    """Return the arrays of tensors that have values, which share their memory."""
    masks = (None if mask is None else array_of(mask) for mask in what.masks)
    return [array_of(tf.convert_to_tensor(what.form)), *map(array_of, what.tensors), *masks]


def from_bundle(bundle: Bundle) -> Packed:
    """Return the tensors of what `bundle_of` made."""
    form, *arrays = bundle
    tensors = [None if array is None else tensor_of(array) for array in arrays]
    half = len(tensors) // 2
    assert form is not None
    return Packed(int(form), tuple(tensors[:half]), tuple(tensors[half:]))
