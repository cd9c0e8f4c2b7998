"""`PipelineModel`: the losses and the gradients of one process, however the layers are sharded."""

import random

import numpy as np
import pytest

pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras has another backend", allow_module_level=True)

import tensorflow as tf  # noqa: E402  (it may be missing)
from keras import layers as kl  # noqa: E402

import hvdkit.tensorflow as hvd  # noqa: E402
from hvdkit import Mesh  # noqa: E402
from hvdkit.tensorflow.pipeline import PipelineModel, Pop, Stash  # noqa: E402
from hvdkit.tensorflow.pipeline.layers import made, names_of  # noqa: E402

RANK, SIZE = hvd.rank(), hvd.size()
STEPS, ROWS = 5, 10  # which 4 microbatches do not divide

MESHES = [{"pipeline": SIZE}]
if SIZE >= 4 and SIZE % 2 == 0:
    MESHES.append({"data": 2, "pipeline": SIZE // 2})

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)]
CASES = [(axes, *schedule) for axes in MESHES for schedule in SCHEDULES]
if SIZE == 2:
    CASES.append(({"data": 2}, "1f1b", 1))


def dense(units=6, **how):
    return lambda: kl.Dense(units, **({"activation": "tanh", "dtype": "float64"} | how))


def loss_of(target, output):
    return tf.reduce_mean(tf.square(output - target), axis=-1)


def batch_of(step, places=1):
    """Return the batch of a step, of all places along ``data``."""
    x = np.random.default_rng(step).standard_normal((ROWS * places, 5))
    return x, np.sin(x) @ np.ones((5, 3))


INPUT = keras.Input((5,), dtype="float64")
CHAIN = [INPUT, *(dense(5 + i % 3) for i in range(9)), dense(3)]


class Alone:
    """The whole model in one process, which starts with a pipeline's weights."""

    def __init__(self, makers, model, x, loss=loss_of):
        self.layers = [made(make, index, seed=99) for index, make in enumerate(makers)]
        self.loss = loss
        self.forward(x, training=False)
        self.named = {}
        for index, layer in enumerate(self.layers):
            self.named |= names_of(layer, index)
        weights = gathered({name: v.numpy() for name, v in model.named_variables().items()})
        assert weights.keys() == self.named.keys()
        for name, variable in self.named.items():
            variable.assign(weights[name])
        self.variables = list({id(v): v for v in self.named.values() if v.trainable}.values())

    def forward(self, x, training=True):
        stashed = {}
        for layer in self.layers:
            if isinstance(layer, Stash):
                stashed[layer.skip] = x
            if isinstance(layer, Pop):
                x = layer(x, stashed[layer.skip])
            else:
                x = layer(*x) if isinstance(x, tuple) else layer(x, training=training)
        return x

    def step(self, x, y, optimizer=None, max_norm=None):
        """Return the loss, and the gradients by name."""
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self.loss(y, self.forward(x)))
            loss += sum(sum(layer.losses) for layer in self.layers)
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(loss, self.variables)]
        if max_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, max_norm)
        if optimizer:
            optimizer.apply_gradients(zip(gradients, self.variables, strict=True))
        of = {id(v): g.numpy() for v, g in zip(self.variables, gradients, strict=True)}
        return float(loss), {name: of[id(v)] for name, v in self.named.items() if id(v) in of}


def gathered(mine):
    """Return all ranks' parts of a dict."""
    return {name: v for part in hvd.allgather_object(mine) for name, v in part.items()}


def gradients_of(model):
    """Return this rank's gradients by name."""
    of = {
        id(v): None if g is None else g.numpy()
        for v, g in zip(model.trainable_variables, model.gradients, strict=True)
    }
    return {name: of[id(v)] for name, v in model.named_variables().items() if id(v) in of}


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def check_step(model, alone, batch, *, max_norm=None, optimizers=(None, None)):
    """Take a step both ways, and compare the loss and every gradient."""
    places, place = model.mesh.size_of("data"), model.mesh.place("data")
    x, y = (tf.nest.map_structure(lambda a: a[place::places], part) for part in batch)
    loss = model(x, y)
    if max_norm:
        model.clip_by_global_norm(max_norm)
    found = gradients_of(model)
    wanted_loss, wanted = alone.step(*batch, optimizers[1], max_norm)
    assert_close(loss, wanted_loss)
    for name, gradient in found.items():
        assert_close(gradient, wanted[name])
    assert set(gathered(found)) == set(wanted)
    if optimizers[0]:
        model.apply_gradients(optimizers[0])


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


@pytest.mark.parametrize(("axes", "schedule", "chunks"), CASES)
def test_losses_and_gradients_are_those_of_one_process(axes, schedule, chunks):
    mesh = Mesh(**axes)
    model = PipelineModel(CHAIN, loss_of, mesh=mesh, schedule=schedule, chunks=chunks)
    alone = Alone(CHAIN[1:], model, batch_of(0)[0])
    optimizers = sgd(), sgd()
    for step in range(STEPS):
        batch = batch_of(step, mesh.size_of("data"))
        check_step(model, alone, batch, optimizers=optimizers)
    for name, variable in model.named_variables().items():
        assert_close(variable.numpy(), alone.named[name].numpy())
    mine = {name: variable.numpy().tobytes() for name, variable in model.named_variables().items()}
    for theirs in hvd.allgather_object(mine):  # of the replicas to the last bit
        assert all(mine[name] == theirs[name] for name in mine.keys() & theirs.keys())


def test_fewer_rows_than_microbatches_and_the_optimizers_own_call():
    model = PipelineModel(CHAIN, loss_of, microbatches=8)
    alone = Alone(CHAIN[1:], model, batch_of(0)[0])
    optimizers = keras.optimizers.Adam(0.02), keras.optimizers.Adam(0.02)
    for rows in (10, 3, 1):
        x, y = (part[:rows] for part in batch_of(rows))
        check_step(model, alone, (x, y), optimizers=(None, optimizers[1]))
        pairs = zip(model.gradients, model.trainable_variables, strict=True)
        optimizers[0].apply_gradients(pairs)


@pytest.mark.parametrize("axes", MESHES)
def test_evaluate_predict_and_clipping(axes):
    model = PipelineModel(CHAIN, "mse", mesh=Mesh(**axes))
    x, y = batch_of(0)
    alone = Alone(CHAIN[1:], model, x)
    output = alone.forward(x, training=False).numpy()
    assert_close(model.predict(x), output)
    np.testing.assert_allclose(model.evaluate(x, y), ((output - y) ** 2).mean(), rtol=1e-6)
    batch = batch_of(1, model.mesh.size_of("data"))
    _, wanted = alone.step(*batch)
    norm = np.sqrt(sum((gradient**2).sum() for gradient in wanted.values()))
    check_step(model, alone, batch, max_norm=norm / 3)
    place = model.mesh.place("data")
    model(*(part[place :: model.mesh.size_of("data")] for part in batch))
    assert_close(model.clip_by_global_norm(norm / 3), norm)
    assert_close(model.clip_by_global_norm(norm), norm / 3)


def test_weights_follow_from_the_seed_and_nothing_else_does():
    layers = [*CHAIN, kl.Dropout(0.5), kl.Dense(2, dtype="float64")]  # instances too
    state = random.getstate(), np.random.get_state()[1].tolist()
    model = PipelineModel(layers, loss_of, seed=5)
    assert state == (random.getstate(), np.random.get_state()[1].tolist())
    units = [5]
    for index, make in enumerate(CHAIN[1:]):
        keras.utils.set_random_seed(5 + index)
        layer = make()
        layer.build((None, units[-1]))
        units.append(layer.units)
        if index in model.layers:
            assert_close(model.layers[index].kernel.numpy(), layer.kernel.numpy())
    if 11 not in model.layers:
        assert [v._value for v in layers[-1].variables] == [None, None], "no memory elsewhere"
    sizes = [len(theirs) for theirs in hvd.allgather_object(list(model.layers))]
    assert sum(sizes) == 12
    assert min(sizes) >= 1


def random_layers():
    return [
        INPUT,
        dense(),
        lambda: kl.Dropout(0.4, dtype="float64"),
        dense(),
        lambda: kl.BatchNormalization(dtype="float64"),
        dense(kernel_regularizer="l2"),
        lambda: kl.Dropout(0.2, dtype="float64"),
        lambda: kl.ActivityRegularization(0.01, dtype="float64"),
        lambda: kl.GaussianNoise(0.1, dtype="float64"),
        dense(3),
    ]


def test_recomputing_draws_the_same_and_updates_once():
    models = [PipelineModel(random_layers(), loss_of, recompute=r) for r in (False, True)]
    optimizers = sgd(), sgd()
    for step in range(3):
        losses = [model(*batch_of(step)) for model in models]
        assert losses[0] == losses[1]
        for optimizer, model in zip(optimizers, models, strict=True):
            model.apply_gradients(optimizer)
    for name, variable in models[0].named_variables().items():
        np.testing.assert_array_equal(models[1].named_variables()[name].numpy(), variable.numpy())
    noise = [n for n in gathered(dict.fromkeys(models[0].named_variables())) if "seed_gen" in n]
    assert len(noise) == 3
    assert len({m.evaluate(*batch_of(9)) for m in [*models, *models]}) == 1


def test_what_layers_add_to_the_loss():
    makers = [INPUT, dense(kernel_regularizer="l2"), *(dense() for _ in range(4)), dense(3)]
    makers[-1:-1] = [lambda: kl.ActivityRegularization(0.01, dtype="float64")]
    model = PipelineModel(makers, loss_of, microbatches=1)
    alone = Alone(makers[1:], model, batch_of(0)[0])
    check_step(model, alone, batch_of(0))


def test_replicas_drop_other_units():
    if SIZE % 2:
        pytest.skip("needs an even number of ranks")
    model = PipelineModel(random_layers(), loss_of, mesh=Mesh(data=2, pipeline=-1))
    mine = {n: v.numpy().tolist() for n, v in model.named_variables().items() if "seed_gen" in n}
    everyone = hvd.allgather_object(mine)
    other = everyone[model.mesh.rank_at(data=1 - model.mesh.place("data"))]
    assert mine.keys() == other.keys()
    assert all(mine[name] != other[name] for name in mine)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_skip_connections_that_jump_stages(schedule):
    def merging():
        return Pop("near", kl.Concatenate(dtype="float64"), dtype="float64")

    makers = [
        INPUT,
        lambda: Stash("far", dtype="float64"),
        dense(),
        lambda: Stash("near", dtype="float64"),
        dense(),
        dense(),
        merging,
        dense(5),
        lambda: Pop("far", lambda x, stashed: x * stashed, dtype="float64"),
        dense(3),
    ]
    model = PipelineModel(makers, loss_of, schedule=schedule)
    alone = Alone(makers[1:], model, batch_of(0)[0])
    for step in range(2):
        check_step(model, alone, batch_of(step), optimizers=(sgd(), sgd()))


class Tokens(kl.Layer):
    """Gives vectors for tokens, and the tokens and their number besides."""

    def __init__(self, **options):
        super().__init__(**options)
        self.table = kl.Embedding(7, 5, dtype="float64", name="table")

    def build(self, shape):
        self.table.build(shape)

    def call(self, tokens):
        return self.table(tokens), tokens, keras.ops.cast(tokens > 3, "float64")


class Between(kl.Layer):
    """Changes the vectors, by where the tokens are odd."""

    def __init__(self, **options):
        super().__init__(dtype="float64", **options)
        self.inner = kl.Dense(5, activation="tanh", dtype="float64", name="inner")

    def build(self, x_shape, *_):
        self.inner.build(x_shape)

    def call(self, x, tokens, large):
        odd = keras.ops.cast(tokens % 2, "float64")
        return x + self.inner(x) * odd[..., None], tokens, large * 2.0


class Out(kl.Layer):
    def call(self, x, tokens, large):
        del tokens
        return keras.ops.mean(x * large[..., None], axis=1)[:, :3]


def tokens_of(step, rows=ROWS, length=4):
    tokens = np.random.default_rng(step).integers(0, 7, (rows, length)).astype(np.int32)
    return tokens, np.sin(tokens[:, :3].astype(np.float64))


def test_several_tensors_between_stages_some_without_gradient():
    makers = [Tokens, *[Between] * 5, lambda: Out(dtype="float64")]
    model = PipelineModel(makers, loss_of, example=tokens_of(0)[0])
    alone = Alone(makers, model, tokens_of(0)[0])
    for step in range(2):
        check_step(model, alone, tokens_of(step), optimizers=(sgd(), sgd()))


def test_masks_reach_the_stages_that_need_them():
    makers = [
        keras.Input((4,), dtype="int32"),
        lambda: kl.Embedding(7, 5, mask_zero=True, dtype="float64"),
        *(dense(5) for _ in range(3)),
        lambda: kl.SimpleRNN(4, dtype="float64"),
        dense(3),
    ]
    model = PipelineModel(makers, loss_of)
    tokens, target = tokens_of(0)
    alone = Alone(makers[1:], model, tokens)
    check_step(model, alone, (tokens, target))
    tokens = np.concatenate([tokens, 0 * tokens], axis=1)  # masked: as if it were not there
    assert_close(model.predict(tokens), alone.forward(tokens[:, :4], training=False).numpy())


class Head(kl.Layer):
    """The logits of a table of embeddings, transposed."""

    def __init__(self, embedding=None, **options):
        super().__init__(dtype="float64", **options)
        self.embedding = embedding

    def build(self, shape):
        if self.embedding is None:
            self.embeddings = self.add_weight(shape=(7, shape[-1]), name="embeddings")

    def call(self, x):
        table = self.embeddings if self.embedding is None else self.embedding.embeddings
        return x @ keras.ops.transpose(table)


def cross_entropy(target, output):
    return keras.losses.sparse_categorical_crossentropy(target, output, from_logits=True)


def follow(tokens):
    return tokens, (tokens * 3 + 1) % 7


def test_ties_with_a_weight_in_common_are_one():
    makers = [INPUT, *(dense(5) for _ in range(4)), dense(3)]
    names = [f"layers.{index}.kernel" for index in range(4)]
    tied = [tuple(names[:2]), tuple(names[2:]), (names[3], names[0])]
    model = PipelineModel(makers, loss_of, tied=tied)
    kernels = gathered({n: v.numpy() for n, v in model.named_variables().items()})
    alone = Alone(makers[1:], model, batch_of(0)[0])
    _, wanted = alone.step(*batch_of(0))
    model(*batch_of(0))
    found = gathered(gradients_of(model))
    for name in names:
        np.testing.assert_array_equal(kernels[name], kernels[names[0]])
        assert_close(found[name], sum(wanted[other] for other in names))


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("shared", [False, True], ids=["named", "shared"])
def test_tied_weights(shared, axes):
    """Between stages they stay one weight, with the sum of the gradients; in one stage as well."""
    length = 5

    def language_model():
        table = kl.Embedding(7, 6, dtype="float64")
        ends = (
            (table, Head(table)) if shared else (lambda: kl.Embedding(7, 6, dtype="float64"), Head)
        )
        return [ends[0], *(dense() for _ in range(4)), ends[1]]

    layers = language_model()
    tied = () if shared else [("layers.0.embeddings", "layers.5.embeddings")]
    inputs = keras.Input((None,), dtype="int32")
    model = PipelineModel([inputs, *layers], cross_entropy, mesh=Mesh(**axes), tied=tied)
    table = kl.Embedding(7, 6, dtype="float64")
    makers = [table, *(dense() for _ in range(4)), Head(table)]
    weights = gathered({name: v.numpy() for name, v in model.named_variables().items()})
    first, last = [v for name, v in weights.items() if name.endswith("embeddings")]
    np.testing.assert_array_equal(first, last)

    places, place = model.mesh.size_of("data"), model.mesh.place("data")
    alone = [make if isinstance(make, kl.Layer) else make() for make in makers]
    tokens = tokens_of(0, length=length)[0]
    run(alone, tokens)
    for index, layer in enumerate(alone):
        for name, variable in names_of(layer, index).items():
            variable.assign(first if name.endswith("embeddings") else weights[name])
    variables = list({id(v): v for layer in alone for v in layer.trainable_variables}.values())
    optimizers = sgd(), sgd()
    for step in range(3):
        x, y = follow(tokens_of(step, ROWS * places, length)[0])
        with tf.GradientTape() as tape:
            wanted = tf.reduce_mean(cross_entropy(y, run(alone, x)))
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(wanted, variables)]
        assert_close(model(x[place::places], y[place::places]), wanted.numpy())
        assert_close(model.clip_by_global_norm(1e9), tf.linalg.global_norm(gradients).numpy())
        model.apply_gradients(optimizers[0])
        optimizers[1].apply_gradients(zip(gradients, variables, strict=True))
    for name, variable in model.named_variables().items():
        mine = table.embeddings if name.endswith("embeddings") else None
        if mine is not None:
            assert_close(variable.numpy(), mine.numpy())


def run(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def test_generate():
    makers = [
        keras.Input((None,), dtype="int32"),
        lambda: kl.Embedding(7, 6, dtype="float64"),
        *(dense() for _ in range(3)),
        dense(7, activation=None),
    ]
    model = PipelineModel(makers, cross_entropy)
    tokens = tokens_of(0, rows=2)[0]
    alone = Alone(makers[1:], model, tokens)
    wanted = tokens
    for _ in range(3):
        logits = alone.forward(wanted[:, -4:], training=False).numpy()
        wanted = np.concatenate([wanted, logits[:, -1].argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(model.generate(tokens, 3, window=4), wanted)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision(precision):
    """What goes from stage to stage is of the lower precision, what is trained is not."""
    model, plain = (
        PipelineModel(
            [
                keras.Input((5,)),
                *(dense(dtype=dtype) for _ in range(4)),
                dense(3, dtype="float32"),
            ],
            "mse",
        )
        for dtype in (f"mixed_{precision}", "float32")
    )
    x, y = batch_of(0)
    wanted = plain(x, y)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), 256.0)
    assert model(x, y, scale=optimizer.scale_loss) == pytest.approx(wanted, rel=0.02)
    for gradient, exact in zip(model.gradients, plain.gradients, strict=True):
        assert gradient.dtype == tf.float32
        np.testing.assert_allclose(gradient / 256.0, exact, atol=0.03)
    model.apply_gradients(optimizer)
    plain.apply_gradients(keras.optimizers.SGD(0.1))
    assert model.evaluate(x, y) == pytest.approx(plain.evaluate(x, y), rel=0.02)


def test_overflow_on_one_rank_skips_the_step_on_all():
    @tf.custom_gradient
    def spoiling(x):
        return tf.identity(x), lambda gradient: gradient * tf.constant(np.inf, gradient.dtype)

    makers = [
        INPUT,
        *(dense() for _ in range(4)),
        dense(3),
        lambda: kl.Lambda(spoiling, dtype="float64"),
    ]
    good = PipelineModel(makers[:-1], loss_of)
    good(*batch_of(0))
    plain = [g.numpy() for g in good.gradients]
    good(*batch_of(0), scale=lambda loss: 8.0 * loss)
    for gradient, before in zip(good.gradients, plain, strict=True):
        assert_close(gradient.numpy(), 8.0 * before)
    lengths = [len(makers) - SIZE] + [1] * (SIZE - 1)
    model = PipelineModel(makers, loss_of, partition=lengths)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), 8.0)
    before = {name: v.numpy() for name, v in model.named_variables().items()}
    if model.trainable_variables:
        optimizer.build(model.trainable_variables)
    model(*batch_of(0), scale=lambda loss: 8.0 * loss)
    model.apply_gradients(optimizer)
    for name, variable in model.named_variables().items():
        np.testing.assert_array_equal(variable.numpy(), before[name])
    if model.trainable_variables:
        assert float(optimizer.dynamic_scale) == 4.0


def test_partition_by_time_and_by_hand():
    wide = [dense(), *(dense(400) for _ in range(5)), dense(3)]
    layers = [*wide, lambda: kl.Dropout(0.1, dtype="float64"), lambda: kl.Lambda(tf.identity)]
    x, _ = batch_of(0)
    example = np.tile(x, (30, 1))
    model = PipelineModel(layers, loss_of, partition="time", example=example)
    table = str(model.partition)
    assert len(set(hvd.allgather_object(table))) == 1
    assert sum(model.partition.lengths) == len(layers)
    assert model.partition.nbytes[0] > 400 * len(example) * 8 or SIZE > 1, "tanh holds its output"
    lengths = [len(wide) - SIZE + 1] + [1] * (SIZE - 1)
    model = PipelineModel([INPUT, *wide], loss_of, partition=lengths)
    assert model.partition.lengths == tuple(lengths)
    with pytest.raises(hvd.ArgumentError, match=f"is for {SIZE + 1} stages, and there are {SIZE}"):
        PipelineModel([INPUT, *wide], loss_of, partition=[1] * (SIZE + 1))
    with pytest.raises(hvd.ArgumentError, match="there are 7"):
        PipelineModel([INPUT, *wide], loss_of, partition=[9] * SIZE)
    with pytest.raises(hvd.ArgumentError, match="measures the layers: give it an example"):
        PipelineModel([INPUT, *wide], loss_of, partition="time")


def test_a_limit_of_memory_is_refused_with_the_sizes():
    layers = [INPUT, *(dense(100) for _ in range(6))]
    largest = (100 * 100 + 100) * 8 * 4  # Adam: weight, gradient and two more
    with pytest.raises(hvd.ArgumentError, match=r"of 100\.00 KiB, .* too much"):
        PipelineModel(layers, loss_of, memory_limit=100 * 1024)
    per_rank = -(-5 // SIZE) * largest + 6 * 100 * 8 * 4
    model = PipelineModel(layers, loss_of, memory_limit=per_rank)
    assert max(model.partition.rank_bytes) <= per_rank
    if SIZE > 1:
        with pytest.raises(hvd.ArgumentError, match="memory"):
            PipelineModel(layers, loss_of, memory_limit=per_rank, optimizer_state=6)


def test_sequential_and_its_input():
    keras.utils.set_random_seed(1)
    units = [kl.Dense(6, activation="tanh", dtype="float64") for _ in range(5)]
    built = keras.Sequential([INPUT, *units])
    wanted = built(batch_of(0)[0]).numpy()
    model = PipelineModel(built, loss_of)
    assert_close(model.predict(batch_of(0)[0]), wanted)
    assert "layers.0.kernel" in gathered(dict.fromkeys(model.named_variables()))


def test_refusals():
    def refused(match, layers, error=hvd.ArgumentError, **how):
        with pytest.raises(error, match=match):
            PipelineModel(layers, loss_of, **how)

    chain = CHAIN[1:]
    refused(r"layer 0 \(Dense\) has no weights yet.*keras.Input", chain)
    refused("layer 1 is neither", [INPUT, dense(), lambda: 3])
    refused("layer 1 is neither", [INPUT, dense(), 3])
    refused("no Stash..a", [*CHAIN, lambda: Pop("a")])
    refused("'a' wants a Stash, and a Pop", [*CHAIN, lambda: Stash("a", dtype="float64")])
    refused(
        "there is no parameter 'layers.0.weight'",
        CHAIN,
        tied=[("layers.0.weight", "layers.1.bias")],
    )
    kernels = [("layers.0.kernel", "layers.1.kernel")]
    refused(r"layers.0.kernel \(5, 5\), layers.1.kernel \(5, 6\)", CHAIN, tied=kernels)
    model = PipelineModel(CHAIN, loss_of)
    x, y = batch_of(0)
    with pytest.raises(hvd.UnsupportedError, match=r"take the tf\.function off"):
        tf.function(lambda: tf.constant(model(x, y)), autograph=False)()
    with pytest.raises(hvd.ArgumentError, match="10 rows have a target of 9"):
        model(x, y[:9])
    with pytest.raises(hvd.ArgumentError, match="one number of rows"):
        model((x, y[:9]), y)
    with pytest.raises(hvd.ArgumentError, match="one number of rows"):
        model(tf.constant(1.0), y)
    check_step(model, Alone(chain, model, x), (x, y))


# Checkpoints


@pytest.mark.parametrize("make", [lambda: keras.optimizers.Adam(0.01), sgd], ids=["adam", "sgd"])
def test_a_checkpoint_goes_on_in_another_mesh(tmp_path, make):
    """From one pipeline of all ranks to replicas on all: the same losses as without a stop."""
    folder = hvd.broadcast_object(str(tmp_path))
    meshes = [Mesh(pipeline=-1), Mesh(data=-1)]

    def train(model, optimizer, steps):
        place, places = model.mesh.place("data"), model.mesh.size_of("data")
        found = []
        for step in steps:
            x, y = batch_of(step, SIZE)
            found.append(model(x[place::places], y[place::places]))
            model.apply_gradients(optimizer)
        return found

    optimizer, model = make(), PipelineModel(CHAIN, loss_of, mesh=meshes[0])
    train(model, optimizer, range(3))
    model.save(folder, optimizer, {"step": 3})
    wanted = train(model, optimizer, range(3, 6))
    for mesh in meshes:
        optimizer, model = make(), PipelineModel(CHAIN, loss_of, mesh=mesh, seed=5)
        begin = model.load(folder, optimizer)["step"]
        found = train(model, optimizer, range(begin, begin + 3))
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
    hvd.barrier()


def test_checkpoints_that_do_not_fit(tmp_path):
    folder = hvd.broadcast_object(str(tmp_path))
    model = PipelineModel(CHAIN, loss_of)
    with pytest.raises(hvd.CheckpointError):
        model.load(folder)
    model.save(folder)
    if SIZE == 1:
        with pytest.raises(hvd.CheckpointError, match="no tensor"):
            model.load(folder, keras.optimizers.Adam(0.01))
    hvd.barrier()
