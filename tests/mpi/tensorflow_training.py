"""Small models of TensorFlow, their batches, and one process with the whole batch as the oracle."""

import keras
import numpy as np
import tensorflow as tf

import hvdkit.tensorflow as hvd

RANK, SIZE = hvd.rank(), hvd.size()
ROWS = 4  # of each rank


class Dense(tf.Module):
    """Two layers, of plain variables."""

    def __init__(self, dtype=tf.float64):
        super().__init__()
        rng = np.random.default_rng(0)
        self.first = tf.Variable(rng.standard_normal((5, 12)), dtype=dtype, name="first")
        self.bias = tf.Variable(np.zeros(12), dtype=dtype, name="bias")
        self.last = tf.Variable(rng.standard_normal((12, 3)), dtype=dtype, name="last")

    def loss(self, x, y):
        x, y = tf.cast(x, self.last.dtype), tf.cast(y, self.last.dtype)
        hidden = tf.tanh(x @ self.first + self.bias)
        return tf.reduce_mean((hidden @ self.last - y) ** 2)


class Embedded(Dense):
    """The same behind a table, whose gradient is tf.IndexedSlices."""

    def __init__(self, dtype=tf.float64):
        super().__init__(dtype)
        table = np.random.default_rng(1).standard_normal((9, 5))
        self.table = tf.Variable(table, dtype=dtype, name="table")

    def loss(self, x, y):
        words = tf.cast(tf.abs(x[:, 0]) * 100, tf.int32) % 9
        return super().loss(tf.gather(self.table, words) * tf.cast(x, self.table.dtype), y)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
}


def batch_of(step):
    """Return the whole batch of a step."""
    x = np.random.default_rng(step).standard_normal((ROWS * SIZE, 5))
    return x, np.sin(x) @ np.ones((5, 3))


def mine(arrays, rank=RANK):
    """Return a rank's part of a batch."""
    return [array[rank::SIZE] for array in arrays]


def whole(arrays):
    return arrays


def train(model, optimizer, part, *, graph, steps=range(20), tape=lambda tape: tape):
    """Take `steps` with what `part` makes of each batch; return the losses."""

    def step(x, y):
        with tf.GradientTape() as recorded:
            loss = model.loss(x, y)
        gradients = tape(recorded).gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    taken = tf.function(step) if graph else step
    return [taken(*map(tf.constant, part(batch_of(number)))).numpy() for number in steps]


def assert_same(found, wanted, tolerance=1e-9):
    """Check that the variables of two models are equal but for rounding."""
    for ours, theirs in zip(_arrays(found), _arrays(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def assert_identical(model):
    """Check that all ranks hold the same bits."""
    for array in _arrays(model):
        everyone = hvd.allgather_object(array.tobytes())
        assert len(set(everyone)) == 1


def _arrays(model):
    return [np.asarray(variable) for variable in model.trainable_variables]
