"""From a rank's gradients to its weights: their norm, their overflow, the compiled update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def sum_of_squares(gradients: Sequence[tf.Tensor]) -> float:
    """Return the sum of the squares of all elements, added in float64."""
    return sum(float(tf.reduce_sum(tf.square(tf.cast(g, tf.float64)))) for g in gradients)


def scaled(gradients: Sequence[Any], factor: float) -> list[Any]:
    """Return gradients times a factor; a None stays."""
    return [None if g is None else g * tf.constant(factor, g.dtype) for g in gradients]


def are_finite(gradients: Sequence[Any]) -> bool:
    """Return whether all elements are numbers; a None has none."""
    return all(bool(tf.reduce_all(tf.math.is_finite(g))) for g in gradients if g is not None)


def spoil(gradients: list[Any]) -> None:
    """Make the first that is there infinite, in place, so that a loss scale skips the step."""
    there = next((place for place, g in enumerate(gradients) if g is not None), None)
    if there is not None:
        first = gradients[there]
        gradients[there] = tf.fill(first.shape, tf.cast(np.inf, first.dtype))


class Updates:
    """The updates of optimizers, compiled: one for each optimizer."""

    def __init__(self) -> None:
        self._compiled: dict[int, tuple[Any, Callable[..., Any]]] = {}

    def apply(
        self,
        optimizer: keras.optimizers.Optimizer,
        variables: Sequence[Any],
        trained: Sequence[Any],
        gradients: Sequence[Any],
    ) -> None:
        """Let an optimizer update variables, if there is a gradient.

        Args:
            optimizer: built here for `trained`, if it is not yet.
            variables: all of this rank's, always the same.
            trained: those that are trained now.
            gradients: of each of `trained`; None: has none.
        """
        there = {
            id(variable): gradient
            for variable, gradient in zip(trained, gradients, strict=True)
            if gradient is not None
        }
        if not there:
            return
        if not optimizer.built:
            optimizer.build(trained)
        if id(optimizer) not in self._compiled:
            update = tf.function(partial(_update, optimizer, variables), autograph=False)
            self._compiled[id(optimizer)] = optimizer, update  # kept, for its id to stay its own
        self._compiled[id(optimizer)][1](list(there.values()), tuple(there))


def _update(optimizer: Any, variables: Any, gradients: Any, wanted: tuple[int, ...]) -> None:
    by_identity = {id(variable): variable for variable in variables}
    optimizer.apply(gradients, [by_identity[number] for number in wanted])
