"""SyncBatchNormalization on each rank's rows equals Keras's BatchNormalization on all of them."""

import itertools

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

import hvdkit.tensorflow as hvd  # noqa: E402  (TensorFlow may be missing)
from hvdkit.tensorflow.sync_batch_norm import SyncBatchNormalization  # noqa: E402

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")
modes = pytest.mark.parametrize("mode", ["eager", "graph", "unknown rows"])

CHANNELS = 5
#: Dimensions between rows and channels.
INNER = {"2d": (), "3d": (7,), "4d": (4, 3)}
ROWS = {
    "even": [4] * SIZE,
    "uneven": [2 + 3 * rank for rank in range(SIZE)],
    "one row on rank 0": [1] + [5] * (SIZE - 1) if SIZE > 1 else [3],
    "none on the last rank": [6] * (SIZE - 1) + [0] if SIZE > 1 else [6],
}
#: Allowed errors; the input gradients of float32 are differences of rounded terms.
TOLERANCE = {
    "float64": {"rtol": 1e-10, "atol": 1e-11},
    "float32": {"rtol": 2e-4, "atol": 2e-5},
}


def part_of(rows):
    """Return this rank's slice of the joined batch."""
    ends = list(itertools.accumulate(rows))
    return slice(ends[RANK] - rows[RANK], ends[RANK])


def draw(step, rows, inner, dtype="float64"):
    """Return a joined batch and its output's gradient, different in mean and spread by row."""
    rng = np.random.default_rng(step)
    shape = (sum(rows), *inner, CHANNELS)
    row = np.arange(sum(rows)).reshape(-1, *[1] * (len(shape) - 1))
    x = rng.standard_normal(shape) * (1 + row % 3) + row
    gradient = rng.standard_normal(shape) + 0.5 * x + 1
    return tf.constant(x.astype(dtype)), tf.constant(gradient.astype(dtype))


def pair(shape, dtype="float64", **options):
    """Return a SyncBatchNormalization and the BatchNormalization that it must equal, built."""
    rng = np.random.default_rng(1)
    layers = []
    for kind in (SyncBatchNormalization, keras.layers.BatchNormalization):
        layers.append(kind(momentum=0.7, dtype=dtype, **options))
        layers[-1].build(shape)
    for ours, theirs in zip(*(layer.trainable_variables for layer in layers), strict=True):
        ours.assign(rng.standard_normal(ours.shape))
        theirs.assign(ours)
    return layers


def step_of(layer, mode, x):
    """Return what computes outputs and gradients, of the inputs and then of the variables."""

    def step(x, gradient, mask=None):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
            loss = tf.reduce_sum(y * gradient)
        return y, tape.gradient(loss, [x, *layer.trainable_variables])

    if mode == "eager":
        return step
    if mode == "graph":
        return tf.function(step)
    spec = tf.TensorSpec([None, *x.shape[1:]], x.dtype)
    return tf.function(step, input_signature=[spec, spec])


def assert_step_equals(layers, x, gradient, rows, mode="eager", masks=(None, None)):
    """Forward and backward, here on this rank's rows and there on all: compare everything."""
    ours, whole = layers
    part, close = part_of(rows), TOLERANCE[x.dtype.name]
    extra = [[] if mask is None else [mask] for mask in masks]
    y, found = step_of(ours, mode, x)(x[part], gradient[part], *extra[0])
    wanted_y, wanted = step_of(whole, mode, x)(x, gradient, *extra[1])
    np.testing.assert_allclose(y, wanted_y[part], **close)
    np.testing.assert_allclose(found[0], wanted[0][part], **close)
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(hvd.allreduce(mine, op=hvd.Sum), theirs, **close)
    for mine, theirs in zip(ours.variables, whole.variables, strict=True):
        np.testing.assert_allclose(mine, theirs, **close)
        everyone = hvd.allgather(tf.convert_to_tensor(mine)[None])
        assert np.array_equal(everyone, np.stack([mine.numpy()] * SIZE))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", INNER)
def test_steps_equal_batch_normalization_on_the_joined_batch(kind, dtype, rows):
    layers = pair((None, *INNER[kind], CHANNELS), dtype)
    for step in range(3):
        assert_step_equals(layers, *draw(step, rows, INNER[kind], dtype), rows)
    x, _ = draw(9, rows, INNER[kind], dtype)
    ours, whole = (layer(x, training=False) for layer in layers)
    np.testing.assert_allclose(ours, whole, **TOLERANCE[dtype])


@modes
def test_in_graphs(mode):
    rows = ROWS["uneven"]
    layers = pair((None, 7, CHANNELS))
    for step in range(2):
        assert_step_equals(layers, *draw(step, rows, (7,)), rows, mode)


@pytest.mark.parametrize(
    "options",
    [
        {"center": False},
        {"scale": False, "epsilon": 0.5},
        {"center": False, "scale": False},
        {"renorm": True, "renorm_clipping": {"rmax": 2.0, "rmin": 0.5, "dmax": 1.0}},
    ],
    ids=str,
)
def test_options(options):
    rows = ROWS["uneven"]
    layers = pair((None, 4, CHANNELS), **options)
    for step in range(3):
        assert_step_equals(layers, *draw(step, rows, (4,)), rows, "graph")


@pytest.mark.parametrize("axis", [1, 2, -2])
def test_channels_elsewhere(axis):
    rows = ROWS["uneven"]
    layers = pair((None, 4, 3, CHANNELS), axis=axis)
    assert_step_equals(layers, *draw(0, rows, (4, 3)), rows, "graph")


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_masks(axis, mode):
    """Of the last rank nothing counts; what does not count may be no number at all."""
    rows = ROWS["uneven"]
    layers = pair((None, 6, CHANNELS), axis=axis)
    x, gradient = draw(0, rows, (6,))
    mask = np.random.default_rng(0).random((sum(rows), 6)) < 0.6
    mask[0] = True
    if SIZE > 1:
        mask[-rows[-1] :] = False
    # Keras divides by the number of values plus 1e-7.
    close = {"rtol": 1e-6, "atol": 1e-6}
    part = part_of(rows)
    y, found = step_of(layers[0], mode, x)(x[part], gradient[part], tf.constant(mask[part]))
    wanted_y, wanted = step_of(layers[1], mode, x)(x, gradient, tf.constant(mask))
    np.testing.assert_allclose(y, wanted_y[part], **close)
    np.testing.assert_allclose(found[0], wanted[0][part], **close)
    for mine, theirs in zip(layers[0].variables, layers[1].variables, strict=True):
        np.testing.assert_allclose(mine, theirs, **close)

    holes = tf.where(mask[..., None], x, np.nan)[part]
    y, found = step_of(layers[0], mode, x)(holes, gradient[part], tf.constant(mask[part]))
    assert not np.isnan(y.numpy()[mask[part]]).any()
    assert not np.isnan(layers[0].moving_variance.numpy()).any()


def test_inference_is_local():
    layers = pair((None, CHANNELS))
    frozen = pair((None, CHANNELS))
    for layer in frozen:
        layer.trainable = False
    if RANK == 0:  # would wait for the others, were it collective
        x, _ = draw(0, [3], ())
        assert np.array_equal(*(layer(x, training=False) for layer in layers))
        assert np.array_equal(*(layer(x, training=True) for layer in frozen))
    hvd.barrier()


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_rounded_once(policy, mode):
    """Against float64 on the same, rounded, inputs."""
    rows, short = ROWS["uneven"], policy.removeprefix("mixed_")
    ours, _ = pair((None, 7, CHANNELS), policy)
    _, whole = pair((None, 7, CHANNELS), "float64")
    for mine, theirs in zip(ours.trainable_variables, whole.trainable_variables, strict=True):
        mine.assign(tf.cast(theirs, "float32"))
        theirs.assign(tf.cast(mine, "float64"))
    x, gradient = (tf.cast(tensor, short) for tensor in draw(0, rows, (7,)))
    part = part_of(rows)
    y, found = step_of(ours, mode, x)(x[part], gradient[part])
    wide = tf.cast(x, "float64"), tf.cast(gradient, "float64")
    wanted_y, wanted = step_of(whole, mode, wide[0])(*wide)
    eps = 2**-10 if short == "float16" else 2**-7
    assert y.dtype == found[0].dtype == short
    assert found[1].dtype == ours.moving_mean.dtype == "float32"

    def close(a, b):
        np.testing.assert_allclose(tf.cast(a, "float64"), b, rtol=2 * eps, atol=1e-5 + eps / 64)

    close(y, wanted_y[part])
    close(found[0], wanted[0][part])
    close(ours.moving_mean, whole.moving_mean)
    close(ours.moving_variance, whole.moving_variance)


@pytest.mark.parametrize("apart", [0.0, 3.0])
def test_a_large_mean_costs_no_more_than_in_batch_normalization(apart):
    """With sums of squares in float32 nothing would be left of a variance of 1 beside 1e8.

    What is left is that a float32 mean near 1e4 is off by some 1e-3, here as in Keras's.
    """
    rows = ROWS["uneven"]
    x, gradient = draw(0, rows, (36,))
    owner = np.repeat(np.arange(SIZE), rows).reshape(-1, 1, 1)
    x -= tf.reduce_mean(x, [1, 2], keepdims=True)
    x = tf.cast(x + 1e4 + apart * owner, "float32")
    ours, single = pair((None, 36, CHANNELS), "float32")
    _, exact = pair((None, 36, CHANNELS), "float64")
    part = part_of(rows)
    results = {}
    for name, layer, dtype, of in (
        ("exact", exact, "float64", slice(None)),
        ("single", single, "float32", slice(None)),
        ("ours", ours, "float32", part),
    ):
        batch = tf.cast(x[of], dtype), tf.cast(gradient[of], dtype)
        y, found = step_of(layer, "eager", batch[0])(*batch)
        kept = part if name != "ours" else slice(None)
        results[name] = y.numpy()[kept], found[0].numpy()[kept]
    for mine, theirs, wanted in zip(
        *(results[n] for n in ("ours", "single", "exact")), strict=True
    ):
        allowed = 4 * np.abs(theirs - wanted).max() + 2e-3
        assert np.abs(mine - wanted).max() <= allowed
    np.testing.assert_allclose(ours.moving_variance, exact.moving_variance, rtol=2e-3)
    np.testing.assert_allclose(ours.moving_mean, exact.moving_mean, rtol=1e-6)


def test_constant_channels_and_batches_that_are_empty_everywhere():
    ours, _ = pair((None, CHANNELS), "float32")
    x = tf.fill([2, CHANNELS], 0.1)
    y, found = step_of(ours, "eager", x)(x, x)
    np.testing.assert_allclose(y, np.stack([ours.beta.numpy()] * 2), atol=1e-4)
    assert np.isfinite(found[0]).all()
    if SIZE > 1:
        none = tf.zeros([0, CHANNELS])
        y, found = step_of(ours, "graph", none)(none, none)
        assert y.shape == found[0].shape == none.shape
        assert np.isfinite(ours.moving_variance.numpy()).all()


def test_second_derivatives():
    """Of a sum over all ranks, as one process has them."""
    rows = ROWS["even"]
    ours, whole = pair((None, CHANNELS))
    x, gradient = draw(0, rows, ())
    part = part_of(rows)

    def twice(layer, x, gradient):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x, training=True) ** 3 * gradient)
            first = inner.gradient(loss, x)
            penalty = tf.reduce_sum(first**2)
        return outer.gradient(penalty, x)

    # Keras's moments leave the mean out of the variance's derivative, right the first time only.
    def moments(x, _mask):
        mean = tf.reduce_mean(x, 0)
        return mean, tf.reduce_mean((x - mean) ** 2, 0)

    whole._moments = moments
    if SIZE == 1:
        ours._moments = moments
    found = twice(ours, x[part], gradient[part])
    np.testing.assert_allclose(found, twice(whole, x, gradient)[part], rtol=1e-8, atol=1e-9)


def network(norm):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 2), dtype="float64"),
            keras.layers.Conv1D(4, 3, dtype="float64"),
            norm(dtype="float64"),
            keras.layers.Activation("tanh", dtype="float64"),
            keras.layers.Flatten(dtype="float64"),
            keras.layers.Dense(3, dtype="float64"),
            norm(dtype="float64"),
        ]
    )


def test_training_equals_one_process():
    model, reference = network(SyncBatchNormalization), network(keras.layers.BatchNormalization)
    ours, theirs = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1)

    def step_for(net, optimizer, reduce):
        @tf.function
        def step(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.sin(net(x, training=True)))
            gradients = reduce(tape.gradient(loss, net.trainable_variables))
            optimizer.apply_gradients(zip(gradients, net.trainable_variables, strict=True))

        return step

    mine = step_for(model, ours, hvd.grouped_allreduce)
    whole = step_for(reference, theirs, list)
    for step in range(6):
        x = np.random.default_rng(step).standard_normal((3 * SIZE, 6, 2))
        mine(tf.constant(x[RANK::SIZE]))
        whole(tf.constant(x))
    for weight, wanted in zip(model.variables, reference.variables, strict=True):
        np.testing.assert_allclose(weight, wanted, rtol=1e-8, atol=1e-10)


def test_keras_chooses_no_xla_and_predicts_alone():
    model = network(SyncBatchNormalization)
    model.compile("sgd", "mse", jit_compile="auto")
    assert not model.jit_compile
    x = np.random.default_rng(RANK).standard_normal((4, 6, 2))
    model.fit(x, np.zeros((4, 3)), batch_size=2, epochs=1, verbose=0)
    statistics = model.layers[1].moving_mean.numpy()
    assert statistics.any()
    assert np.array_equal(hvd.allgather(statistics[None]), np.stack([statistics] * SIZE))
    assert model.predict(x, verbose=0).shape == (4, 3)


def test_saving_and_cloning(tmp_path):
    model = network(SyncBatchNormalization)
    model.layers[1].moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    layer = loaded.layers[1]
    assert type(layer) is SyncBatchNormalization
    assert not layer.supports_jit
    assert layer.process_set is hvd.global_process_set
    x = tf.constant(np.random.default_rng(RANK).standard_normal((2, 6, 2)))
    assert np.array_equal(loaded(x), model(x))
    assert type(keras.models.clone_model(model).layers[1]) is SyncBatchNormalization
    names = [SyncBatchNormalization().name for _ in range(2)]
    assert len(set(names)) == 2
    assert all(name.startswith("sync_batch_normalization") for name in names)


@several
def test_process_sets():
    process_set = hvd.add_process_set(range(1, SIZE))
    layer = SyncBatchNormalization(process_set=process_set, axis=-1, dtype="float64")
    config = layer.get_config()
    assert config["process_set"] == list(range(1, SIZE))
    rows = [0] + [3] * (SIZE - 1)
    x, gradient = draw(0, rows, ())
    layer.build((None, CHANNELS))
    whole = keras.layers.BatchNormalization(dtype="float64")
    whole.build((None, CHANNELS))
    if RANK:
        part = part_of(rows)
        y, found = step_of(layer, "graph", x)(x[part], gradient[part])
        wanted_y, wanted = step_of(whole, "graph", x)(x, gradient)
        np.testing.assert_allclose(y, wanted_y[part], **TOLERANCE["float64"])
        np.testing.assert_allclose(found[0], wanted[0][part], **TOLERANCE["float64"])
    else:
        with pytest.raises(hvd.ArgumentError, match="not in the process set"):
            layer(x, training=True)
    hvd.remove_process_set(process_set)
    again = SyncBatchNormalization.from_config(config)
    assert again.process_set.ranks == list(range(1, SIZE))


def test_mistakes():
    for fused in (True, None):
        with pytest.raises(hvd.UnsupportedError, match="fused"):
            SyncBatchNormalization(fused=fused)
    assert SyncBatchNormalization(fused=False).axis == -1


@several
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_ranks_that_differ_in_channels(mode):
    channels = 3 + (RANK == SIZE - 1)
    layer = SyncBatchNormalization()
    layer.build((None, channels))
    x = tf.zeros((2, channels))
    kind = hvd.MismatchError if mode == "eager" else tf.errors.OpError
    with pytest.raises(kind, match="sync_batch_norm"):
        step_of(layer, mode, x)(x, x)
