"""Tensors of TensorFlow on a GPU: collectives and gradients, eager and in a graph."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
if not tf.config.list_physical_devices("GPU"):
    pytest.skip("needs TensorFlow with CUDA, and a GPU", allow_module_level=True)

import hvdkit.tensorflow as hvd  # noqa: E402  (TensorFlow may be missing)

hvd.init()
RANK, SIZE = hvd.rank(), hvd.size()


def made(function, graph):
    return tf.function(function) if graph else function


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_collectives(graph):
    def all_of_them():
        with tf.device("/GPU:0"):
            x = tf.range(1000, dtype=tf.float32) * (RANK + 1.0)  # still being computed
            return (
                hvd.allreduce(x, op=hvd.Sum) + 1,
                hvd.allgather(x[: RANK + 1]) + 1,
                hvd.broadcast(x, 0) + 1,
                hvd.reducescatter(x[: 4 * SIZE], op=hvd.Sum) + 1,
            )

    total, gathered, root, share = made(all_of_them, graph)()
    numbers = np.arange(1000, dtype=np.float32)
    np.testing.assert_array_equal(total, numbers * SIZE * (SIZE + 1) / 2 + 1)
    wanted = [numbers[: rank + 1] * (rank + 1) for rank in range(SIZE)]
    np.testing.assert_array_equal(gathered, np.concatenate(wanted) + 1)
    np.testing.assert_array_equal(root, numbers + 1)
    mine = numbers[4 * RANK : 4 * RANK + 4] * SIZE * (SIZE + 1) / 2
    np.testing.assert_array_equal(share, mine + 1)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_gradients_of_variables_on_the_gpu(graph):
    with tf.device("/GPU:0"):
        variable = tf.Variable(np.ones((500, 300), np.float32))
    hvd.broadcast_variables([variable], 0)

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable * (RANK + 1.0))
        return hvd.DistributedGradientTape(tape).gradient(loss, variable) * 2

    np.testing.assert_allclose(made(step, graph)(), np.full((500, 300), SIZE + 1.0))
