"""`hvdkit.keras` on Keras's torch backend, and what it imports on either."""

import pytest
from launching import run

pytest.importorskip("torch")
pytest.importorskip("keras")

TRAINING = """
import sys
import keras, numpy as np, torch
import hvdkit.keras as hvd
assert "tensorflow" not in sys.modules
keras.config.set_floatx("float64")  # though Keras multiplies matrices as float32 there
STEPS, ROWS = 20, 3

def build():
    layers = [keras.layers.Embedding(7, 3), keras.layers.Flatten(),
              keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.layers.Input((2,), dtype="int32"), *layers])
    random = np.random.default_rng(0)
    model.set_weights([random.normal(size=weight.shape) for weight in model.weights])
    return model

def data(mine):
    random = np.random.default_rng(1)
    x = random.integers(0, 7, (STEPS, ROWS * hvd.size(), 2)).astype(np.int32)
    y = np.sin(x.sum(axis=2, keepdims=True)).astype(np.float64)
    return [a[:, mine].reshape(-1, a.shape[2]) for a in (x, y)]

def fit(model, optimizer, part, **how):
    model.compile(optimizer, "mse", **how)
    x, y = part
    model.fit(x, y, batch_size=len(x) // STEPS, shuffle=False, verbose=0)

def in_batches(part):
    return zip(*(np.split(a, STEPS) for a in part))

@torch.enable_grad()
def gradients_of(model, x, y):
    model.zero_grad()
    torch.mean((model(x, training=True) - torch.as_tensor(y)) ** 2).backward()
    return [v.value.grad for v in model.trainable_variables]

def loop(model, optimizer, part, change=lambda gradients: gradients):
    for x, y in in_batches(part):
        with torch.no_grad():
            gradients = change(gradients_of(model, x, y))
            optimizer.apply(gradients, model.trainable_variables)

def same(found, wanted, tolerance=2e-6):
    for ours, theirs in zip(found.get_weights(), wanted.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    weights = [weight.tobytes() for weight in found.get_weights()]
    assert hvd.allgather_object(weights) == [weights] * hvd.size()
"""


def training(script):
    """Run a script that begins with TRAINING's definitions, and is to print "done"."""
    outcome = run(TRAINING + script, 2, environment={"KERAS_BACKEND": "torch"})
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("done") == 2, outcome.stdout
    return outcome


def test_as_one_process_with_the_whole_batch():
    outcome = training(
        """
optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD())
try:
    optimizer.apply([torch.ones(2)], [keras.Variable(np.zeros(2))])
except hvd.NotInitializedError:
    print("not initialised")
hvd.init()
mine, whole = data(slice(hvd.rank(), None, hvd.size())), data(slice(None))
makes = [lambda: keras.optimizers.SGD(0.05, momentum=0.9), lambda: keras.optimizers.Adam(0.02),
         lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1, global_clipnorm=0.5)]
for make in makes:
    for train in (fit, loop):
        model, plain, optimizer = build(), build(), hvd.DistributedOptimizer(make())
        assert isinstance(optimizer, type(make()))
        train(model, optimizer, mine)
        train(plain, make(), whole)
        same(model, plain)
        assert np.abs(model.get_weights()[0] - build().get_weights()[0]).max() > 1e-2
    assert int(optimizer.iterations) == STEPS

# What is made of gradients, or has nothing to do with backward's, is averaged as it is given.
for change in (lambda gs: [2 * g for g in gs], lambda gs: [g + i / 100 for i, g in enumerate(gs)]):
    model, plain = build(), build()
    loop(model, hvd.DistributedOptimizer(makes[0]()), mine, change)
    loop(plain, makes[0](), whole, change)
    same(model, plain)

model, plain = build(), build()
fit(model, hvd.DistributedOptimizer(makes[0](), compression=hvd.Compression.fp16, groups=2), mine,
    jit_compile=True)
fit(plain, makes[0](), whole)
same(model, plain, 1e-2)

class Plain:
    compress = staticmethod(lambda tensor: (tensor, None))
    decompress = staticmethod(lambda tensor, form: tensor)

model = build()
fit(model, hvd.DistributedOptimizer(makes[0](), compression=Plain), mine)
same(model, plain)
print("done")
"""
    )
    assert outcome.stdout.count("not initialised") == 2
    assert outcome.stderr.count("jit_compile is switched off") == 1


def test_passes_loss_scale_saving_and_two_optimizers(tmp_path):
    training(
        f"""
path = r"{tmp_path}"
hvd.init()
rank = hvd.rank()
mine, whole = data(slice(rank, None, hvd.size())), data(slice(None))
Adam, SGD = keras.optimizers.Adam, keras.optimizers.SGD

model, plain = build(), build()
optimizer = hvd.DistributedOptimizer(Adam(0.02), backward_passes_per_step=2,
                                     average_aggregated_gradients=True)
fit(model, optimizer, mine)
other, batches = Adam(0.02), list(in_batches(whole))
for pair in zip(batches[::2], batches[1::2]):
    gradients = gradients_of(plain, *map(np.concatenate, zip(*pair)))
    with torch.no_grad():
        other.apply(gradients, plain.trainable_variables)
same(model, plain)
assert int(optimizer.iterations) == STEPS // 2

model, plain = build(), build()
optimizer = keras.optimizers.LossScaleOptimizer(hvd.DistributedOptimizer(SGD(0.1)), 8.0)
for i, (x, y) in enumerate(in_batches(mine)):
    gradients = [8.0 * g for g in gradients_of(model, x, y)]
    if i == 1 and rank == 1:
        gradients[1] = gradients[1] * float("inf")
    with torch.no_grad():
        optimizer.apply(gradients, model.trainable_variables)
    if i == 1:
        break
assert float(optimizer.dynamic_scale) == 4.0
with torch.no_grad():
    SGD(0.1).apply(gradients_of(plain, *batches[0]), plain.trainable_variables)
same(model, plain)

model = build()
local = hvd.PartialDistributedOptimizer(SGD(1.0), local_layers=model.layers[-1])
before = model.get_weights()
with torch.no_grad():
    local.apply([torch.full(w.shape, 1.0 + rank) for w in before], model.trainable_variables)
steps = [float(b.flat[0] - w.flat[0]) for b, w in zip(before, model.get_weights())]
np.testing.assert_allclose(steps, [1.5, 1.5, 1.5, (1 + rank) / 2, (1 + rank) / 2])

model = build()
fit(model, hvd.DistributedOptimizer(Adam(0.02)), mine)
file = f"{{path}}/{{rank}}.keras"
model.save(file)
assert type(keras.models.load_model(file).optimizer) is type(Adam())
again = hvd.load_model(file)
assert int(again.optimizer.iterations) == STEPS
for going_on in (model, again):
    going_on.fit(*mine, batch_size=3, shuffle=False, verbose=0)
same(again, model)

optimizer = hvd.DistributedOptimizer(SGD(0.1, momentum=0.5), op=hvd.Adasum)
variable = keras.Variable(np.ones(2))
for _ in range(2):
    with torch.no_grad():
        optimizer.apply([torch.eye(2, dtype=torch.float64)[rank]], [variable])
np.testing.assert_allclose(variable.numpy(), 1 - 0.1 * (1 + 1.5))  # the sum of what is orthogonal

# Two models, one after the other: what comes for the second in the first's backward is thrown away.
def adversaries(part, wrap):
    first = build()
    second = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1)])
    second.set_weights([np.full((1, 1), 2.0), np.zeros(1)])
    optimizers = [wrap(SGD(0.05, momentum=0.5)) for _ in range(2)]
    for x, y in in_batches(part):
        y = torch.as_tensor(y)
        for model, optimizer, loss in (
            (second, optimizers[0], lambda: ((second(first(x).detach()) - y) ** 2).mean()),
            (first, optimizers[1], lambda: ((second(first(x)) + y) ** 2).mean()),
        ):
            first.zero_grad(), second.zero_grad()
            loss().backward()
            with torch.no_grad():
                gradients = [v.value.grad for v in model.trainable_variables]
                optimizer.apply(gradients, model.trainable_variables)
    return first, second

pairs = adversaries(mine, hvd.DistributedOptimizer), adversaries(whole, lambda o: o)
for ours, theirs in zip(*pairs):
    same(ours, theirs)

callback = hvd.callbacks.BroadcastGlobalVariablesCallback(1)
model = build()
model.set_weights([weight + rank for weight in model.get_weights()])
model.compile(hvd.DistributedOptimizer(SGD(0.0)), "mse")
warmup = hvd.callbacks.LearningRateWarmupCallback(0.0, warmup_epochs=1)
mean = hvd.callbacks.MetricAverageCallback()
model.fit(*mine, batch_size=3, verbose=0, callbacks=[callback, mean, warmup])
np.testing.assert_allclose(model.get_weights()[0], build().get_weights()[0] + 1)
assert float(hvd.allreduce(torch.tensor(float(rank)))) == 0.5
print("done")
"""
    )


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_only_the_framework_of_the_backend_is_imported(backend):
    pytest.importorskip(backend)
    other = {"tensorflow": "torch", "torch": "tensorflow"}[backend]
    outcome = run(
        f"""
        import sys
        import keras
        before = {other!r} in sys.modules
        import hvdkit.keras as hvd
        hvd.DistributedOptimizer(keras.optimizers.SGD())
        print({other!r} in sys.modules, before)
        """,
        1,
        environment={"KERAS_BACKEND": backend},
    )
    assert outcome.stdout.split() in (["False", "False"], ["True", "True"]), outcome.stderr
