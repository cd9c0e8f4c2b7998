"""DistributedGradientTape: training equals one process with all the data, however it is asked."""

import contextlib

import numpy as np
import pytest
from adasum_oracle import adasum

import hvdkit as core
from hvdkit.engine.reducer import GradientReducer

tf = pytest.importorskip("tensorflow")

import keras  # noqa: E402  (TensorFlow may be missing)
from tensorflow_training import (  # noqa: E402
    OPTIMIZERS,
    Dense,
    Embedded,
    assert_identical,
    assert_same,
    batch_of,
    mine,
    train,
    whole,
)

import hvdkit.tensorflow as hvd  # noqa: E402

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")


def compare(kind=Dense, tolerance=1e-9, graph=True, optimizer="sgd", **how):
    """Train with a distributed tape and by one process; return the models."""
    ours, reference = kind(), kind()
    train(
        ours,
        OPTIMIZERS[optimizer](),
        mine,
        graph=graph,
        tape=lambda tape: hvd.DistributedGradientTape(tape, **how),
    )
    train(reference, OPTIMIZERS[optimizer](), whole, graph=True)
    assert_identical(ours)
    assert_same(ours, reference, tolerance)
    return ours, reference


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", [Dense, Embedded], ids=["dense", "slices"])
def test_training_equals_one_process(kind, optimizer, graph):
    if kind is Embedded and optimizer == "adamw":
        pytest.skip("Keras's AdamW takes no slices")
    compare(kind, optimizer=optimizer, graph=graph)


@several
def test_the_comparison_notices_gradients_that_are_not_averaged():
    alone, reference = Dense(), Dense()
    train(alone, OPTIMIZERS["sgd"](), mine, graph=True)
    train(reference, OPTIMIZERS["sgd"](), whole, graph=True)
    with pytest.raises(AssertionError):
        assert_same(alone, reference, 1e-3)


@pytest.mark.parametrize(
    "how",
    [
        {"gradient_predivide_factor": 4.0},
        {"groups": 2},
        {"sparse_as_dense": True},
        {"process_set": hvd.global_process_set},
    ],
    ids=str,
)
def test_arguments_that_change_nothing(how):
    compare(Embedded, **how)


def test_groups_of_variables():
    model = Dense()
    with tf.GradientTape() as tape:
        loss = model.loss(*mine(batch_of(0)))
    tape = hvd.DistributedGradientTape(tape, groups=[[model.first, model.last]])
    found = tape.gradient(loss, model.trainable_variables)
    with tf.GradientTape() as tape:
        loss = model.loss(*batch_of(0))
    for ours, theirs in zip(found, tape.gradient(loss, model.trainable_variables), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("compression", "tolerance"),
    [
        (hvd.Compression.fp16, 0.01),
        (hvd.Compression.bf16, 0.1),
        (hvd.Compression.int8, 0.1),
    ],
    ids=["fp16", "bf16", "int8"],
)
def test_compression_to_fewer_bits(compression, tolerance):
    compare(Embedded, tolerance, sparse_as_dense=True, compression=compression)


@pytest.mark.parametrize("name", ["topk", "powersgd"])
def test_compression_that_catches_up(name):
    """What is left out comes later: the loss gets where it does without compression."""
    compression = getattr(hvd.Compression, name)({"topk": 0.3, "powersgd": 2}[name])

    def losses(**how):
        model = Dense()
        return train(
            model,
            keras.optimizers.SGD(0.05),
            whole,
            graph=True,
            steps=range(60),
            tape=lambda tape: hvd.DistributedGradientTape(tape, **how),
        )

    plain, compressed = losses(), losses(compression=compression)
    assert np.mean(compressed[-10:]) < 1.5 * np.mean(plain[-10:]) < np.mean(plain[:3])


class Halved:
    """A compressor of one's own, in Horovod's manner."""

    @staticmethod
    def compress(tensor):
        return tf.cast(tensor, tf.float32) / 2, tensor.dtype

    @staticmethod
    def decompress(tensor, ctx):
        return tf.cast(tensor * 2, ctx)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_compressor_of_ones_own(graph):
    compare(Embedded, 1e-4, graph=graph, compression=Halved)


# Gradients of each kind


def gradient_of(function, variables, *, graph=True, **how):
    """Return the distributed gradient of ``function()``."""

    def step():
        with tf.GradientTape() as tape:
            loss = function()
        return hvd.DistributedGradientTape(tape, **how).gradient(loss, variables)

    return (tf.function(step) if graph else step)()


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_gradients_that_some_ranks_do_not_have(graph):
    """None everywhere stays None; None here counts as zeros; slices here and dense there: dense."""
    a, b, c, d = (tf.Variable([1.0, 2.0], name=name) for name in "abcd")
    rows = tf.Variable([[1.0], [2.0]], name="rows")

    def loss():
        total = tf.reduce_sum(a * 2)
        if RANK == SIZE - 1:
            total += tf.reduce_sum(b * 3) + tf.reduce_sum(rows)
            total += tf.reduce_sum(tf.gather(c, [1]))
        elif SIZE > 1:
            total += tf.reduce_sum(tf.gather(rows, [1]))
        return total

    found = gradient_of(loss, [a, b, c, d, rows], graph=graph)
    assert found[3] is None
    np.testing.assert_allclose(found[0], [2, 2])
    np.testing.assert_allclose(found[1], [3 / SIZE] * 2)
    np.testing.assert_allclose(tf.convert_to_tensor(found[2]), [0, 1 / SIZE])
    np.testing.assert_allclose(found[4], [[1 / SIZE], [1]])


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_structures_and_keras_variables(graph):
    layer = keras.layers.Dense(2, kernel_initializer="ones")
    layer.build((None, 3))
    x = tf.ones((1, 3)) * (RANK + 1)
    found = gradient_of(
        lambda: tf.reduce_sum(layer(x)), {"kernel": layer.kernel, "bias": [layer.bias]}, graph=graph
    )
    np.testing.assert_allclose(found["kernel"], np.full((3, 2), (SIZE + 1) / 2))
    np.testing.assert_allclose(found["bias"][0], [1, 1])
    single = gradient_of(lambda: tf.reduce_sum(layer(x)), layer.kernel, graph=graph)
    np.testing.assert_allclose(single, np.full((3, 2), (SIZE + 1) / 2))


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64], ids=str)
def test_dtypes(dtype):
    v = tf.Variable([1, 2, 3], dtype=dtype)
    w = tf.Variable(2.0)
    found = gradient_of(lambda: tf.reduce_sum(tf.cast(v, tf.float32)) * w * float(RANK + 1), [v, w])
    assert found[0].dtype == dtype
    np.testing.assert_allclose(np.float32(found[0]), [SIZE + 1] * 3)
    np.testing.assert_allclose(found[1], 3 * (SIZE + 1))


def test_sum_and_adasum():
    v = tf.Variable([1.0, 2.0, 3.0])
    mine_of = [np.array([1.0 + rank, 2.0, 3.0 - rank]) for rank in range(SIZE)]
    loss = tf.function(lambda: tf.reduce_sum(v * tf.constant(mine_of[RANK], tf.float32)))
    np.testing.assert_allclose(gradient_of(loss, [v], op=hvd.Sum)[0], sum(mine_of), rtol=1e-6)
    found = gradient_of(loss, [v], op=hvd.Adasum)[0]
    np.testing.assert_allclose(found, adasum(mine_of), rtol=1e-5)


@several
def test_a_process_set():
    everybody_but_the_last = hvd.add_process_set(range(SIZE - 1))
    v = tf.Variable([1.0])
    found = gradient_of(lambda: v * float(RANK), [v], process_set=everybody_but_the_last)
    np.testing.assert_allclose(found[0], [SIZE - 1 if RANK == SIZE - 1 else (SIZE - 2) / 2])
    hvd.remove_process_set(everybody_but_the_last)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("scaled", [False, True])
def test_local_layers(scaled, graph):
    here, everywhere = keras.layers.Dense(1), keras.layers.Dense(1)
    here.build((None, 1))
    everywhere.build((None, 1))
    x = tf.constant([[RANK + 1.0]])
    sources = [here.kernel, everywhere.kernel]

    def step():
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_sum(here(x) + everywhere(x))
        tape = hvd.PartialDistributedGradientTape(
            tape, local_layers=here, scale_local_gradients=scaled
        )
        local, common = tape.get_local_and_global_gradients(loss, sources)
        assert [pair[0] is source for pair, source in zip(local + common, sources, strict=True)]
        return local[0][1], common[0][1]

    local, common = (tf.function(step) if graph else step)()
    np.testing.assert_allclose(local, [[(RANK + 1) / (SIZE if scaled else 1)]])
    np.testing.assert_allclose(common, [[(SIZE + 1) / 2]])


# Order, overlap, and what outlives a step


@several
def test_buckets_travel_while_backward_runs(monkeypatch):
    """The last layer's bucket is full before backward has come to the first layer."""
    seen = []
    ready = GradientReducer.ready

    def noting(reducer, index):
        seen.append(reducer.gradients[index].name)
        ready(reducer, index)

    monkeypatch.setattr(GradientReducer, "ready", noting)

    @tf.custom_gradient
    def first(y):
        def backward(gradient):
            def note(gradient):
                seen.append("backward")
                return gradient

            noted = tf.py_function(note, [gradient], gradient.dtype)
            return tf.ensure_shape(noted, gradient.shape)

        return tf.identity(y), backward

    weights = [tf.Variable(tf.ones((1000, 1000)) / 1000, name=f"w{i}") for i in range(12)]
    x = tf.ones((200, 1000))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            y = first(x @ weights[0])
            for weight in weights[1:]:
                y = tf.tanh(y @ weight)
            loss = tf.reduce_mean(y)
        groups = [[weight] for weight in weights]
        return hvd.DistributedGradientTape(tape, groups=groups).gradient(loss, weights)

    overlapped = []
    for _ in range(5):
        seen.clear()
        assert all(np.isfinite(gradient).all() for gradient in step())
        order = [name for name in seen if name != "backward"]
        assert order == [f"w{i}:0" for i in reversed(range(12))]
        overlapped.append(seen.index("w11:0") < seen.index("backward") < seen.index("w0:0"))
    assert any(overlapped)  # not in all: threads come late on a busy machine


def test_results_do_not_change_afterwards():
    v = tf.Variable(np.ones(1000, np.float32))
    first = gradient_of(lambda: tf.reduce_sum(v) * 1.0, [v], graph=False)[0]
    gradient_of(lambda: tf.reduce_sum(v) * 5.0, [v], graph=False)
    np.testing.assert_array_equal(first, np.ones(1000))


def test_a_step_that_another_op_ends():
    """All ranks lose the step in the middle; the next one is whole."""
    v, w = tf.Variable([1.0]), tf.Variable([1.0], dtype=tf.float64)

    @tf.function
    def step(fails):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(v) * float(RANK + 1)
            loss += tf.cast(tf.reduce_sum(w), tf.float32)
        gradients = hvd.DistributedGradientTape(tape).gradient(loss, [v, w])
        with tf.control_dependencies([tf.debugging.Assert(not fails, [0])]):
            return [tf.identity(gradient) for gradient in gradients]

    for fails in (False, True, False):
        expectation = contextlib.nullcontext()
        if fails:
            expectation = pytest.raises(tf.errors.InvalidArgumentError)
        with expectation:
            found = step(tf.constant(fails))
    np.testing.assert_allclose(found[0], [(SIZE + 1) / 2])
    hvd.barrier()


def test_a_tape_that_is_made_anew_each_step_keeps_its_buckets():
    v = tf.Variable(np.ones(5, np.float32))
    for op in (hvd.Average, hvd.Average, hvd.Average):
        gradient_of(lambda: tf.reduce_sum(v), [v], graph=False, op=op)
    channels = len(core.api.context().channels.open)
    for _ in range(3):
        gradient_of(
            lambda: tf.reduce_sum(v), [v], graph=False, compression=hvd.Compression.topk(0.5)
        )
    assert len(core.api.context().channels.open) <= channels + 1


# Mistakes


@several
def test_models_that_differ_are_an_error_on_every_rank():
    v = tf.Variable(np.ones(3 if RANK else 4, np.float32), name="odd")
    with pytest.raises(hvd.MismatchError, match="odd"):
        gradient_of(lambda: tf.reduce_sum(v), [v], graph=False)
    variables = [tf.Variable([1.0]) for _ in range(1 + (RANK == 0))]
    with pytest.raises(hvd.MismatchError, match="2 gradients"):
        gradient_of(lambda: sum(map(tf.reduce_sum, variables)), variables, graph=False)


@several
def test_xla_is_refused():
    v = tf.Variable([1.0])

    @tf.function(jit_compile=True)
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(v)
        return hvd.DistributedGradientTape(tape).gradient(loss, [v])

    with pytest.raises(Exception, match="jit_compile"):
        step()


def test_arguments():
    for how, message in (
        ({"op": hvd.Max}, "not Max"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, "predivide"),
        ({"groups": 0}, "1 or more"),
        ({"groups": [["weight"]]}, "lists of variables"),
        ({"compression": "fp16"}, "no compressor"),
    ):
        with pytest.raises(hvd.ArgumentError, match=message):
            hvd.DistributedGradientTape(tf.GradientTape(), **how)
    with pytest.raises(hvd.ArgumentError, match="layers"):
        hvd.PartialDistributedGradientTape(tf.GradientTape(), local_layers=[3])


# tf.compat.v1.train


def test_an_optimizer_of_tensorflow_1():
    v = tf.Variable([1.0, 2.0])
    optimizer = hvd.DistributedOptimizer(tf.compat.v1.train.GradientDescentOptimizer(0.5))
    optimizer.minimize(lambda: tf.reduce_sum(v) * (RANK + 1), var_list=[v])
    np.testing.assert_allclose(v, np.array([1, 2]) - 0.5 * (SIZE + 1) / 2)
    with pytest.raises(hvd.ArgumentError, match="already"):
        hvd.DistributedOptimizer(optimizer)
    with pytest.raises(hvd.UnsupportedError, match="Keras"):
        hvd.DistributedOptimizer(
            tf.compat.v1.train.GradientDescentOptimizer(0.5), backward_passes_per_step=2
        )


@several
def test_a_gradient_of_unknown_shape_is_refused():
    @tf.function(input_signature=[tf.TensorSpec(None)], autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(x * x)
        return hvd.DistributedGradientTape(tape).gradient(y, x)

    with pytest.raises(hvd.UnsupportedError, match="<unknown>: buckets need"):
        step(tf.ones(3))
