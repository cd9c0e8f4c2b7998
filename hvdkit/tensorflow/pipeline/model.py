"""`PipelineModel`: a sequence of Keras layers, sharded over ranks, that trains like one model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit.api import context
from hvdkit.dtypes import Max
from hvdkit.errors import UnsupportedError
from hvdkit.parallel import checkpoint
from hvdkit.parallel.mesh import DATA, PIPELINE, Mesh
from hvdkit.parallel.partition import Partition
from hvdkit.parallel.pipeline.executor import Edge
from hvdkit.parallel.pipeline.pipeline import Pipeline
from hvdkit.parallel.pipeline.split import Wishes, split_layers
from hvdkit.parallel.pipeline.ties import Tie, check_ties, merged
from hvdkit.tensorflow.convert import array_of, variable_of
from hvdkit.tensorflow.gradients import Reduction
from hvdkit.tensorflow.pipeline.batches import joined
from hvdkit.tensorflow.pipeline.layers import Layer, inputs_and_layers, names_of
from hvdkit.tensorflow.pipeline.microbatches import Microbatch, cut
from hvdkit.tensorflow.pipeline.replicas import start_alike
from hvdkit.tensorflow.pipeline.saving import arrays_of, assign, held_by
from hvdkit.tensorflow.pipeline.splitting import measured, of_rank, survey
from hvdkit.tensorflow.pipeline.ties import Ties
from hvdkit.tensorflow.pipeline.updating import Updates, are_finite, scaled, spoil, sum_of_squares
from hvdkit.tensorflow.pipeline.worker import Loss, Stage, TensorFlowWorker, unique


class PipelineModel:
    """A sequence of Keras layers, sharded over the ``pipeline`` axis of a mesh.  Collective.

    Calling it with a batch and its targets trains: forward and backward of all microbatches, by the
    schedule; gradients averaged over the ``data`` axis in buckets, while the pipeline drains.  It
    returns the batch's loss.  On one rank it does the same by itself.

        model = PipelineModel(layers, loss, mesh=hvdkit.Mesh(data=2, pipeline=2))
        optimizer = keras.optimizers.AdamW()
        for x, y in batches:                 # of this rank's place along ``data``
            loss = model(x, y)
            model.clip_by_global_norm(1.0)
            model.apply_gradients(optimizer)

    The optimizer is a plain one.  A batch's gradients are the means over its rows; batch statistics
    are those of a microbatch.  What an optimizer does with all gradients at once, as clipping by a
    global norm does, it would do with this rank's alone; `clip_by_global_norm` sees them all.

    Args:
        layers: a ``keras.Sequential``, or a list of layers or of functions that make one.  Weights
            that are not there yet get memory and values on the ranks that have the layer; their
            shapes follow from ``keras.Input(shape)``, as the first of the list, or from `example`.
            A layer takes what the one before returns: of a tuple each tensor is an argument.
            `Stash` and `Pop` make skip connections.
        loss: ``loss(target, output)``, as Keras has it: one of ``keras.losses``, by its name too,
            or a function; a mean over the batch's first dimension, or a loss for each row.
        mesh: with the axes ``pipeline`` and, perhaps, ``data``; None: all ranks in one pipeline.
        schedule: ``"gpipe"``, ``"1f1b"``, ``"interleaved"`` or ``"zb-h1"``; the last is as correct
            and no faster than ``"1f1b"``, for TensorFlow computes both gradients in one piece.
        microbatches: into which a batch is cut; fewer if it has fewer rows.
        chunks: stages of a rank, for ``"interleaved"``.
        partition: ``"parameters"``: stages with the least possible largest number of these;
            ``"time"``: with the least possible largest time, as measured in a dry run on `example`;
            or the number of layers of each stage.
        example: a microbatch's input.
        speeds: of each rank of a pipeline, relative; None: all alike.
        memory_limit: bytes that a rank may hold of weights, gradients, optimizer state and, as far
            as measured, activations; None: no limit.
        optimizer_state: what the optimizer keeps for each element of a weight, in elements; of
            Adam 2.
        recompute: whether a stage's activations are computed again in backward instead of held.
        tied: names of weights that are one, such as ``("layers.0.kernel", "layers.7.kernel")``;
            those of layers that share one are found without being told.
        seed: for the weights of layers that are yet to be made: the same however many ranks.

    Raises:
        ArgumentError: what cannot be split so, or does not fit; shows the sizes.
        UnsupportedError: Keras has another backend.
    """

    def __init__(
        self,
        layers: keras.Sequential | Sequence[Layer],
        loss: str | Loss,
        *,
        mesh: Mesh | None = None,
        schedule: str = "1f1b",
        microbatches: int = 4,
        chunks: int = 1,
        partition: str | Sequence[int] = "parameters",
        example: Any = None,
        speeds: Sequence[float] | None = None,
        memory_limit: float | None = None,
        optimizer_state: float = 2.0,
        recompute: bool = False,
        tied: Sequence[Tie] = (),
        seed: int = 0,
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise UnsupportedError(
                f"PipelineModel is for Keras on TensorFlow, and this is on "
                f"{keras.backend.backend()}: set KERAS_BACKEND=tensorflow"
            )
        pipeline = self._pipeline = Pipeline(mesh, schedule, microbatches, chunks)
        self.mesh = pipeline.mesh
        inputs, every = inputs_and_layers(layers, example)
        known = survey(every, inputs, state=optimizer_state, seed=seed)
        self.partition: Partition = split_layers(
            Wishes(
                how=partition,
                stages=pipeline.stages,
                ranks=pipeline.ranks,
                speeds=speeds,
                limit=memory_limit,
                in_flight=pipeline.in_flight,
            ),
            known.counted,
            None
            if example is None
            else partial(measured, every, known.seen, example, seed=seed, recompute=recompute),
        )
        """Which layers each stage has."""
        self.layers: dict[int, keras.layers.Layer] = {
            index: of_rank(every[index], known.seen[index], index, seed)
            for stage in pipeline.mine
            for index in self.partition.layers(stage)
        }
        """This rank's, by their place among all."""
        skips = pipeline.skips(known.skips, self.partition)
        stages = {
            stage: self._stage(stage, skips, keras.losses.get(loss)) for stage in pipeline.mine
        }
        self._worker = TensorFlowWorker(stages, recompute)
        pipeline.open(self._worker, skips)
        ties = merged([*known.ties, *map(tuple, tied)])
        check_ties(ties, {name: s for seen in known.seen for name, s in seen.shapes.items()})
        holders = pipeline.holders(ties, self.partition)
        self._ties = Ties(ties, holders, self.named_variables(), self.mesh.rank)
        self._reduction: Reduction | None = None
        if pipeline.replicated:
            self._reduction = start_alike(list(self.layers.values()), self.mesh)
        self._updates = Updates()
        self.gradients: list[Any] = [None] * len(self.trainable_variables)
        """Of `trainable_variables`, after a step; of one that has no part in the loss, None."""

    # What it is made of

    def _stage(self, number: int, skips: Sequence[Edge], loss: Loss) -> Stage:
        return Stage(
            {index: self.layers[index] for index in self.partition.layers(number)},
            loss if number == self._pipeline.stages - 1 else None,
            arriving=[edge.label for edge in skips if edge.target == number],
            leaving=[edge.label for edge in skips if edge.source == number],
        )

    @property
    def variables(self) -> list[Any]:
        """The variables of this rank's layers."""
        return unique([v for layer in self.layers.values() for v in layer.variables])

    @property
    def trainable_variables(self) -> list[Any]:
        """Those that are trained."""
        return unique([v for layer in self.layers.values() for v in layer.trainable_variables])

    def named_variables(self) -> dict[str, Any]:
        """Return the variables of this rank's layers, by their names in the whole model.

        The names are ``layers.<number>.<name>``, whichever rank has the layer.
        """
        names: dict[str, Any] = {}
        for index, layer in self.layers.items():
            names.update(names_of(layer, index))
        return names

    # Training

    def __call__(
        self, inputs: Any, target: Any, *, scale: Callable[[Any], Any] | None = None
    ) -> float:
        """Train on a batch: leave `gradients`, and return the loss.  Collective, eager.

        Args:
            inputs: of the first layer: a tensor or array, or a tuple, list or dict of them, whose
                first dimension is the batch's; the same on all ranks of a pipeline.
            target: for the loss, likewise.
            scale: of losses before backward, such as ``optimizer.scale_loss`` of
                keras.optimizers.LossScaleOptimizer, whose scale is the same everywhere if every
                rank has weights; if gradients then overflow on one rank, they do on all.

        Returns:
            The mean over the batch, and over the ranks along ``data``, of the loss and of what
            layers add to it, such as regularizers.
        """
        _check_eager()
        batches = self._cut(inputs, target)
        worker = self._worker
        worker.begin(batches, training=True, scale=scale)
        try:
            self._pipeline.train(len(batches))
        finally:
            worker.forget()
        variables = self.trainable_variables
        sums, worker.sums = worker.sums, {}
        gradients = [sums.get(id(variable_of(variable))) for variable in variables]
        gradients = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
        if self._reduction is not None and variables:
            gradients = self._reduction(gradients, variables)
        self._ties.add_up(variables, gradients)
        self.gradients = gradients
        if scale is not None:
            self._overflow_alike()
        return self._total()

    def evaluate(self, inputs: Any, target: Any) -> float:
        """Return the loss of a batch as training would, without a backward.  Collective, eager."""
        self._look(inputs, target)
        return self._total()

    def predict(self, inputs: Any) -> Any:
        """Return the last layer's output of a batch, as arrays, on every rank of the pipeline.

        Collective, eager.
        """
        batches = self._look(inputs, None)
        outputs = None
        if self._pipeline.has_last:
            parts = [tf.nest.map_structure(array_of, batch.output) for batch in batches]
            outputs = joined(parts)
        return self._pipeline.from_last(outputs)

    def generate(
        self,
        tokens: Any,
        length: int,
        *,
        window: int | None = None,
        choose: Callable[[Any], Any] = lambda logits: logits.argmax(-1),
    ) -> Any:
        """Return `tokens` with `length` more, each chosen by what the model says.  Collective.

        Args:
            tokens: integers (batch, n); the same on all ranks of a pipeline.
            length: how many more.
            window: the most that the model takes; None: all.
            choose: of logits (batch, vocabulary), an array, the next tokens (batch,); if it draws,
                it draws the same on all ranks.
        """
        tokens = np.asarray(tokens)
        for _ in range(length):
            seen = tokens if window is None else tokens[:, -window:]
            chosen = np.asarray(choose(self.predict(seen)[:, -1]), tokens.dtype)
            tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
        return tokens

    def _look(self, inputs: Any, target: Any) -> list[Microbatch]:
        """Run a batch forward, and return what came of its microbatches."""
        _check_eager()
        batches = self._cut(inputs, target)
        self._worker.begin(batches, training=False)
        try:
            self._pipeline.look(len(batches))
        finally:
            self._worker.forget()
        return batches

    def _cut(self, inputs: Any, target: Any) -> list[Microbatch]:
        pipeline = self._pipeline
        first, last = 0 in pipeline.mine, pipeline.has_last
        return cut(inputs, target, pipeline.microbatches, first=first, last=last)

    def _total(self) -> float:
        """Return the loss of all microbatches and stages, on every rank."""
        return self._pipeline.total(self._pipeline.over_stages(self._worker.loss))

    # Gradients

    def clip_by_global_norm(self, max_norm: float) -> float:
        """Scale all gradients so that their norm together is at most `max_norm`.  Collective.

        Returns:
            The 2-norm before, of the whole model's gradients.
        """
        pairs = zip(self.gradients, self.trainable_variables, strict=True)
        squares = sum_of_squares(
            [g for g, v in pairs if g is not None and id(v) not in self._ties.copies]
        )
        norm = float(np.sqrt(self._pipeline.over_stages(squares)))
        if not norm <= max_norm:  # also what is no number, which all ranks then have
            self.gradients = scaled(self.gradients, max_norm / norm)
        return norm

    def apply_gradients(self, optimizer: keras.optimizers.Optimizer) -> None:
        """Let an optimizer update this rank's weights.  Local.

        It is compiled, and does nothing on a rank whose layers have no weights; otherwise the same
        as ``optimizer.apply_gradients(zip(model.gradients, model.trainable_variables))``.
        """
        trained = self.trainable_variables
        self._updates.apply(optimizer, self.variables, trained, self.gradients)

    # Checkpoints

    def save(
        self,
        folder: str | os.PathLike[str],
        optimizer: keras.optimizers.Optimizer | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a sharded checkpoint, which loads into another mesh as well.  Collective.

        Args:
            folder: on a file system that all ranks share; see `hvdkit.parallel.checkpoint.save`.
            optimizer: that `apply_gradients` has used, whose state is written as well.
            metadata: whatever else, as JSON has it.

        Raises:
            CheckpointError: a rank could not write; the older checkpoint stays.
            UnsupportedError: the optimizer's state cannot be assigned to the weights.
        """
        held, once = held_by(optimizer, self.named_variables(), self.trainable_variables)
        arrays = {} if self.mesh.place(DATA) > 0 else arrays_of(held)
        if not self._writes_once():
            arrays = {name: array for name, array in arrays.items() if name not in once}
        written = {"mesh": self.mesh.shape, "user": dict(metadata or {})}
        checkpoint.save(folder, arrays, among=context().world, metadata=written)

    def load(
        self,
        folder: str | os.PathLike[str],
        optimizer: keras.optimizers.Optimizer | None = None,
    ) -> dict[str, Any]:
        """Read what `save` wrote, from whatever mesh; return its `metadata`.  Collective.

        Raises:
            CheckpointError: it is not there, not whole, or of another model.
        """
        user: dict[str, Any] = checkpoint.read_index(folder).metadata["user"]
        held, _ = held_by(optimizer, self.named_variables(), self.trainable_variables)
        assign(held, checkpoint.load(folder, arrays_of(held)))
        context().world.barrier()  # whoever saves next sweeps away what others still read
        return user

    def _writes_once(self) -> bool:
        """Return whether it is this rank that writes what all have alike.  Collective."""
        place = float(self.mesh.place(PIPELINE)) if self.trainable_variables else -1.0
        return self._pipeline.over_stages(place, Max) == place

    def _overflow_alike(self) -> None:
        """Spoil this rank's gradients if another's are spoilt, so that all skip the step."""
        finite = are_finite(self.gradients)
        if self._pipeline.any_stage(not finite) and finite:
            spoil(self.gradients)


def _check_eager() -> None:
    """Refuse to be traced: every stage is compiled, what runs them waits for other ranks.

    Raises:
        UnsupportedError: this is in a tf.function.
    """
    if not tf.executing_eagerly():
        raise UnsupportedError(
            "a PipelineModel compiles its stages itself: take the tf.function off what calls it"
        )
