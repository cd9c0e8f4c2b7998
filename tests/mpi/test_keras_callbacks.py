"""`hvdkit.keras.callbacks` and the collectives on values."""

from pathlib import Path

import pytest

pytest.importorskip("tensorflow")

import keras
import numpy as np
from keras_training import (
    RANK,
    SIZE,
    assert_identical,
    assert_same,
    build,
    data,
    fit,
    float64,  # noqa: F401  (a fixture)
    rows,
)

import hvdkit.keras as hvd
from hvdkit.keras import callbacks

sgd = keras.optimizers.SGD


class At(keras.callbacks.LambdaCallback):
    """Notes something at the beginning of each batch, and what the logs of epochs are."""

    def __init__(self, look):
        self.seen, self.logs = [], []
        super().__init__(
            on_train_batch_begin=lambda *_, **__: self.seen.append(look(self.model)),
            on_epoch_end=lambda _, logs=None: self.logs.append(dict(logs)),
        )


def rate(model):
    return float(model.optimizer.learning_rate)


# Broadcast


@pytest.mark.parametrize("eagerly", [False, True])
def test_broadcast_before_the_first_step(eagerly):
    """As if all ranks had begun with the last one's model and optimizer."""
    model, plain = build(seed=RANK), build(seed=SIZE - 1)
    optimizer = hvd.DistributedOptimizer(sgd(0.1 * (RANK + 1), momentum=0.9))
    how = {"compiled": {"run_eagerly": eagerly}}
    broadcast = callbacks.BroadcastGlobalVariablesCallback(SIZE - 1)
    fit(model, optimizer, data(3, rank=RANK), callbacks=[broadcast], **how)
    fit(plain, sgd(0.1 * SIZE, momentum=0.9), data(3))
    assert_same(model, plain)
    assert_identical(model.weights + optimizer.variables)


def test_broadcast_of_a_state_that_one_rank_has_loaded():
    model = build(seed=RANK)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam())
    if RANK == 0:
        optimizer.build(model.trainable_variables)
        optimizer.iterations.assign(7)
        optimizer.variables[3].assign(np.ones(optimizer.variables[3].shape))
    broadcast = callbacks.BroadcastGlobalVariablesCallback(0)
    watch = At(lambda model: model.optimizer.variables[3].numpy().mean())
    fit(model, optimizer, data(1, rank=RANK), callbacks=[broadcast, watch])
    assert watch.seen == [1.0]
    assert int(optimizer.iterations) == 8


def test_broadcast_leaves_local_variables():
    model = build(seed=RANK)
    model.compile(hvd.DistributedOptimizer(sgd(0.1)), "mse")
    broadcast = callbacks.BroadcastGlobalVariablesCallback(0, local_variables=model.weights[0])
    broadcast.register_local_var(model.weights[1].value)
    broadcast.set_model(model)
    broadcast.on_train_begin()
    root, own = build(seed=0).get_weights(), build(seed=RANK).get_weights()
    for ours, wanted in zip(model.get_weights(), own[:2] + root[2:], strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.skipif(SIZE == 1, reason="one rank agrees with itself")
def test_broadcast_of_models_that_differ():
    variables = [keras.Variable(np.zeros(2)) for _ in range(2 + (RANK == 1))]
    with pytest.raises(hvd.MismatchError, match="number of variables"):
        hvd.broadcast_variables(variables, 0)
    with pytest.raises(hvd.MismatchError, match=r"variable 1\n.*\n.*rank.* 1.*\(3,\)"):
        hvd.broadcast_variables([variables[0], keras.Variable(np.zeros(2 + (RANK == 1)))], 0)


# Metrics


def test_metrics_are_averaged_for_the_callbacks_that_follow():
    model = build()
    watch, later = At(rate), At(rate)
    everything = [watch, callbacks.MetricAverageCallback(), later]
    x, y = data(2, rank=RANK)
    optimizer = hvd.DistributedOptimizer(sgd(0.0))
    history = fit(
        model,
        optimizer,
        (x, y + RANK),
        callbacks=everything,
        validation_data=rows((x, y - RANK)),
        compiled={"metrics": ["mae"]},
    )
    own, common = hvd.allgather_object(watch.logs[0]), later.logs[0]
    assert set(common) == {"loss", "mae", "val_loss", "val_mae"}
    for name, value in common.items():
        np.testing.assert_allclose(value, np.mean([logs[name] for logs in own]), rtol=1e-12)
    assert history.history["val_loss"] == [common["val_loss"]]
    assert hvd.allgather_object(common) == [common] * SIZE


@pytest.mark.skipif(SIZE == 1, reason="one rank agrees with itself")
def test_ranks_with_different_metrics():
    logs = {"loss": 1.0} | ({"val_loss": 2.0} if RANK == 0 else {})
    with pytest.raises(hvd.MismatchError, match=r"rank 0: .*loss, val_loss(.|\n)*1.*: *loss"):
        callbacks.MetricAverageCallback().on_epoch_end(0, logs)


# Learning rates


def test_warmup(capfd):
    model = build()
    warmup = callbacks.LearningRateWarmupCallback(0.1 * SIZE, warmup_epochs=2, verbose=1)
    watch = At(rate)
    optimizer = hvd.DistributedOptimizer(sgd(0.1 * SIZE))
    part = data(2, rank=RANK)
    fit(model, optimizer, part, epochs=3, callbacks=[warmup, watch])
    steps = [0.1 * ((i + 1) / 4 * (SIZE - 1) + 1) for i in range(4)]
    np.testing.assert_allclose(watch.seen, [*steps, 0.1 * SIZE, 0.1 * SIZE], rtol=1e-9)
    np.testing.assert_allclose([logs["lr"] for logs in watch.logs], watch.seen[1::2])
    assert ("warmup is done" in capfd.readouterr().out) == (RANK == 0)


def test_schedules():
    model = build()
    schedule = callbacks.LearningRateScheduleCallback
    everything = [
        schedule(1.0, multiplier=0.1, start_epoch=1, end_epoch=3),
        schedule(1.0, lambda epoch: epoch / 100, start_epoch=3, staircase=False),
        watch := At(rate),
    ]
    optimizer = hvd.DistributedOptimizer(sgd(0.5))
    fit(model, optimizer, data(2, rank=RANK), epochs=4, callbacks=everything)
    np.testing.assert_allclose(watch.seen, [0.5, 0.5, 1.0, 1.0, 0.1, 0.1, 0.03, 0.035], rtol=1e-9)


@pytest.mark.parametrize("correct", [True, False])
def test_momentum_correction(correct):
    """When the rate halves, so does the velocity: ``v' = m * v * new / old - new * g``."""
    variable = keras.Variable(np.zeros(2))
    optimizer = sgd(1.0, momentum=0.5)
    model = build()
    model.compile(optimizer, "mse")
    callback = callbacks.LearningRateScheduleCallback(1.0, 0.5, momentum_correction=correct)
    callback.set_model(model)
    velocity = where = 0.0
    for epoch in range(3):
        callback.on_epoch_begin(epoch)
        callback.on_train_batch_begin(0)
        optimizer.apply([keras.ops.ones(2)], [variable])
        new, old = 0.5**epoch, 0.5 ** max(epoch - 1, 0)
        velocity = 0.5 * velocity * (new / old if correct else 1.0) - new
        where += velocity
        np.testing.assert_allclose(variable.numpy(), where, rtol=1e-12)
    assert optimizer.momentum == 0.5


def test_learning_rates_that_cannot_be():
    with pytest.raises(hvd.ArgumentError, match="initial_lr"):
        callbacks.LearningRateScheduleCallback(None, 0.1)
    callback = callbacks.LearningRateWarmupCallback(0.1)
    callback.set_params({})
    with pytest.raises(hvd.ArgumentError, match="steps_per_epoch"):
        callback.on_train_begin()
    model = build()
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    model.compile(hvd.DistributedOptimizer(sgd(schedule)), "mse")
    callback = callbacks.LearningRateScheduleCallback(1.0, 0.5)
    callback.set_model(model)
    with pytest.raises(hvd.ArgumentError, match="LearningRateSchedule"):
        callback.on_train_batch_begin(0)


def test_best_model(tmp_path):
    path = Path(hvd.broadcast_object(str(tmp_path))) / "best-{epoch}.keras"
    best = callbacks.BestModelCheckpoint(monitor="loss", mode="max", filepath=path)
    model = build()
    part = data(1, rank=RANK)
    optimizer = hvd.DistributedOptimizer(sgd(0.01))
    fit(model, optimizer, part, epochs=3, callbacks=[best])
    hvd.allgather_object(None)  # until rank 0 has saved
    assert [file.name for file in path.parent.iterdir()] == ["best-1.keras"]
    with pytest.raises(hvd.ArgumentError, match="filepath"):
        fit(model, optimizer, part, callbacks=[callbacks.BestModelCheckpoint()])


# Values


def test_collectives_on_values():
    x = np.arange(4.0) + RANK
    everyone = [np.arange(4.0) + rank for rank in range(SIZE)]
    results = {
        "mean": (hvd.allreduce(x), np.mean(everyone, axis=0)),
        "sum": (hvd.allreduce(keras.Variable(x), average=False), np.sum(everyone, axis=0)),
        "max": (hvd.allreduce(keras.ops.array(x), op=hvd.Max), np.max(everyone, axis=0)),
        "number": (hvd.allreduce(float(RANK), "n"), (SIZE - 1) / 2),
        "fp16": (hvd.allreduce(x, compression=hvd.Compression.fp16), np.mean(everyone, axis=0)),
        "factor": (hvd.allreduce(x, prescale_factor=2.0), 2 * np.mean(everyone, axis=0)),
        "gathered": (
            hvd.allgather(x[: RANK + 1]),
            [i + r for r in range(SIZE) for i in range(r + 1)],
        ),
        "root's": (hvd.broadcast(x, SIZE - 1), everyone[-1]),
        "scattered": (
            hvd.reducescatter(np.arange(SIZE, dtype=np.float32), op=hvd.Sum),
            [RANK * SIZE],
        ),
    }
    for name, (found, wanted) in results.items():
        assert keras.ops.is_tensor(found), name
        np.testing.assert_allclose(found, wanted, err_msg=name)
    with pytest.raises(hvd.UnsupportedError, match="BroadcastGlobalVariablesCallback"):
        hvd.broadcast_global_variables(0)


def test_the_other_name():
    import hvdkit.tensorflow.keras as other
    from hvdkit.tensorflow.keras.callbacks import BestModelCheckpoint

    assert other.DistributedOptimizer is hvd.DistributedOptimizer
    assert (
        other.callbacks.BestModelCheckpoint is BestModelCheckpoint is callbacks.BestModelCheckpoint
    )
