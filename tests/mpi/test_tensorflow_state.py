"""hvdkit.tensorflow: starting all ranks alike, with variables and objects from one of them."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

import hvdkit.tensorflow as hvd  # noqa: E402  (TensorFlow may be missing)

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")
roots = pytest.mark.parametrize("root", sorted({0, SIZE - 1}))
modes = pytest.mark.parametrize("mode", ["eager", "graph"])
DTYPES = ["bool", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64"]


def traced(function, mode):
    return function if mode == "eager" else tf.function(function)


def mixed(rank):
    """Variables of TensorFlow and Keras of every dtype, a scalar and an empty one among them."""
    values = [np.arange(6).reshape(2, 3) + rank, np.array(rank), np.zeros((0, 3))]
    variables = []
    for dtype in DTYPES:
        for value in values:
            variables.append(tf.Variable(tf.cast(value, dtype), name=f"v{rank}"))
            variables.append(keras.Variable(value, dtype=dtype, name=f"k{rank}"))
    complexes = tf.complex(tf.ones([2]) * rank, tf.ones([2]))
    return [*variables, tf.Variable(complexes, trainable=False)]


def assert_same(ours, wanted):
    for mine, theirs in zip(ours, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        arrays = [tf.convert_to_tensor(variable).numpy() for variable in (mine, theirs)]
        assert np.array_equal(*arrays)


@modes
@roots
def test_variables_of_all_kinds(root, mode):
    variables = mixed(RANK)
    for _ in range(2):
        assert traced(lambda: hvd.broadcast_variables(variables, root), mode)() is None
        assert_same(variables, mixed(root))


@modes
@roots
def test_in_place(root, mode):
    """What comes before and after it in the graph stays before and after."""
    first, second = tf.Variable([1.0 + RANK]), keras.Variable([[2.0 + RANK]])

    def function():
        first.assign_add([10.0])
        values = hvd.broadcast_([first, second], root, name="both")
        first.assign(first * 2)
        return values

    values = traced(function, mode)()
    assert [value.numpy().tolist() for value in values] == [[11.0 + root], [[2.0 + root]]]
    assert first.numpy().tolist() == [22.0 + 2 * root]
    assert second.numpy().tolist() == [[2.0 + root]]


def test_in_a_loop_and_a_branch():
    variable = tf.Variable(tf.zeros([3]))

    @tf.function
    def function(turns):
        for i in tf.range(turns):
            variable.assign(tf.fill([3], tf.cast(i + RANK, tf.float32)))
            if i % 2 == 0:
                hvd.broadcast_variables([variable], root_rank=SIZE - 1)
        return variable.read_value()

    assert function(5).numpy().tolist() == [4.0 + SIZE - 1] * 3
    assert function(4).numpy().tolist() == [3.0 + RANK] * 3


def test_a_variable_of_unknown_shape():
    variable = tf.Variable(tf.fill([RANK + 1], 1.0), shape=tf.TensorShape(None))
    variable.assign(tf.fill([2, 2], float(RANK)))
    tf.function(lambda: hvd.broadcast_variables([variable], SIZE - 1))()
    assert variable.numpy().tolist() == [[SIZE - 1.0] * 2] * 2


@roots
def test_a_model_and_its_optimizer(root):
    """Ranks that start apart are one from here on."""
    keras.utils.set_random_seed(RANK)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    optimizer = keras.optimizers.Adam(0.01 * (RANK + 1))
    optimizer.build(model.trainable_variables)
    gradients = [tf.random.normal(v.shape) for v in model.trainable_variables]
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    hvd.broadcast_variables(model.variables, root)
    hvd.broadcast_variables(optimizer.variables, root)
    for variable in [*model.variables, *optimizer.variables]:
        everyone = hvd.allgather(tf.cast(variable, tf.float64)[None])
        assert np.array_equal(everyone, np.stack([variable.numpy()] * SIZE))
    assert np.isclose(optimizer.learning_rate, 0.01 * (root + 1))


@modes
def test_variables_are_broadcast_only_together(mode):
    """After an error none has changed."""
    if SIZE == 1:
        pytest.skip("needs several ranks")
    kind = hvd.MismatchError if mode == "eager" else tf.errors.InvalidArgumentError
    odd = RANK == SIZE - 1
    fine = tf.Variable([float(RANK)], name="fine")
    wrong = tf.Variable(tf.zeros([3 + odd]), name="wrong")
    typed = tf.Variable(tf.zeros([3], tf.float64 if odd else tf.float32), name="typed")
    extra = [tf.Variable(1.0)] if odd else []

    def refused(variables, text, root=0):
        with pytest.raises(kind, match=text) as caught:
            traced(lambda: hvd.broadcast_variables(variables, root), mode)()
        assert "MismatchError" in f"{type(caught.value).__name__} {caught.value}"
        assert fine.numpy().tolist() == [RANK]

    refused([fine, wrong], r"(?s)variable 1, here 'wrong:0': .*shape.*\(3,\).*\(4,\)")
    refused([fine, typed], r"(?s)variable 1, here 'typed:0': .*dtype.*float32.*float64")
    refused([fine, *extra], r"(?s)number of variables.*variables=1.*variables=2")
    refused([fine], "root_rank", root=int(odd))
    hvd.broadcast_variables([fine], 0)
    assert fine.numpy().tolist() == [0.0]


def test_what_is_no_variable():
    for wrong in (tf.ones([2]), 5, "weight", np.zeros(2)):
        for function in (hvd.broadcast_variables, hvd.broadcast_):
            with pytest.raises(hvd.UnsupportedError, match="expected variables"):
                function([wrong], 0)
    with pytest.raises(hvd.ArgumentError, match=f"root_rank {SIZE} is not a rank"):
        hvd.broadcast_variables([tf.Variable(1.0)], SIZE)
    with pytest.raises(hvd.UnsupportedError, match=r"broadcast_variables\(model\.variables"):
        hvd.broadcast_global_variables(0)


@modes
def test_no_variables(mode):
    traced(lambda: hvd.broadcast_variables([], 0), mode)()
    assert hvd.broadcast_([], 0) == []


@roots
def test_objects(root):
    value = {"rank": RANK, "tensor": tf.range(RANK + 1), "text": "ä" * RANK}
    found = hvd.broadcast_object(value, root, name="value")
    assert found["rank"] == root
    assert found["tensor"].numpy().tolist() == list(range(root + 1))
    assert hvd.broadcast_object([1] if root == RANK else None, root_rank=root) == [1]
    send = hvd.broadcast_object_fn(root_rank=root, name="again")
    assert [send(RANK), send((RANK, "b"))] == [root, (root, "b")]
    everyone = hvd.allgather_object(value, name="all")
    assert [theirs["text"] for theirs in everyone] == ["ä" * rank for rank in range(SIZE)]
    assert hvd.allgather_object(None) == [None] * SIZE


@several
def test_in_a_process_set():
    process_set = hvd.add_process_set(range(1, SIZE))
    if RANK:
        here = {"process_set": process_set}
        variable = tf.Variable([float(RANK)])
        hvd.broadcast_variables([variable], SIZE - 1, **here)
        assert variable.numpy().tolist() == [SIZE - 1]
        variable.assign([float(RANK)])
        tf.function(lambda: hvd.broadcast_([variable], 1, **here))()
        assert variable.numpy().tolist() == [1.0]
        assert hvd.broadcast_object(RANK, 1, **here) == 1
        assert hvd.broadcast_object_fn(1, **here)(RANK) == 1
        assert hvd.allgather_object(RANK, **here) == list(range(1, SIZE))
        with pytest.raises(hvd.ArgumentError, match="root_rank 0 is not in the process set"):
            hvd.broadcast_variables([variable], 0, **here)
    hvd.remove_process_set(process_set)
