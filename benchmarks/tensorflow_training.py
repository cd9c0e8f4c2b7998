"""TensorFlow: whole training steps, beside MultiWorkerMirroredStrategy (and Horovod) in one run.

    mpirun -n 2 python benchmarks/tensorflow_training.py [--out FILE.json] [--batch 64]

A step is forward, backward and update of an MLP of 10 million parameters, inside tf.function: with
hvdkit's DistributedGradientTape, with its Keras DistributedOptimizer, with tf.distribute's
MultiWorkerMirroredStrategy, and alone, without any communication.  ``core`` is what the core takes
for the same gradients when nothing else is to be done: packing, all-reduce, unpacking.  What a step
takes beyond ``alone`` and ``core`` is the adapter's overhead, shown at the end.  See measuring.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import measuring
import numpy as np
import options
import tensorflow as tf
from measuring import Candidate, Prepared
from options import Choice
from peers import start_horovod, start_strategy
from records import OURS, PEER

import hvdkit.keras as hvd_keras
import hvdkit.tensorflow as hvd
from hvdkit.api import context
from hvdkit.engine.bucketing import Gradient

PEERS = ["strategy", "horovod"]

LAYERS = (784, 2048, 2048, 2048, 10)


def mlp() -> keras.Model:
    """Return an MLP of 10 million parameters, the same on every rank."""
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(units, activation="relu") for units in LAYERS[1:-1]]
    return keras.Sequential(
        [keras.Input((LAYERS[0],)), *layers, keras.layers.Dense(LAYERS[-1], dtype="float32")]
    )


def stepper(
    model: keras.Model, optimizer: object, tape: Callable[[tf.GradientTape], tf.GradientTape]
) -> Callable[[tf.Tensor, tf.Tensor], None]:
    """Return one training step."""
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")

    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as recorded:
            loss = loss_of(y, model(x, training=True)) / len(x)
        gradients = tape(recorded).gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    return step


def weights_of(model: keras.Model) -> np.ndarray:
    return np.concatenate([np.asarray(v).ravel() for v in model.trainable_variables])


def training_step(how: str, batch: int, strategy: tf.distribute.Strategy) -> Candidate:
    def prepare(_: int) -> Prepared:
        rng = np.random.default_rng(hvd.rank())
        x = tf.constant(rng.standard_normal((batch, LAYERS[0])), tf.float32)
        y = tf.constant(rng.integers(0, LAYERS[-1], batch))
        if how == "MultiWorkerMirrored":
            with strategy.scope():
                model = mlp()
                optimizer = keras.optimizers.SGD(1e-3)
                optimizer.build(model.trainable_variables)
            step = stepper(model, optimizer, lambda tape: tape)
            call = tf.function(lambda: strategy.run(step, args=(x, y)))
        else:
            model, optimizer = mlp(), keras.optimizers.SGD(1e-3)
            tape: Callable[[tf.GradientTape], tf.GradientTape] = lambda tape: tape  # noqa: E731
            if how == "hvdkit":
                tape = hvd.DistributedGradientTape
            elif how == "hvdkit.keras":
                optimizer = hvd_keras.DistributedOptimizer(optimizer)
            elif how == "Horovod":
                import horovod.tensorflow as horovod

                tape = horovod.DistributedGradientTape
            step = stepper(model, optimizer, tape)
            call = tf.function(lambda: step(x, y))

        def check() -> int:
            call()
            weights = weights_of(model)
            same = weights == hvd.broadcast(weights, 0).numpy()
            return 0 if how == "alone" else int((~same).sum())

        return call, check

    return Candidate(how, prepare, OURS if how.startswith("hvdkit") else PEER)


def core() -> Candidate:
    """Return what the core does for the same gradients."""

    def prepare(_: int) -> Prepared:
        variables = mlp().trainable_variables
        gradients = [np.full(v.shape, 1.0 + hvd.rank(), np.float32) for v in variables]
        reducer = context().gradient_reducer(
            [Gradient(v.path, tuple(v.shape), np.dtype(np.float32)) for v in variables]
        )
        reducer.keep_plan()
        results = [np.empty_like(gradient) for gradient in gradients]

        def call() -> None:
            for index in reversed(range(len(gradients))):
                np.copyto(reducer.views[index], gradients[index])
                reducer.ready(index)
            reducer.finish()
            for view, result in zip(reducer.views, results, strict=True):
                np.copyto(result, view)

        def check() -> int:
            call()
            return int(sum((result != (hvd.size() + 1) / 2).sum() for result in results))

        return call, check

    return Candidate("core", prepare)


def show_overhead(results: list[measuring.Result]) -> None:
    """Print what a step takes beside its own work and the core's."""
    seconds = {result.name: result.seconds for result in results}
    for how in ("hvdkit", "hvdkit.keras"):
        beyond = seconds[how] - seconds["alone"] - seconds["core"]
        print(
            f"{how}: {100 * beyond / seconds[how]:.0f} % of a step is neither the step alone nor "
            "the core's all-reduce of as many bytes"
        )


def main() -> None:
    parser = options.parser(__doc__, peers=Choice(PEERS, PEERS))
    parser.add_argument("--batch", type=int, default=64, help="rows of each rank")
    args = options.start(parser)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    strategy = start_strategy()
    measuring.show_machine()
    names = ["hvdkit", "hvdkit.keras", "alone"]
    names += ["MultiWorkerMirrored"] * ("strategy" in args.peers)
    names += ["Horovod"] * ("horovod" in args.peers and start_horovod("tensorflow"))
    candidates = [training_step(how, args.batch, strategy) for how in names]
    nbytes = 4 * sum(int(np.prod(v.shape)) for v in mlp().trainable_variables)
    results = measuring.run("step of an MLP", [nbytes], [*candidates, core()], turns=args.turns)
    if hvd.rank() == 0:
        show_overhead(results)
    measuring.report("tensorflow", results, args.out)


if __name__ == "__main__":
    main()
