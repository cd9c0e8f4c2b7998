"""Computes the stages of a rank, microbatch by microbatch, with tapes around compiled functions.

The first microbatch of a shape traces the forward of each stage, whose gradient function TensorFlow
makes with it; every other calls what was traced.  That gradient function is one piece: where a
zero-bubble schedule wants the gradients of inputs first, those of weights come with them, and later
there is nothing left to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from hvdkit.parallel.pipeline.executor import Bundle
from hvdkit.tensorflow.convert import array_of, tensor_of, variable_of
from hvdkit.tensorflow.pipeline.batches import Packed, bundle_of, from_bundle, packed, unpacked
from hvdkit.tensorflow.pipeline.layers import Pop, Stash, arguments_of
from hvdkit.tensorflow.pipeline.microbatches import Microbatch

#: Of a target and an output, the loss.
Loss = Callable[[Any, Any], tf.Tensor]


class Results(NamedTuple):
    """What a stage makes of a microbatch."""

    leaving: dict[str, Packed]
    """What goes to other stages, by the label of its edge."""
    output: Any
    """Of the last stage, where there is no target."""
    losses: list[tf.Tensor]
    """Of the output, and what layers add of their own."""


class Stage:
    """Some layers in a row.

    Args:
        layers: by their place among all.
        loss: None but for the last stage.
        arriving: skip connections that end here and begin in another stage.
        leaving: those that begin here and end in another.
    """

    def __init__(
        self,
        layers: Mapping[int, keras.layers.Layer],
        loss: Loss | None,
        *,
        arriving: Sequence[str] = (),
        leaving: Sequence[str] = (),
    ) -> None:
        self.layers, self._loss = layers, loss
        self._arriving, self._leaving = arriving, leaving
        self._compiled = {
            training: tf.function(
                partial(self._run, training=training), autograph=False, reduce_retracing=True
            )
            for training in (True, False)
        }
        self.weights: list[tf.Variable] = []
        """What is trained."""
        self.state: list[tf.Variable] = []
        """What else there is, such as moving averages and the states of random layers."""

    def find_variables(self) -> None:
        """Find out what is trained now: layers may have been frozen."""
        layers = self.layers.values()
        weights = [variable for layer in layers for variable in layer.trainable_variables]
        state = [variable for layer in layers for variable in layer.non_trainable_variables]
        self.weights = [variable_of(variable) for variable in unique(weights)]
        self.state = [variable_of(variable) for variable in unique(state)]

    def run(self, x: Any, stashed: dict[str, Packed], target: Any, *, training: bool) -> Results:
        """Return what the layers make of a microbatch.

        Args:
            x: of the first stage the input, else what came from the stage before.
            stashed: what came by skip connections, by their names.
            target: for the loss; None: without.
            training: what layers are told.
        """
        results: Results = self._compiled[training](x, stashed, target)
        return results

    def _run(self, x: Any, stashed: dict[str, Packed], target: Any, *, training: bool) -> Results:
        kept = {name: unpacked(stashed[name]) for name in self._arriving}
        x = unpacked(x) if isinstance(x, Packed) else x
        losses: list[tf.Tensor] = []
        for layer in self.layers.values():
            if isinstance(layer, Stash):
                kept[layer.skip] = x
            more = (kept.pop(layer.skip),) if isinstance(layer, Pop) else ()
            arguments = (x, *more) if more else arguments_of(x)
            x = layer(*arguments, training=training)
            losses.extend(layer.losses)
        leaving = {name: packed(kept[name]) for name in self._leaving}
        if self._loss is None:
            return Results(leaving | {"": packed(x)}, None, losses)
        if target is None:
            return Results(leaving, x, losses)
        return Results(leaving, None, [tf.reduce_mean(self._loss(target, x)), *losses])


@dataclass
class _Held:
    """What is held of a microbatch in a stage, from forward to backward."""

    x: Any
    entering: dict[str, Packed]
    tape: tf.GradientTape | None = None
    results: Results | None = None
    state: Sequence[tf.Tensor] = ()


@dataclass
class TensorFlowWorker:
    """Computes stages.

    Args:
        stages: of this rank, by number.
        recompute: whether activations are computed again in backward, a stage at a time.
        training: whether there will be a backward.
        scale: multiplies the weights of losses before backward.
    """

    stages: Mapping[int, Stage]
    recompute: bool = False
    training: bool = True
    scale: Callable[[Any], Any] | None = None
    microbatches: Sequence[Microbatch] = ()
    loss: float = 0.0
    """Of this rank's stages, so far."""
    sums: dict[int, Any] = field(default_factory=dict)
    """Gradients so far, by the identity of the tf.Variable."""
    _held: dict[tuple[int, int], _Held] = field(default_factory=dict)

    def begin(
        self,
        microbatches: Sequence[Microbatch],
        *,
        training: bool,
        scale: Callable[[Any], Any] | None = None,
    ) -> None:
        """Get ready for a batch."""
        self.microbatches, self.training, self.scale = microbatches, training, scale
        self.loss = 0.0
        self.sums = {}
        for stage in self.stages.values():
            stage.find_variables()

    def forget(self) -> None:
        """Let go of a batch, and of what an error left behind."""
        self.microbatches = ()
        self._held.clear()

    def forward(self, stage: int, microbatch: int, inputs: dict[str, Bundle]) -> dict[str, Bundle]:
        given, what = self.microbatches[microbatch], self.stages[stage]
        entering = {label: from_bundle(bundle) for label, bundle in inputs.items()}
        x = given.inputs if stage == 0 else entering.pop("")
        held = _Held(x, entering)
        if not self.training:
            results = what.run(x, entering, given.target, training=False)
        elif self.recompute:
            held.state = [variable.read_value() for variable in what.state]
            results = what.run(x, entering, given.target, training=True)
        else:
            held.tape, results = _recorded(what, held, given.target)
            held.results = results
        self.loss += given.weight * sum(map(float, results.losses))
        given.output = results.output
        if self.training:
            self._held[stage, microbatch] = held
        return {label: bundle_of(tensors) for label, tensors in results.leaving.items()}

    def backward(
        self, stage: int, microbatch: int, gradients: dict[str, Bundle], *, weights: bool
    ) -> dict[str, Bundle]:
        del weights  # TensorFlow computes all at once
        held, what = self._held.pop((stage, microbatch)), self.stages[stage]
        given = self.microbatches[microbatch]
        tape, results = held.tape, held.results
        if tape is None or results is None:
            tape, results = _recomputed(what, held, given.target)
        ends = [(loss, self._seed(given.weight, loss.dtype)) for loss in results.losses]
        for label, bundle in gradients.items():
            for tensor, array in zip(results.leaving[label].tensors, bundle, strict=True):
                if array is not None:
                    ends.append((tensor, tensor_of(array)))
        trained, bundles = what.weights, _bundles(stage, held)
        watched = [tensor for tensors in bundles.values() for tensor in tensors]
        found = _gradients(tape, ends, [*trained, *filter(_has_gradient, watched)])
        for variable in trained:
            self._add(variable, next(found))
        return {
            label: [_array(next(found)) if _has_gradient(tensor) else None for tensor in tensors]
            for label, tensors in bundles.items()
        }

    def _seed(self, weight: float, dtype: tf.DType) -> tf.Tensor:
        """Return the gradient of a microbatch's loss."""
        seed = tf.constant(weight, dtype)
        return tf.cast(self.scale(seed), dtype) if self.scale else seed

    def backward_weight(self, stage: int, microbatch: int) -> None:
        """Do nothing: `backward` did it."""

    def _add(self, variable: tf.Variable, gradient: Any) -> None:
        if gradient is not None:
            before = self.sums.get(id(variable))
            self.sums[id(variable)] = gradient if before is None else _sum(before, gradient)


def unique(items: Sequence[Any]) -> list[Any]:
    """Return items without those that are there twice."""
    return list({id(item): item for item in items}.values())


def _recorded(stage: Stage, held: _Held, target: Any) -> tuple[tf.GradientTape, Results]:
    """Run a stage forward, and return its tape besides."""
    entering = held.entering.values()
    tensors = [tensor for bundle in entering for tensor in bundle.tensors]
    if isinstance(held.x, Packed):
        tensors.extend(held.x.tensors)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([*stage.weights, *filter(_has_gradient, tensors)])
        results = stage.run(held.x, held.entering, target, training=True)
    return tape, results


def _recomputed(stage: Stage, held: _Held, target: Any) -> tuple[tf.GradientTape, Results]:
    """Run a stage forward as before: random layers draw the same, nothing is counted twice."""
    state = stage.state
    now = [variable.read_value() for variable in state]
    _assign(state, held.state)
    recorded = _recorded(stage, held, target)
    _assign(state, now)
    return recorded


def _assign(variables: Sequence[tf.Variable], values: Sequence[tf.Tensor]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value, read_value=False)


def _bundles(stage: int, held: _Held) -> dict[str, tuple[tf.Tensor, ...]]:
    """Return the tensors whose gradients go back, by the label of their edge."""
    bundles = {label: what.tensors for label, what in held.entering.items()}
    return bundles if stage == 0 else bundles | {"": held.x.tensors}


def _gradients(tape: tf.GradientTape, ends: Sequence[Any], sources: Sequence[Any]) -> Any:
    """Return an iterator over the gradients of `sources`; of one without, None."""
    if not ends or not sources:
        return iter([None] * len(sources))
    targets, seeds = zip(*ends, strict=True)
    return iter(tape.gradient(list(targets), list(sources), output_gradients=list(seeds)))


def _has_gradient(tensor: tf.Tensor) -> bool:
    return bool(tensor.dtype.is_floating or tensor.dtype.is_complex)


def _array(gradient: Any) -> Any:
    return None if gradient is None else array_of(tf.convert_to_tensor(gradient))


def _sum(before: Any, gradient: Any) -> Any:
    """Return the sum of two gradients; of two of a table of embeddings, all their slices."""
    if isinstance(before, tf.IndexedSlices) and isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.concat([before.values, gradient.values], 0),
            tf.concat([before.indices, gradient.indices], 0),
            before.dense_shape,
        )
    return tf.convert_to_tensor(before) + tf.convert_to_tensor(gradient)
