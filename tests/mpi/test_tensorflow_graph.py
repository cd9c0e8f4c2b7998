"""hvdkit.tensorflow inside tf.function: what runs in which order, and when it is found out."""

import time

import pytest

tf = pytest.importorskip("tensorflow")

import hvdkit.tensorflow as hvd  # noqa: E402  (TensorFlow may be missing)
from hvdkit.api import context  # noqa: E402

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")


@pytest.fixture
def upper():
    """The ranks but the first."""
    process_set = hvd.add_process_set(range(1, SIZE))
    yield process_set
    assert hvd.remove_process_set(process_set)


# Order in graphs


def late(x):
    """Return `x` after a while."""

    def wait(x):
        time.sleep(0.005)
        return x

    return tf.ensure_shape(tf.numpy_function(wait, [x], x.dtype), x.shape)


def test_independent_collectives_keep_their_order():
    """However late their arguments are, others on each rank; else shapes would differ."""
    kinds = [
        lambda x: hvd.allreduce(x, op=hvd.Sum),
        hvd.allgather,
        lambda x: hvd.broadcast(x, 0),
        lambda x: hvd.reducescatter(tf.tile(x, [SIZE]), op=hvd.Sum),
        lambda x: hvd.grouped_allreduce([x, x], op=hvd.Sum)[1],
    ]

    @tf.function
    def many(xs):
        found = []
        for place, x in enumerate(xs):
            y = late(x) if place % SIZE == RANK else x
            found.append(tf.reduce_sum(kinds[place % len(kinds)](y)))
        return tf.stack(found[::-1])

    xs = [tf.ones([place + 1]) for place in range(60)]
    wanted = [(1 if n % 5 == 2 else SIZE) * (n + 1) for n in range(60)]
    for _ in range(3):
        assert many(xs).numpy().tolist() == wanted[::-1]


def test_branches_that_read_variables_keep_the_order():
    """TensorFlow alone would run these at the same time as what comes after them."""
    ones = tf.Variable(tf.ones([9]))

    @tf.function
    def function(n):
        found = []
        for place in range(3):
            if n > place:
                x = late(ones[: place + 1]) if place % SIZE == RANK else ones[: place + 1]
                a = tf.reduce_sum(hvd.allreduce(x, op=hvd.Sum))
            else:
                a = tf.reduce_sum(hvd.allgather(ones[: place + 4]))
            b = hvd.allgather(tf.ones([place + 1, 2]))
            found += [a, tf.reduce_sum(b)]
        return tf.stack(found)

    for _ in range(2):
        found = function(tf.constant(2)).numpy()
        assert found.tolist() == [SIZE * n for n in (1, 2, 2, 4, 6, 6)]


def test_branches_loops_and_functions_keep_the_order():
    @tf.function
    def inner(x, n):
        return tf.reduce_sum(hvd.allreduce(x[:n], op=hvd.Sum)) + 0 * tf.reduce_sum(hvd.allgather(x))

    @tf.function
    def outer(x, turns):
        totals = tf.TensorArray(tf.float32, 0, dynamic_size=True, element_shape=[])
        for i in tf.range(turns):
            if i % 2 == 0:
                a = tf.reduce_sum(hvd.allreduce(x[: i + 1], op=hvd.Sum))
                b = tf.reduce_sum(hvd.allreduce(x[: i + 2], op=hvd.Sum))
            else:
                a = inner(x, i + 1)
                b = tf.reduce_sum(hvd.broadcast(x[: i + 3], 0))
            c = tf.reduce_sum(hvd.allgather(x[: i + 4]))
            j = i
            while j > 0:
                c += tf.reduce_sum(hvd.allreduce(x[:j], op=hvd.Sum))
                j -= 1
            totals = totals.write(i, a + b + c)
        return totals.stack()

    x = tf.ones([12])
    wanted = []
    for i in range(6):
        total = SIZE * (i + 1) + (SIZE * (i + 2) if i % 2 == 0 else i + 3)
        wanted.append(total + SIZE * (i + 4) + SIZE * i * (i + 1) // 2)
    for _ in range(2):
        assert outer(x, 6).numpy().tolist() == wanted


def test_results_that_nobody_uses_are_computed():
    """Else the ranks that do not need one would leave the others waiting."""

    @tf.function
    def function(x):
        y = hvd.allreduce(x, op=hvd.Sum)
        hvd.allgather(x)
        return y if RANK == 0 else x

    for _ in range(2):
        function(tf.ones([3]))
    hvd.barrier()


def test_eager_calls_and_graphs_in_turn():
    @tf.function
    def summed(x):
        return hvd.allreduce(x, op=hvd.Sum)

    for n in range(1, 6):
        assert summed(tf.ones([n])).numpy().tolist() == [SIZE] * n
        assert hvd.allgather(tf.ones([n])).shape == [SIZE * n]


# Sizes and ranks


def test_sizes_and_ranks_are_found_when_the_graph_runs(monkeypatch):
    @tf.function
    def numbers():
        return tf.stack(
            [hvd.size_op(), hvd.rank_op(), hvd.local_size_op(name="n"), hvd.local_rank_op()]
        )

    assert numbers().dtype == tf.int32
    topology = context().topology
    wanted = [SIZE, RANK, topology.local_size, topology.local_rank]
    assert numbers().numpy().tolist() == wanted
    assert [op().numpy() for op in (hvd.size_op, hvd.rank_op)] == [SIZE, RANK]
    graph = numbers.get_concrete_function()

    class Elsewhere:
        size, rank, local_size, local_rank = 7, 5, 3, 2

    monkeypatch.setattr(context(), "topology", Elsewhere)
    monkeypatch.setattr(context().process_sets, "members", {0: tuple(range(7))})
    assert graph().numpy().tolist() == [7, 5, 3, 2]


@several
def test_sizes_of_process_sets(upper):
    number = upper.process_set_id

    @tf.function
    def numbers():
        return tf.stack([hvd.size_op(number), hvd.process_set_included_op(number)])

    assert numbers().numpy().tolist() == [SIZE - 1, int(RANK > 0)]
    assert hvd.size_op(number).numpy() == SIZE - 1
    assert hvd.process_set_included_op(0).numpy() == 1


def test_a_process_set_that_there_is_not():
    assert hvd.process_set_included_op(99).numpy() == -3
    with pytest.raises(hvd.ArgumentError, match="no process set 99; known are 0"):
        hvd.size_op(99)
    with pytest.raises(tf.errors.InvalidArgumentError, match="no process set 99; known are 0"):
        tf.function(lambda: hvd.size_op(99))()


def test_one_rank_may_ask_alone():
    """Between calls that all ranks make, for it is no collective."""

    @tf.function
    def function(x):
        y = hvd.allreduce(x, op=hvd.Sum)
        if RANK == 0:
            y += tf.cast(hvd.rank_op(), tf.float32)
        return hvd.allreduce(y, op=hvd.Sum)

    assert function(tf.ones([2])).numpy().tolist() == [SIZE * SIZE] * 2


# Uneven inputs


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_join(mode):
    """Rank r has r + 1 batches."""
    step, join = (lambda x: hvd.allreduce(x, op=hvd.Sum)), hvd.join
    if mode == "graph":
        step, join = tf.function(step), tf.function(join)
    for turn in range(RANK + 1):
        assert step(tf.ones([2])).numpy().tolist() == [SIZE - turn] * 2
    last = join()
    assert last.dtype == tf.int32
    assert 0 <= int(last) < SIZE
    hvd.barrier()
