"""PyTorch and TensorFlow in one process, over one core: the same training in both."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("tensorflow")
torch.set_num_threads(1)

import keras  # noqa: E402  (TensorFlow may be missing)

import hvdkit  # noqa: E402
import hvdkit.tensorflow as hvd_tf  # noqa: E402
import hvdkit.torch as hvd_torch  # noqa: E402

RANK, SIZE = hvdkit.rank(), hvdkit.size()


def batches():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = rng.standard_normal((16 * SIZE, 6)).astype(np.float32)
        yield x[RANK::SIZE], np.sin(x[RANK::SIZE]).sum(1, keepdims=True)


def torch_losses(weights):
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(torch.tensor(weight.T))
    optimizer = hvd_torch.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5), model.named_parameters()
    )
    for x, y in batches():
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(torch.tensor(x)), torch.tensor(y))
        loss.backward()
        optimizer.step()
        yield loss.item()


def tensorflow_losses(weights):
    variables = [tf.Variable(weight) for weight in weights]
    optimizer = keras.optimizers.SGD(0.02, momentum=0.5)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            hidden = tf.nn.relu(x @ variables[0] + variables[1])
            loss = tf.reduce_mean((hidden @ variables[2] + variables[3] - y) ** 2)
        gradients = hvd_tf.DistributedGradientTape(tape).gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss

    for x, y in batches():
        yield step(tf.constant(x), tf.constant(y)).numpy()


def test_losses_agree_step_by_step():
    """The two run in turns, so that neither may mind the other."""
    rng = np.random.default_rng(1)
    shapes = [(6, 16), (16,), (16, 1), (1,)]
    weights = [rng.standard_normal(shape).astype(np.float32) / 3 for shape in shapes]
    pairs = list(zip(torch_losses(weights), tensorflow_losses(weights), strict=True))
    ours, theirs = np.array(pairs).T
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    assert ours[-5:].mean() < ours[:5].mean()
