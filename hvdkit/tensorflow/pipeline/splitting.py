"""What layers take, counted or measured in a dry run; no rank has all of them at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit.api import context
from hvdkit.errors import ArgumentError
from hvdkit.parallel import partition
from hvdkit.parallel.pipeline.ties import Tie
from hvdkit.tensorflow.convert import variable_of
from hvdkit.tensorflow.pipeline.layers import (
    Layer,
    Pop,
    Stash,
    arguments_of,
    filled,
    made,
    names_of,
    shaped,
    skips_of,
)

#: Of a dry run, how often each layer is run; the quickest counts.
RUNS = 3

#: Ops whose results are there anyway, whether backward needs them or not.
_NO_ACTIVATIONS = ("Const", "ReadVariableOp", "Shape")


@dataclass(frozen=True)
class Seen:
    """What every rank knows of a layer, whoever has it.

    Args:
        title: for messages.
        arguments: what it is called with, as ``keras.KerasTensor``; None: unknown, for its weights
            were there already.
        shapes: of its variables, by name.
        elements: of its variables.
        nbytes: memory that it takes throughout: variables, gradients, optimizer state.
    """

    title: str
    arguments: tuple[Any, ...] | None
    shapes: dict[str, tuple[int, ...]]
    elements: int
    nbytes: int

    def counted(self) -> partition.Layer:
        return partition.Layer(self.elements, self.nbytes, name=self.title)


@dataclass(frozen=True)
class Survey:
    """What every rank knows of all layers."""

    seen: list[Seen]
    skips: dict[str, tuple[int, int]]
    """By name, at which layer each skip connection begins and ends."""
    ties: list[Tie]
    """Variables that are in several of the layers that were given."""

    def counted(self) -> list[partition.Layer]:
        return [seen.counted() for seen in self.seen]


def survey(layers: Sequence[Layer], inputs: Any, *, state: float, seed: int) -> Survey:
    """Look at all layers, one after the other.

    Args:
        layers: of the model.
        inputs: of the first, as ``keras.KerasTensor``; None: unknown.
        state: what an optimizer keeps for each element of a variable, in elements.
        seed: for the names of layers that are yet to be made.

    Raises:
        ArgumentError: the inputs are unknown and a layer needs them; or skips do not fit.
    """
    seen: list[Seen] = []
    ends: list[Stash | Pop | None] = []
    shared: dict[int, list[str]] = {}
    stashed: dict[str, Any] = {}
    x = inputs
    for index, layer in enumerate(layers):
        found = made(layer, index, seed)
        arguments: tuple[Any, ...] | None = None
        if x is not None:
            arguments = _arguments(found, x, stashed)
            x = shaped(found, index, seed, arguments)
        elif not (found.built or isinstance(found, Stash | Pop)):
            raise ArgumentError(
                f"layer {index} ({type(found).__name__}) has no weights yet, and their shapes "
                "follow from the input's: begin the layers with keras.Input(shape), or give an "
                "example"
            )
        names = names_of(found, index)
        seen.append(_seen(found, index, arguments, names, state))
        if found is layer:
            for name, variable in names.items():
                shared.setdefault(id(variable), []).append(name)
        ends.append(found if isinstance(found, Stash | Pop) else None)
    ties = [tuple(names) for names in shared.values() if len(names) > 1]
    return Survey(seen, skips_of(ends), ties)


def _arguments(layer: Any, x: Any, stashed: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a layer is called with, and keep what is stashed.

    Raises:
        ArgumentError: nothing was stashed for it.
    """
    if isinstance(layer, Stash):
        stashed[layer.skip] = x
    if not isinstance(layer, Pop):
        return arguments_of(x)
    if layer.skip not in stashed:
        raise ArgumentError(f"no Stash({layer.skip!r}) stands before the Pop of that name")
    return (x, stashed[layer.skip])


def _seen(
    layer: keras.layers.Layer,
    index: int,
    arguments: tuple[Any, ...] | None,
    names: dict[str, Any],
    state: float,
) -> Seen:
    trained = {id(variable) for variable in layer.trainable_variables}
    elements, nbytes = 0, 0.0
    for variable in names.values():
        count = int(np.prod(variable.shape, dtype=np.int64))
        elements += count
        copies = 2 + state if id(variable) in trained else 1
        nbytes += count * tf.as_dtype(variable.dtype).size * copies
    shapes = {name: tuple(variable.shape) for name, variable in names.items()}
    title = f"layers.{index} ({type(layer).__name__})"
    return Seen(title, arguments, shapes, elements, int(nbytes))


def measured(
    layers: Sequence[Layer], seen: Sequence[Seen], example: Any, *, seed: int, recompute: bool
) -> list[partition.Layer]:
    """Return what layers take by running each, forward and backward.  Collective.

    Rank 0 runs them, one after the other; what functions make is gone when the next comes.

    Args:
        layers: of the model.
        seen: of each.
        example: a microbatch's input.
        seed: for the weights of layers that are yet to be made.
        recompute: whether of a layer's activations the input alone is held.
    """
    found = None
    if context().topology.rank == 0:
        found = []
        stashed: dict[str, Any] = {}
        x = tf.nest.map_structure(tf.convert_to_tensor, example)
        for index, (layer, known) in enumerate(zip(layers, seen, strict=True)):
            module = of_rank(layer, known, index, seed)
            arguments = _arguments(module, x, stashed)
            state = [variable_of(variable) for variable in module.non_trainable_variables]
            before = [variable.read_value() for variable in state]
            seconds, held, x = _run(module, arguments)
            for variable, value in zip(state, before, strict=True):
                variable.assign(value)
            if recompute:
                held = sum(map(_nbytes, tf.nest.flatten(arguments)))
            found.append(partition.Layer(seconds, known.nbytes, held, known.title))
    shared: list[partition.Layer] = context().world.broadcast_object(found, 0, name="dry run")
    return shared


def of_rank(layer: Layer, seen: Seen, index: int, seed: int) -> keras.layers.Layer:
    """Return a layer of this rank, with its weights."""
    found = made(layer, index, seed)
    if found is not layer and seen.arguments is not None:
        shaped(found, index, seed, seen.arguments)
    return filled(found, index, seed)


def _run(layer: keras.layers.Layer, arguments: tuple[Any, ...]) -> tuple[float, int, Any]:
    """Return seconds, bytes held for backward, and the output."""
    weights = [variable_of(variable) for variable in layer.trainable_variables]
    held = 0

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def step(*arguments: Any) -> Any:
        nonlocal held
        graph = tf.compat.v1.get_default_graph()
        inputs = [t for t in tf.nest.flatten(arguments) if t.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            output = layer(*arguments, training=True)
            ends = [end for end in tf.nest.flatten(output) if end.dtype.is_floating]
        forward = set(graph.get_operations())
        # All are returned, for TensorFlow computes nothing else.
        gradients = tape.gradient(ends, [*weights, *inputs]) if ends else []
        backward = [op for op in graph.get_operations() if op not in forward]
        needed = {id(t): t for op in backward for t in op.inputs if t.op in forward}
        captured = {id(tensor) for tensor in graph.internal_captures}
        held = sum(
            _nbytes(tensor)
            for key, tensor in needed.items()
            if tensor.op.type not in _NO_ACTIVATIONS and key not in captured
        )
        return output, [gradient for gradient in gradients if gradient is not None]

    output, _ = step(*arguments)  # traces
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        step(*arguments)
        seconds.append(time.perf_counter() - began)
    return min(seconds), held, output


def _nbytes(tensor: tf.Tensor) -> int:
    """Return a tensor's bytes; of one of unknown shape or kind 0."""
    return (tensor.shape.num_elements() or 0) * (tensor.dtype.size or 0)
