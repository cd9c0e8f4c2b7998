"""Layers that only a pipeline needs, and layers that are yet to be made or to get their weights.

layers = [encoder_1, Stash("skip"), encoder_2, decoder_2, Pop("skip"), decoder_1]

A Keras layer makes its weights when it is first called, for it must know the shape of what it is
called with.  Which rank has a layer depends on the sizes of all.  So every rank calls all layers
with shapes alone first, which gives weights shapes, but no memory; those of its own layers then get
their values.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from tensorflow.python.eager import context as tensorflow_context

from hvdkit.errors import ArgumentError
from hvdkit.parallel.pipeline.pipeline import check_skips

#: A layer, or what makes one.
Layer: TypeAlias = keras.layers.Layer | Callable[[], keras.layers.Layer]

#: What Keras keeps beside the random states: its own, and the numbers in the names of layers.
_SEED, _GENERATOR, _NAMES = "global_random_seed", "global_seed_generator", "object_name_uids"
_PENDING = "uninitialized_variables"


class Stash(keras.layers.Layer):  # type: ignore[misc]
    """Lets tensors through, and keeps them for the `Pop` of the same name.

    Args:
        skip: name of the skip connection; of one `Stash` and one `Pop` behind it.
        options: of every Keras layer.
    """

    def __init__(self, skip: str, **options: Any) -> None:
        super().__init__(**options)
        self.skip = skip
        self.supports_masking = True

    def call(self, x: Any) -> Any:
        return x


class Pop(keras.layers.Layer):  # type: ignore[misc]
    """Combines what comes with what was stashed.

    Args:
        skip: name of the skip connection.
        combine: a layer that merges a list of tensors, such as ``keras.layers.Concatenate()``,
            whose weights are then this layer's; or a function, called as ``combine(x, stashed)``.
        options: of every Keras layer.
    """

    def __init__(
        self, skip: str, combine: Callable[..., Any] = keras.ops.add, **options: Any
    ) -> None:
        super().__init__(**options)
        self.skip = skip
        self.combine = combine
        self.supports_masking = True

    def build(self, x_shape: Any, stashed_shape: Any) -> None:
        if isinstance(self.combine, keras.layers.Layer) and not self.combine.built:
            self.combine.build([x_shape, stashed_shape])

    def call(self, x: Any, stashed: Any) -> Any:
        if isinstance(self.combine, keras.layers.Layer):
            return self.combine([x, stashed])
        return self.combine(x, stashed)


def inputs_and_layers(given: Any, example: Any) -> tuple[Any, list[Layer]]:
    """Return what the first layer is called with, as ``keras.KerasTensor``, and the layers.

    Args:
        given: a ``keras.Sequential``, or layers, before which ``keras.Input`` may stand.
        example: of the input; None: if there is no such input, what comes is not known.
    """
    layers = list(given.layers if isinstance(given, keras.Sequential) else given)
    inputs: list[Any] = []
    while layers and isinstance(layers[0], keras.KerasTensor | keras.layers.InputLayer):
        first = layers.pop(0)
        tensors = first.output if isinstance(first, keras.layers.InputLayer) else first
        inputs.append(_symbol(tensors))
    if example is not None:
        return tf.nest.map_structure(_symbol, example), layers
    return (inputs[0] if len(inputs) == 1 else tuple(inputs) or None), layers


def arguments_of(x: Any) -> tuple[Any, ...]:
    """Return the arguments of the layer that comes next: a tuple is several, a list is one."""
    return x if isinstance(x, tuple) else (x,)


def made(layer: Layer, index: int, seed: int) -> keras.layers.Layer:
    """Return a layer, made now if it is yet to be.

    Args:
        layer: a layer, or a function that makes one.
        index: of all layers.
        seed: from which the weights of what is made follow, whatever rank makes it.

    Raises:
        ArgumentError: what is made is no layer.
    """
    if isinstance(layer, keras.layers.Layer):
        return layer
    found = None
    if callable(layer):
        with seeded(seed + index):
            found = layer()
    if not isinstance(found, keras.layers.Layer):
        raise ArgumentError(
            f"layer {index} is neither a Keras layer nor a function that makes one: {layer!r}"
        )
    return found


def shaped(layer: keras.layers.Layer, index: int, seed: int, arguments: tuple[Any, ...]) -> Any:
    """Call a layer with shapes alone, and return those of its output.

    Weights that it makes then have shapes, but no memory, until `filled`.

    Args:
        layer: of any kind that Keras can call so.
        index, seed: as of `made`.
        arguments: ``keras.KerasTensor``, in any structure.
    """
    waiting = global_state.get_global_attribute(_PENDING)
    global_state.set_global_attribute(_PENDING, [])
    try:
        with seeded(seed + index), keras.StatelessScope(initialize_variables=False):
            # Outputs remember the layers that they come from, which must be free to go.
            return tf.nest.map_structure(_symbol, layer(*arguments))
    finally:
        global_state.set_global_attribute(_PENDING, waiting)


def filled(layer: keras.layers.Layer, index: int, seed: int) -> keras.layers.Layer:
    """Return a layer, after its weights have got memory and values.

    Args:
        layer: that `shaped` has called.
        index, seed: as of `made`.
    """
    with seeded(seed + index):
        for variable in layer.variables:
            if variable._value is None:
                variable._deferred_initialize()
    return layer


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Have everything random, and the names of layers, begin anew; afterwards go on as before."""
    tensorflow = tensorflow_context.context()
    kept = {name: global_state.get_global_attribute(name) for name in (_SEED, _GENERATOR, _NAMES)}
    seeds = {name: value for name, value in vars(tensorflow).items() if name in ("_seed", "_rng")}
    states = random.getstate(), np.random.get_state()
    keras.utils.set_random_seed(seed)
    global_state.set_global_attribute(_NAMES, defaultdict(int))
    try:
        yield
    finally:
        for name, value in kept.items():
            global_state.set_global_attribute(name, value)
        random.setstate(states[0])
        np.random.set_state(states[1])
        vars(tensorflow).update(seeds)


def names_of(layer: keras.layers.Layer, index: int) -> dict[str, Any]:
    """Return the variables of a layer by their names in the whole model, ``layers.3.kernel``.

    The names of layers within follow, ``layers.3.query.kernel``; those that Keras numbers begin
    anew in each layer that is made by a function.
    """
    names: dict[str, Any] = {}
    for variable in layer.variables:
        path = variable.path.removeprefix(f"{layer.path}/").replace("/", ".")
        name = f"layers.{index}.{path}"
        number = 1
        while name in names:
            number += 1
            name = f"layers.{index}.{path}_{number}"
        names[name] = variable
    return names


def skips_of(layers: Sequence[Stash | Pop | None]) -> dict[str, tuple[int, int]]:
    """Return, by name, at which layer each skip connection begins and ends.

    Args:
        layers: None for all other layers.

    Raises:
        ArgumentError: they do not fit.
    """
    begins, ends = (
        [(layer.skip, index) for index, layer in enumerate(layers) if isinstance(layer, kind)]
        for kind in (Stash, Pop)
    )
    check_skips(begins, ends)
    last = dict(ends)
    return {name: (index, last[name]) for name, index in begins}


def _symbol(tensor: Any) -> keras.KerasTensor:
    """Return the shape, for a batch of any size, the dtype and the mask of a tensor or array."""
    if not isinstance(tensor, keras.KerasTensor):
        tensor = tf.convert_to_tensor(tensor)
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    symbol = keras.KerasTensor((None, *tensor.shape[1:]), dtype=dtype)
    mask = getattr(tensor, "_keras_mask", None)
    if mask is not None:
        symbol._keras_mask = _symbol(mask)
    return symbol
