"""Variables that each rank has for itself: their gradients are not combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit.errors import ArgumentError
from hvdkit.process_sets import ProcessSet
from hvdkit.tensorflow.convert import variable_of
from hvdkit.tensorflow.gradients import Reduction


class LocalSources:
    """Variables whose gradients are each rank's own.

    Args:
        process_set: by whose number of ranks their gradients are divided.
        scaled: whether they are.
    """

    def __init__(self, process_set: ProcessSet, *, scaled: bool) -> None:
        self._process_set = process_set
        self._scaled = scaled
        self._known: dict[int, Any] = {}

    def add(self, source: Any) -> None:
        """Leave a variable's gradient alone."""
        variable = variable_of(source)
        self._known[id(variable)] = variable

    def __contains__(self, source: Any) -> bool:
        return id(variable_of(source)) in self._known

    def reduce(
        self, reduction: Reduction, gradients: Sequence[Any], sources: Sequence[Any]
    ) -> list[Any]:
        """Return the gradients, combined where they are not local.  Collective."""
        results = list(gradients)
        common = [i for i, source in enumerate(sources) if source not in self]
        reduced = reduction([gradients[i] for i in common], [sources[i] for i in common])
        for i, gradient in zip(common, reduced, strict=True):
            results[i] = gradient
        if self._scaled and len(common) < len(results):
            share = 1.0 / (self._process_set.size() or 1)
            for i in set(range(len(results))) - set(common):
                results[i] = _scaled(results[i], share)
        return results


def _scaled(gradient: Any, factor: float) -> Any:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values * tf.constant(factor, gradient.values.dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient * tf.constant(factor, gradient.dtype)


def variables_of_layers(layers: Any) -> list[Any]:
    """Return the trainable variables of a layer of Keras, of several, or of none.

    Raises:
        ArgumentError: they are not layers.
    """
    if layers is None:
        return []
    several = layers if isinstance(layers, list | tuple | set) else [layers]
    if not all(hasattr(layer, "trainable_weights") for layer in several):
        raise ArgumentError(f"local_layers must be layers of Keras, not {layers!r}")
    return [variable for layer in several for variable in layer.trainable_weights]
