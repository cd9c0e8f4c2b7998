"""Saving and loading models of Keras that were compiled with a `DistributedOptimizer`."""

import zipfile
from pathlib import Path

import pytest

pytest.importorskip("tensorflow")

import keras
import numpy as np
from keras_training import (
    RANK,
    ROWS,
    assert_identical,
    assert_same,
    build,
    data,
    fit_eagerly,
    float64,  # noqa: F401  (a fixture)
    rows,
)

import hvdkit.keras as hvd
from hvdkit.keras.distribution import distribution_of


@keras.saving.register_keras_serializable("tests")
class Registered(keras.optimizers.SGD):
    """One of a user's own, which Keras knows by name."""


class Unregistered(keras.optimizers.SGD):
    """One of a user's own, which Keras does not know."""


def train(model, optimizer, steps):
    fit_eagerly(model, optimizer, data(steps, rank=RANK))


@pytest.fixture(scope="module")
def trained():
    """Return a model that was trained for a few steps."""
    model = build("float32")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.02, clipnorm=1.0))
    train(model, optimizer, 4)
    return model


def assert_same_state(found, wanted):
    assert len(found.variables) == len(wanted.variables)
    for ours, theirs in zip(found.variables, wanted.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_a_saved_model_is_a_plain_one(trained, tmp_path):
    trained.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        assert b"hvdkit" not in b"".join(map(file.read, file.namelist()))
    model = keras.models.load_model(tmp_path / "model.keras")
    assert type(model.optimizer) is keras.optimizers.Adam
    assert model.optimizer.get_config() == trained.optimizer.get_config()
    assert_same_state(model.optimizer, trained.optimizer)
    assert_same(model, trained)


def test_load_model_goes_on_where_training_was(trained, tmp_path):
    trained.save(tmp_path / "model.keras")
    model = hvd.load_model(tmp_path / "model.keras")
    assert isinstance(model.optimizer, keras.optimizers.Adam)
    assert distribution_of(model.optimizer) is not None
    assert_same_state(model.optimizer, trained.optimizer)
    assert int(model.optimizer.iterations) >= 4
    for going_on in (model, trained):
        going_on.fit(*rows(data(2, rank=RANK)), batch_size=ROWS, shuffle=False, verbose=0)
    assert_identical(model.weights)
    assert_same(model, trained, 1e-6)


def test_load_model_passes_options_on(trained, tmp_path):
    trained.save(tmp_path / "model.keras")
    model = hvd.load_model(
        tmp_path / "model.keras", compression=hvd.Compression.fp16, backward_passes_per_step=2
    )
    wishes = distribution_of(model.optimizer).wishes
    assert (wishes.compression, wishes.passes) == (hvd.Compression.fp16, 2)
    with pytest.raises(hvd.ArgumentError, match="legacy"):
        hvd.load_model(tmp_path / "model.keras", legacy_opts=True)


@pytest.mark.parametrize("kind", [Registered, Unregistered])
def test_optimizers_of_ones_own(tmp_path, kind):
    model = build("float32")
    train(model, hvd.DistributedOptimizer(kind(0.1, momentum=0.5)), 1)
    model.save(tmp_path / "model.keras")
    custom = [kind] if kind is Unregistered else None
    found = hvd.load_model(tmp_path / "model.keras", custom_optimizers=custom).optimizer
    assert isinstance(found, kind)
    assert distribution_of(found) is not None
    assert_same_state(found, model.optimizer)


def test_a_loss_scale_around_it(tmp_path):
    model = build("float32")
    inner = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.5))
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    train(model, outer, 2)
    model.save(tmp_path / "model.keras")
    plain = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert type(plain.inner_optimizer) is keras.optimizers.SGD
    found = hvd.load_model(tmp_path / "model.keras").optimizer
    assert type(found) is keras.optimizers.LossScaleOptimizer
    assert distribution_of(found) is not None
    assert_same_state(found, outer)


def test_weights_alone(trained, tmp_path):
    path = Path(hvd.broadcast_object(str(tmp_path))) / "model.weights.h5"
    if RANK == 0:
        trained.save_weights(path)
    hvd.allgather_object(None)  # until rank 0 has
    model = build("float32", seed=RANK + 1)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.5)), "mse")
    model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    assert_same(model, trained)
    assert_same_state(model.optimizer, trained.optimizer)


def test_a_clone_takes_a_copy_of_the_optimizer(trained):
    model = keras.models.clone_model(trained)
    model.set_weights(trained.get_weights())
    optimizer = type(trained.optimizer).from_config(trained.optimizer.get_config())
    train(model, optimizer, 2)
    assert_identical(model.weights)


def test_the_older_format(tmp_path):
    """Of which Keras 3 reads no more of an optimizer than its kind and its number of steps."""
    model = build("float32")
    train(model, hvd.DistributedOptimizer(keras.optimizers.Adam()), 1)
    model.save(tmp_path / "model.h5")
    loss = {"mse": keras.losses.mean_squared_error}  # which Keras does not find by itself
    plain = keras.models.load_model(tmp_path / "model.h5", loss).optimizer
    assert type(plain) is keras.optimizers.Adam
    found = hvd.load_model(tmp_path / "model.h5", custom_objects=loss).optimizer
    assert distribution_of(found) is not None
    assert_same_state(found, plain)
