"""A small model of Keras, its batches, and how to train it, here or on one process for all.

The embedding's gradient is tf.IndexedSlices, all others are dense.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdkit.keras as hvd

RANK, SIZE = hvd.rank(), hvd.size()
ROWS, STEPS, WORDS = 3, 20, 7  # rows of each rank


@pytest.fixture(autouse=True)
def float64():
    """Have Keras compute losses as exactly as the models here, and learning rates."""
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(policy)


def build(dtype="float64", seed=0):
    """Return the model, the same for the same seed."""
    layers = [
        keras.layers.Input((2,), dtype="int32"),
        keras.layers.Embedding(WORDS, 3, dtype=dtype),
        keras.layers.Flatten(),
        keras.layers.Dense(4, activation="tanh", dtype=dtype),
        keras.layers.Dense(1, dtype=dtype),
    ]
    model = keras.Sequential(layers)
    random = np.random.default_rng(seed)
    model.set_weights([random.normal(size=weight.shape) for weight in model.weights])
    return model


def data(steps=STEPS, *, rank=None):
    """Return the batches of all steps, an array each: whole, or a rank's parts of them."""
    random = np.random.default_rng(1)
    x = random.integers(0, WORDS, (steps, ROWS * SIZE, 2)).astype(np.int32)
    y = np.sin(x.sum(axis=2, keepdims=True)).astype(np.float64)
    mine = slice(None) if rank is None else slice(rank, None, SIZE)
    return x[:, mine], y[:, mine]


def rows(part):
    """Return the rows of all batches, one after the other."""
    return tuple(array.reshape(-1, array.shape[2]) for array in part)


def fit(model, optimizer, part, *, compiled=None, **how):
    """Train on `part`, as `data` returns it, with ``fit``; return the history."""
    model.compile(optimizer, "mse", **(compiled or {}))
    how = {"batch_size": part[0].shape[1], "shuffle": False, "verbose": 0} | how
    return model.fit(*rows(part), **how)


def fit_eagerly(model, optimizer, part):
    fit(model, optimizer, part, compiled={"run_eagerly": True})


def train_on_batch(model, optimizer, part):
    model.compile(optimizer, "mse")
    for x, y in zip(*part, strict=True):
        model.train_on_batch(x, y)


def gradients_of(model, x, y, scale=lambda loss: loss):
    with tf.GradientTape() as tape:
        loss = scale(tf.reduce_mean(tf.square(model(x, training=True) - y)))
    return tape.gradient(loss, model.trainable_variables)


def loop(model, optimizer, part, wrap=tf.function):
    """Train in a loop of one's own, on `apply_gradients`."""

    @wrap
    def step(x, y):
        gradients = gradients_of(model, x, y)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    for x, y in zip(*part, strict=True):
        step(tf.constant(x), tf.constant(y))


def loop_eagerly(model, optimizer, part):
    """Train in a loop of one's own, on `apply`."""
    optimizer.build(model.trainable_variables)
    for x, y in zip(*part, strict=True):
        optimizer.apply(gradients_of(model, tf.constant(x), tf.constant(y)))


def assert_same(found, wanted, tolerance=1e-9):
    """Check that two models have the same weights but for rounding."""
    for ours, theirs in zip(found.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def assert_identical(variables):
    """Check that all ranks hold the same bits."""
    mine = [np.asarray(variable).tobytes() for variable in variables]
    assert all(theirs == mine for theirs in hvd.allgather_object(mine))
