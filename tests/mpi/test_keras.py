"""`hvdkit.keras.DistributedOptimizer`: as one process with the whole batch, however called."""

import pytest

pytest.importorskip("tensorflow")

import keras
import numpy as np
import tensorflow as tf
from adasum_oracle import adasum
from keras_training import (
    RANK,
    SIZE,
    assert_identical,
    assert_same,
    build,
    data,
    fit,
    fit_eagerly,
    float64,  # noqa: F401  (a fixture)
    gradients_of,
    loop,
    loop_eagerly,
    train_on_batch,
)

import hvdkit.keras as hvd
from hvdkit.keras import patches

sgd = keras.optimizers.SGD

OPTIMIZERS = {
    "SGD": lambda: sgd(0.05, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.02),
    "AdamW": lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1),
}
_references = {}


def reference(name):
    """Return the model that one process has trained on whole batches."""
    if name not in _references:
        _references[name] = build()
        fit(_references[name], OPTIMIZERS[name](), data())
    return _references[name]


@pytest.mark.parametrize(
    ("name", "train"),
    [
        *(("SGD", how) for how in (fit, fit_eagerly, train_on_batch, loop, loop_eagerly)),
        ("Adam", fit),
        ("Adam", loop),
        ("AdamW", train_on_batch),
        ("AdamW", loop_eagerly),
    ],
)
def test_as_one_process_with_the_whole_batch(name, train):
    model, start = build(), build()
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS[name]())
    train(model, optimizer, data(rank=RANK))
    assert_identical(model.weights + optimizer.variables)
    assert_same(model, reference(name))
    assert not np.allclose(model.get_weights()[0], start.get_weights()[0], atol=1e-2)
    assert int(optimizer.iterations) == 20


@pytest.mark.skipif(SIZE == 1, reason="one rank's data are all there are")
def test_without_it_ranks_part():
    """So the test above would notice gradients that are not averaged."""
    model = build()
    fit(model, OPTIMIZERS["SGD"](), data(rank=RANK))
    kernels = hvd.allgather_object(model.get_weights()[1])
    assert not np.allclose(kernels[0], kernels[1], atol=1e-2)
    assert not np.allclose(model.get_weights()[1], reference("SGD").get_weights()[1], atol=1e-2)


def test_reduced_exactly_once_in_an_overridden_train_step():
    """A sum that were made twice would be too large by the number of ranks."""

    class Model(keras.Sequential):
        def train_step(self, batch):
            x, y = batch
            gradients = gradients_of(self, x, y)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": tf.constant(0.0)}

    model, plain = Model(build().layers), build()
    x, y = data(rank=RANK)
    optimizer = hvd.DistributedOptimizer(sgd(0.02 / SIZE), op=hvd.Sum)
    fit(model, optimizer, (x, y), compiled={"steps_per_execution": 5})
    fit(plain, sgd(0.02), data())
    assert_same(model, plain)
    assert_identical(model.weights)


def gradients_for(optimizer, variables, factor):
    """Give an optimizer two steps of gradients, which are `factor` times the same on all ranks."""
    for step in (1, 2):
        values = [tf.cos(tf.cast(tf.range(tf.size(v)), v.dtype) * step) for v in variables]
        gradients = [
            tf.reshape(g, v.shape) * factor for g, v in zip(values, variables, strict=True)
        ]
        optimizer.apply_gradients(zip(gradients, variables, strict=True))


def built_in():
    """Return all classes of optimizers that Keras has."""
    wrappers = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer"}
    return sorted(
        name
        for name, kind in vars(keras.optimizers).items()
        if isinstance(kind, type)
        and issubclass(kind, keras.optimizers.Optimizer)
        and name not in wrappers
    )


@pytest.mark.parametrize("name", built_in())
def test_every_optimizer(name):
    """Ranks' gradients 0, 2, 4 ... times the same average to p - 1 times it."""
    make = getattr(keras.optimizers, name)
    results = []
    for factor, wrap in ((2.0 * RANK, hvd.DistributedOptimizer), (SIZE - 1.0, lambda o: o)):
        variables = [keras.Variable(np.ones(shape), dtype="float64") for shape in ((3, 4), (5,))]
        optimizer = wrap(make(learning_rate=0.1))
        assert isinstance(optimizer, make)
        assert type(optimizer).__name__ == name
        gradients_for(optimizer, variables, factor)
        results.append([variable.numpy() for variable in variables])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    if SIZE > 1:
        assert not np.allclose(results[0][0], 1.0)


def test_several_optimizers_in_one():
    layers = {"dense": sgd(0.1)}
    optimizers = keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.1), layers)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.MultiOptimizer(optimizers))
    variables = [keras.Variable(np.ones(3), name=name) for name in ("dense", "other")]
    gradients_for(optimizer, variables, 2.0 * RANK)
    assert_identical(variables)


@pytest.mark.parametrize(
    "how",
    [
        {"clipnorm": 0.1},
        {"global_clipnorm": 0.1},
        {"clipvalue": 0.01},
        {"use_ema": True, "ema_overwrite_frequency": 3},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda how: next(iter(how)),
)
def test_what_keras_does_with_gradients_it_does_with_averages(how):
    model, plain = build(), build()
    loop_eagerly(model, hvd.DistributedOptimizer(sgd(0.1, **how)), data(6, rank=RANK))
    loop_eagerly(plain, sgd(0.1, **how), data(6))
    assert_same(model, plain)


def test_an_optimizer_that_is_built_and_used_keeps_its_state():
    model, plain = build(), build()
    optimizer, other = (keras.optimizers.Adam(0.02) for _ in range(2))
    loop_eagerly(model, optimizer, data(4))
    loop_eagerly(plain, other, data(4))
    assert hvd.DistributedOptimizer(optimizer) is optimizer
    loop(model, optimizer, data(rank=RANK))
    loop(plain, other, data())
    assert_same(model, plain)
    assert int(optimizer.iterations) == 24


def test_a_copy_by_config_is_distributed_as_well():
    optimizer = hvd.DistributedOptimizer(sgd(0.05, momentum=0.9))
    model = build()
    loop_eagerly(model, type(optimizer).from_config(optimizer.get_config()), data(rank=RANK))
    assert_same(model, reference("SGD"))


@pytest.mark.parametrize("wrap", [tf.function, lambda step: step], ids=["graph", "eager"])
@pytest.mark.parametrize("mean", [True, False])
def test_several_backward_passes(wrap, mean):
    """As one process with batches of two steps each; Adam sees as many steps, too."""
    model, plain = build(), build()
    make = keras.optimizers.Adam if mean else sgd
    optimizer = hvd.DistributedOptimizer(
        make(0.02), backward_passes_per_step=2, average_aggregated_gradients=mean
    )
    other = make(0.02 if mean else 0.04)
    loop(model, optimizer, data(rank=RANK), wrap)
    for (x, y), (more_x, more_y) in zip(*[zip(*data(), strict=True)] * 2, strict=True):
        gradients = gradients_of(plain, np.concatenate([x, more_x]), np.concatenate([y, more_y]))
        # Keras's Adam squares each of several slices of a row; a sum of passes has one.
        dense = map(tf.convert_to_tensor, gradients)
        other.apply_gradients(zip(dense, plain.trainable_variables, strict=True))
    assert_same(model, plain)
    assert len(optimizer.variables) == len(other.variables)
    assert int(optimizer.iterations) == int(other.iterations) == 10


def test_several_backward_passes_in_fit():
    model = build()
    optimizer = hvd.DistributedOptimizer(sgd(0.02), backward_passes_per_step=3)
    before = model.get_weights()
    fit(model, optimizer, data(2, rank=RANK))
    assert all(map(np.array_equal, before, model.get_weights()))
    fit(model, optimizer, data(1, rank=RANK))
    assert not np.allclose(before[1], model.get_weights()[1])
    assert_identical(model.weights)


def test_a_gradient_that_some_ranks_do_not_have_counts_as_zeros():
    first, second = (keras.Variable(np.zeros(2)) for _ in range(2))
    optimizer = hvd.DistributedOptimizer(sgd(1.0))
    gradient = tf.ones(2, tf.float64)
    optimizer.apply([gradient, gradient if RANK == 0 else None], [first, second])
    np.testing.assert_allclose(first.numpy(), -1.0)
    np.testing.assert_allclose(second.numpy(), -1.0 / SIZE)


@pytest.mark.parametrize("wrap", [tf.function, lambda step: step], ids=["graph", "eager"])
def test_adasum_combines_steps(wrap):
    """Of momentum SGD, whose steps are not its gradients."""
    optimizer = hvd.DistributedOptimizer(sgd(0.1, momentum=0.5), op=hvd.Adasum)
    variable = keras.Variable(np.ones(3))
    optimizer.build([variable])
    each = [np.cos(np.arange(3.0) + rank) for rank in range(SIZE)]
    step = wrap(lambda: optimizer.apply([tf.constant(each[RANK])]))
    where, velocities = np.ones(3), np.zeros((SIZE, 3))
    for _ in range(3):
        step()
        velocities = 0.5 * velocities - 0.1 * np.array(each)
        where = where + adasum(list(velocities))
        np.testing.assert_allclose(variable.numpy(), where, rtol=1e-9)


def test_partial():
    """The first layer's gradients are each rank's own, divided by the number of ranks."""
    model, whole, own = build(), build(), build()
    layer = model.layers[0]
    optimizer = hvd.PartialDistributedOptimizer(sgd(0.1), local_layers=layer)
    optimizer.register_local_var(model.weights[-1])
    for part, trained in ((data(rank=RANK), model), (data(), whole), (data(rank=RANK), own)):
        x, y = part[0][0], part[1][0]
        update = optimizer if trained is model else sgd(0.1)
        gradients = gradients_of(trained, x, y)
        update.apply_gradients(zip(gradients, trained.trainable_variables, strict=True))
    start = build().get_weights()
    for place, weight in enumerate(model.get_weights()):
        local = place in (0, len(start) - 1)
        step = (own if local else whole).get_weights()[place] - start[place]
        wanted = start[place] + step / (SIZE if local else 1)
        np.testing.assert_allclose(weight, wanted, rtol=1e-9, atol=1e-9)
    unscaled = hvd.PartialDistributedOptimizer(
        sgd(1.0), local_layers=[], scale_local_gradients=False
    )
    variable = keras.Variable(np.zeros(2))
    unscaled.register_local_var(variable)
    unscaled.apply([tf.fill([2], 1.0 + RANK)], [variable])
    np.testing.assert_allclose(variable.numpy(), -1.0 - RANK)


@pytest.mark.skipif(SIZE == 1, reason="there is but one set of ranks")
def test_a_process_set():
    among = hvd.add_process_set([0])
    variable = keras.Variable(np.zeros(2))
    optimizer = hvd.DistributedOptimizer(sgd(1.0), process_set=among)
    optimizer.apply([tf.fill([2], 1.0 + RANK)], [variable])
    np.testing.assert_allclose(variable.numpy(), -1.0 - RANK)
    hvd.remove_process_set(among)


@pytest.mark.parametrize("how", ["outside", "inside", "by policy"])
def test_loss_scale(how):
    """One rank's gradient that is not finite makes all skip the step, and halve the scale."""
    model, plain = build(), build()
    if how == "outside":
        optimizer = hvd.DistributedOptimizer(
            keras.optimizers.LossScaleOptimizer(sgd(0.1), initial_scale=8.0)
        )
    else:
        optimizer = hvd.DistributedOptimizer(sgd(0.1))
        if how == "inside":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)
        else:
            model = keras.Sequential(build().layers)
            model.dtype_policy = keras.DTypePolicy("mixed_float16")
            model.compile(optimizer, "mse")
            optimizer = model.optimizer
            optimizer.initial_scale = 8.0
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    weights = model.trainable_variables

    @tf.function
    def step(x, y, broken):
        gradients = gradients_of(model, x, y, optimizer.scale_loss)
        gradients[1] += tf.where(broken, tf.constant(np.inf, tf.float64), 0.0)
        optimizer.apply_gradients(zip(gradients, weights, strict=True))

    optimizer.build(weights)
    other = sgd(0.1)
    mine, whole = (list(zip(*data(4, rank=rank), strict=True)) for rank in (RANK, None))
    for number in range(4):
        broken = number == 1
        step(*map(tf.constant, mine[number]), tf.constant(broken and RANK == SIZE - 1))
        if not broken:
            gradients = gradients_of(plain, *whole[number])
            other.apply_gradients(zip(gradients, plain.trainable_variables, strict=True))
        assert float(optimizer.dynamic_scale) == (8.0 if number < 1 else 4.0)
    assert_same(model, plain)
    assert_identical(model.weights)


def test_loss_scale_and_several_passes():
    model, plain = build(), build()
    inner = hvd.DistributedOptimizer(sgd(0.1), backward_passes_per_step=2)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    other = sgd(0.2)
    mine, whole = (list(zip(*data(4, rank=rank), strict=True)) for rank in (RANK, None))
    for x, y in mine[:2]:
        gradients = [g * 8.0 for g in map(tf.convert_to_tensor, gradients_of(model, x, y))]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    batch = [np.concatenate(pair) for pair in zip(*whole[:2], strict=True)]
    gradients = gradients_of(plain, *batch)
    other.apply_gradients(zip(gradients, plain.trainable_variables, strict=True))
    assert_same(model, plain)


def test_a_loss_scale_of_others_is_left_alone():
    hvd.DistributedOptimizer(sgd(0.1))
    optimizer = keras.optimizers.LossScaleOptimizer(sgd(1.0), initial_scale=2.0)
    variable = keras.Variable(np.zeros(2))
    optimizer.apply([tf.fill([2], 2.0 * RANK)], [variable])
    np.testing.assert_allclose(variable.numpy(), -1.0 * RANK)


def test_jit_compile_is_switched_off_with_one_warning(monkeypatch, recwarn):
    monkeypatch.setattr(patches, "_warned", [])
    model, plain = build(), build()
    for _ in range(2):
        optimizer = hvd.DistributedOptimizer(sgd(0.05, momentum=0.9))
        model.set_weights(build().get_weights())
        fit(model, optimizer, data(2, rank=RANK), compiled={"jit_compile": True})
    said = [str(warning.message) for warning in recwarn if "jit_compile" in str(warning.message)]
    assert len(said) == (1 if SIZE > 1 and RANK == 0 else 0)
    assert model.jit_compile is (SIZE == 1)
    plain.compile(sgd(0.05, momentum=0.9), "mse", jit_compile=True)
    assert plain.jit_compile is True
    fit(plain, sgd(0.05, momentum=0.9), data(2))
    assert_same(model, plain)


@pytest.mark.skipif(SIZE == 1, reason="there is nothing to communicate")
def test_xla_in_a_loop_of_ones_own_is_refused():
    variable = keras.Variable(np.zeros(2))
    optimizer = hvd.DistributedOptimizer(sgd(0.1))
    optimizer.build([variable])

    @tf.function(jit_compile=True)
    def step():
        optimizer.apply([tf.ones(2)])

    with pytest.raises(hvd.UnsupportedError, match="jit_compile"):
        step()


def test_compression_groups_and_predivide():
    for how in (
        {"compression": hvd.Compression.fp16},
        {"sparse_as_dense": True},
        {"groups": 2},
        {"gradient_predivide_factor": 2.0},
    ):
        model, plain = build(), build()
        optimizer = hvd.DistributedOptimizer(sgd(0.1), **how)
        loop_eagerly(model, optimizer, data(4, rank=RANK))
        loop_eagerly(plain, sgd(0.1), data(4))
        assert_identical(model.weights)
        assert_same(model, plain, 1e-2 if "compression" in how else 1e-9)


def test_refusals(monkeypatch):
    optimizer = hvd.DistributedOptimizer(sgd())
    for again in (optimizer, keras.optimizers.LossScaleOptimizer(optimizer)):
        with pytest.raises(hvd.ArgumentError, match="already"):
            hvd.DistributedOptimizer(again)
    with pytest.raises(hvd.ArgumentError, match="an optimizer of Keras"):
        hvd.DistributedOptimizer("sgd")
    with pytest.raises(hvd.UnsupportedError, match="use_ema"):
        hvd.DistributedOptimizer(sgd(use_ema=True), op=hvd.Adasum)
    scaled = keras.optimizers.LossScaleOptimizer(sgd())
    with pytest.raises(hvd.UnsupportedError, match="scale losses"):
        hvd.DistributedOptimizer(scaled, op=hvd.Adasum)
    outer = keras.optimizers.LossScaleOptimizer(hvd.DistributedOptimizer(sgd(), op=hvd.Adasum))
    with pytest.raises(hvd.UnsupportedError, match="LossScaleOptimizer"):
        outer.apply([tf.ones(2)], [keras.Variable(np.zeros(2))])
    with pytest.raises(hvd.ArgumentError, match="backward_passes_per_step"):
        hvd.DistributedOptimizer(sgd(), backward_passes_per_step=0)
    with pytest.raises(hvd.ArgumentError, match="gradient_accumulation_steps"):
        hvd.DistributedOptimizer(sgd(gradient_accumulation_steps=2), backward_passes_per_step=2)
    with pytest.raises(hvd.ArgumentError, match="local_layers"):
        hvd.PartialDistributedOptimizer(sgd(), local_layers="dense")
    with pytest.warns(DeprecationWarning, match="num_groups"):
        hvd.DistributedOptimizer(sgd(), num_groups=2)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(hvd.UnsupportedError, match=r"'jax'.*KERAS_BACKEND=tensorflow"):
        hvd.DistributedOptimizer(sgd())
