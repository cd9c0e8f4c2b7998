"""hvdkit.tensorflow's collectives: eager and in graphs, their gradients and their errors.

Gradients are compared with the table in hvdkit.tensorflow.collectives, computed by hand: each rank
weighs its outputs with weights of its own, which are the gradients of the outputs.
"""

from functools import partial

import numpy as np
import pytest
from adasum_oracle import adasum

tf = pytest.importorskip("tensorflow")

import hvdkit.tensorflow as hvd  # noqa: E402  (TensorFlow may be missing)
from hvdkit.arrays import aligned_empty  # noqa: E402
from hvdkit.tensorflow.convert import array_of, tensor_of  # noqa: E402

RANK, SIZE = hvd.rank(), hvd.size()
RANKS = range(SIZE)
FACTORS = {"prescale_factor": 2.0, "postscale_factor": 0.75}
DTYPES = [
    tf.bool,
    tf.uint8,
    tf.int8,
    tf.uint16,
    tf.int16,
    tf.int32,
    tf.int64,
    tf.float16,
    tf.bfloat16,
    tf.float32,
    tf.float64,
    tf.complex64,
    tf.complex128,
]

several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")
modes = pytest.mark.parametrize("mode", ["eager", "graph", "unknown rows", "unknown rank"])


def of(rank, *shape, seed=0):
    """Return what `rank` has: numbers that everyone can compute."""
    return np.random.default_rng([seed, rank]).standard_normal(shape)


def everyone(*shape, seed=0, ranks=RANKS):
    return np.stack([of(rank, *shape, seed=seed) for rank in ranks])


def weights(*shape, ranks=RANKS):
    """All ranks' gradients of an output."""
    return everyone(*shape, seed=9, ranks=ranks)


def rows_of(rank, rows):
    """Which rows a reduce-scatter leaves a rank with."""
    counts = [rows // SIZE + (r < rows % SIZE) for r in RANKS]
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


def traced(function, mode, *xs):
    """Return `function` as it is or as a graph, for arguments like `xs`."""
    if mode == "eager":
        return function
    if mode == "graph":
        return tf.function(function)
    if mode == "unknown rank":
        signature = [tf.TensorSpec(None, x.dtype) for x in xs]
    else:
        signature = [tf.TensorSpec([None, *x.shape[1:]][: x.shape.rank], x.dtype) for x in xs]
    return tf.function(function, input_signature=signature)


def differentiated(function, mode, *xs):
    """Return `function`'s outputs and, this rank's weights sent back, the gradients of `xs`."""

    def both(*xs):
        with tf.GradientTape() as tape:
            tape.watch(xs)
            outputs = function(*xs)
            loss = tf.add_n([weigh(y) for y in outputs])
        return outputs, tape.gradient(loss, xs)

    def weigh(y):
        mine = tf.numpy_function(lambda y: of(RANK, *y.shape, seed=9), [y], tf.float64)
        return tf.reduce_sum(tf.stop_gradient(mine) * tf.cast(y, tf.float64))

    return traced(both, mode, *xs)(*xs)


# Values


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_every_dtype(dtype, mode):
    x = np.arange(6).reshape(2, 3).astype(dtype.as_numpy_dtype)
    rows = np.concatenate([x] * SIZE)
    total = np.sum([x] * SIZE, 0).astype(x.dtype)

    def collectives(x, rows, mine):
        return (
            hvd.allreduce(x, op=hvd.Sum),
            hvd.allgather(x),
            hvd.broadcast(mine, SIZE - 1),
            hvd.alltoall(rows),
            hvd.reducescatter(rows, op=hvd.Sum),
        )

    assert hvd.broadcast(tf.cast(RANK, dtype), SIZE - 1) == tf.cast(SIZE - 1, dtype)
    mine = x if RANK == SIZE - 1 else np.zeros_like(x)
    found = traced(collectives, mode)(*map(tf.constant, (x, rows, mine)))
    for y, wanted in zip(found, (total, rows, x, rows, total), strict=True):
        assert y.dtype == dtype
        assert np.array_equal(y.numpy(), wanted)


@modes
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum, hvd.Min, hvd.Max, hvd.Product], ids=str)
def test_allreduce(op, mode):
    reduced = {
        hvd.Average: lambda stack: stack.mean(0),
        hvd.Sum: lambda stack: stack.sum(0),
        hvd.Min: lambda stack: stack.min(0),
        hvd.Max: lambda stack: stack.max(0),
        hvd.Product: lambda stack: stack.prod(0),
    }[op]
    x = tf.constant(of(RANK, 3, 2))
    factors = FACTORS if op in (hvd.Average, hvd.Sum) else {}
    factor = 1.5 if factors else 1
    (y,), (gradient,) = differentiated(
        lambda x: [hvd.allreduce(x, op=op, name="x", **factors)], mode, x
    )
    close(y, factor * reduced(everyone(3, 2)))
    close(gradient, factor * reduced(weights(3, 2)))


@modes
def test_adasum(mode):
    x = tf.constant(of(RANK, 7))
    y = traced(lambda x: hvd.allreduce(x, op=hvd.Adasum), mode, x)(x)
    np.testing.assert_allclose(y, adasum(list(everyone(7))), rtol=1e-10)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_compression(kind, mode):
    """The results are those of the short numbers; what is whole stays as it is."""
    compression = getattr(hvd.Compression, kind)
    short = {"fp16": tf.float16, "bf16": tf.bfloat16}[kind].as_numpy_dtype
    x = tf.constant(of(RANK, SIZE, 3), tf.float32)
    whole = tf.fill([2], 1_000_001)

    def collectives(x, whole):
        with tf.GradientTape() as tape:
            tape.watch(x)
            a, b = hvd.grouped_allreduce([x, whole], op=hvd.Max, compression=compression)
            c = hvd.reducescatter(x, compression=compression, op=hvd.Max)
        return a, b, c, tape.gradient(a, x)

    a, b, c, gradient = traced(collectives, mode)(x, whole)
    rounded = everyone(SIZE, 3).astype(np.float32).astype(short).astype(np.float32)
    assert a.dtype == c.dtype == gradient.dtype == tf.float32
    assert np.array_equal(a, rounded.max(0))
    assert np.array_equal(b, whole)
    assert np.array_equal(c, rounded.max(0)[RANK : RANK + 1])
    assert np.array_equal(gradient, np.ones((SIZE, 3)))


def test_average_and_the_older_argument():
    x = tf.constant([float(RANK)])
    mean = (SIZE - 1) / 2
    assert hvd.allreduce(x).numpy() == [mean]
    with pytest.warns(DeprecationWarning, match="op="):
        assert hvd.allreduce(x, average=False).numpy() == [mean * SIZE]
    with pytest.raises(hvd.ArgumentError, match="supersedes"):
        hvd.allreduce(x, average=True, op=hvd.Sum)


def test_variables_arrays_and_numbers_are_tensors_too():
    keras = pytest.importorskip("keras")
    for x in (
        tf.Variable([1.0, 2.0]),
        keras.Variable([1.0, 2.0]),
        np.array([1.0, 2.0], np.float32),
        [1.0, 2.0],
    ):
        assert hvd.allreduce(x, op=hvd.Sum).numpy().tolist() == [SIZE, 2 * SIZE]
        assert hvd.allgather(x).shape == [2 * SIZE]
    variable = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        y = hvd.allreduce(variable, op=hvd.Sum)
    assert tape.gradient(y, variable).numpy().tolist() == [SIZE, SIZE]


def test_memory_is_shared():
    """Both ways, where it is aligned; so a tensor's array must not be written to."""
    for dtype in (tf.float32, tf.bfloat16, tf.bool):
        x = tf.cast(tf.ones([5, 3]), dtype)
        assert array_of(x).ctypes.data == array_of(x).ctypes.data
        target = aligned_empty((5, 3), dtype.as_numpy_dtype)
        target[...] = array_of(x)
        assert array_of(tensor_of(target)).ctypes.data == target.ctypes.data


# What moves rows


@modes
def test_allgather(mode):
    """Ranks have different numbers of rows, the last one none (or, alone, two)."""
    counts = [2 + rank for rank in RANKS]
    if SIZE > 1:
        counts[-1] = 0
    begin = sum(counts[:RANK])
    x = tf.constant(of(RANK, counts[RANK], 3))
    (y,), (gradient,) = differentiated(lambda x: [hvd.allgather(x, name="x")], mode, x)
    close(y, np.concatenate([of(rank, n, 3) for rank, n in enumerate(counts)]))
    close(gradient, weights(sum(counts), 3).mean(0)[begin : begin + counts[RANK]])


@modes
def test_allgather_of_scalars(mode):
    x = tf.constant(float(RANK), tf.float64)
    (y,), (gradient,) = differentiated(lambda x: [hvd.allgather(x)], mode, x)
    assert y.numpy().tolist() == list(RANKS)
    assert gradient.shape == []
    close(gradient, weights(SIZE).mean(0)[RANK])


@modes
@pytest.mark.parametrize("root", sorted({0, SIZE - 1}))
def test_broadcast(root, mode):
    x = tf.constant(of(RANK, 2, 3))
    (y,), (gradient,) = differentiated(lambda x: [hvd.broadcast(x, root, "x")], mode, x)
    close(y, of(root, 2, 3))
    close(gradient, weights(2, 3).mean(0) if root == RANK else np.zeros((2, 3)))


@modes
@pytest.mark.parametrize("form", ["none", "list", "int32", "int64"])
def test_alltoall(form, mode):
    """Rank r sends i + r rows to rank i, or one to each; the rows' gradients come back to it."""
    sent = [[1 if form == "none" else i + rank for i in RANKS] for rank in RANKS]
    splits = {"none": None, "list": sent[RANK]}.get(form, tf.constant(sent[RANK], tf.int64))
    if form == "int32":
        splits = tf.cast(splits, tf.int32)
    x = tf.constant(of(RANK, sum(sent[RANK]), 2))
    sources = []

    def exchange(x):
        if form == "none":
            return [hvd.alltoall(x)]
        rows, counts = hvd.alltoall(x, splits)
        sources.append(counts.dtype)
        return [rows, tf.cast(counts, tf.float64)]

    found, (gradient,) = differentiated(exchange, mode, x)
    column = [sent[rank][RANK] for rank in RANKS]
    rows = [of(r, sum(sent[r]), 2)[sum(sent[r][:RANK]) :][: sent[r][RANK]] for r in RANKS]
    close(found[0], np.concatenate(rows))
    if form != "none":
        assert found[1].numpy().tolist() == column
        assert sources[0] == (tf.int64 if form == "int64" else tf.int32)
    wanted = []
    for i in RANKS:  # what rank i received from here came after what lower ranks sent
        theirs = [sent[rank][i] for rank in RANKS]
        begin = sum(theirs[:RANK])
        wanted.append(of(i, sum(theirs), 2, seed=9)[begin : begin + theirs[RANK]])
    close(gradient, np.concatenate(wanted))


def test_alltoall_by_splits_that_the_graph_computes():
    @tf.function(input_signature=[tf.TensorSpec([None]), tf.TensorSpec(None, tf.int32)])
    def exchange(x, splits):
        return hvd.alltoall(x, splits * 2)

    rows, counts = exchange(tf.fill([2 * SIZE], float(RANK)), tf.ones([SIZE], tf.int32))
    assert rows.numpy().tolist() == [float(rank) for rank in RANKS for _ in range(2)]
    assert counts.numpy().tolist() == [2] * SIZE


@modes
@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=str)
def test_reducescatter(op, mode):
    x = tf.constant(of(RANK, SIZE + 1, 2))
    (y,), (gradient,) = differentiated(
        lambda x: [hvd.reducescatter(x, op=op, name="x", **FACTORS)], mode, x
    )
    divisor = 1 if op == hvd.Sum else SIZE
    close(y, 1.5 / divisor * everyone(SIZE + 1, 2).sum(0)[rows_of(RANK, SIZE + 1)])
    shapes = [len(range(SIZE + 1)[rows_of(rank, SIZE + 1)]) for rank in RANKS]
    whole = np.concatenate([of(rank, rows, 2, seed=9) for rank, rows in enumerate(shapes)])
    close(gradient, 1.5 * SIZE / divisor * whole)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_no_elements(shape):
    x = tf.zeros(shape)
    assert hvd.allreduce(x).shape == shape
    assert hvd.allgather(x).shape == (SIZE * shape[0], *shape[1:])
    assert hvd.broadcast(x, 0).shape == shape
    assert hvd.alltoall(tf.zeros((0, 3))).shape == (0, 3)
    assert hvd.reducescatter(tf.zeros((SIZE, 0))).shape == (1, 0)


# Groups


@modes
def test_grouped_allreduce_of_mixed_dtypes(mode):
    xs = [tf.constant(of(RANK, 3)), tf.constant(of(RANK, 2, 2), tf.float32), tf.constant([RANK])]
    function = traced(lambda *xs: hvd.grouped_allreduce(xs, op=hvd.Sum, name="g"), mode, *xs)
    a, b, c = function(*xs)
    close(a, everyone(3).sum(0))
    np.testing.assert_allclose(b, everyone(2, 2).astype(np.float32).sum(0), rtol=1e-6)
    assert c.numpy().tolist() == [sum(RANKS)]


@modes
def test_grouped_gradients(mode):
    """Also where one of the outputs is not used."""
    xs = [tf.constant(of(RANK, RANK + 1)), tf.constant(of(RANK, 2, 2))]
    _, (first, second) = differentiated(lambda *xs: hvd.grouped_allgather(xs, "g"), mode, *xs)
    begin = sum(range(1, RANK + 1))
    close(first, weights(SIZE * (SIZE + 1) // 2).mean(0)[begin : begin + RANK + 1])
    close(second, weights(2 * SIZE, 2).mean(0)[2 * RANK : 2 * RANK + 2])

    xs = [tf.constant(of(RANK, SIZE)), tf.constant(of(RANK, SIZE, 2), tf.float32)]
    for function in (
        lambda *xs: hvd.grouped_reducescatter(xs, op=hvd.Sum)[:1],
        lambda *xs: hvd.grouped_allreduce(xs, op=hvd.Sum)[:1],
        lambda *xs: hvd.grouped_allgather(xs)[:1],
    ):
        _, (first, second) = differentiated(function, mode, *xs)
        assert first.dtype == tf.float64
        assert np.any(first)
        assert second is None or not np.any(second)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_empty_groups(mode):
    def groups():
        return hvd.grouped_allreduce([]), hvd.grouped_allgather([]), hvd.grouped_reducescatter([])

    assert traced(groups, mode)() == ([], [], [])


def slices_of(rank, dtype=np.float64):
    """Rank r has r + 1 rows, some of them for the same place."""
    indices = (np.arange(rank + 1) * 2 + rank) % 3
    return of(rank, rank + 1, 2).astype(dtype), indices


def dense(parts, rows=4):
    table = np.zeros((rows, 2))
    for values, indices in parts:
        np.add.at(table, indices, values)
    return table


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=str)
def test_groups_with_slices(op, mode):
    def reduce(x, values, indices):
        slices = tf.IndexedSlices(values, indices, tf.constant([4, 2], tf.int64))
        a, b, c = hvd.grouped_allreduce([x, slices, x + 1], op=op, **FACTORS)
        assert isinstance(b, tf.IndexedSlices)
        return a, tf.convert_to_tensor(b), c, hvd.allreduce(slices, op=op).dense_shape

    x = tf.constant(of(RANK, 3, seed=1))
    values, indices = slices_of(RANK)
    a, b, c, shape = traced(reduce, mode)(x, tf.constant(values), tf.constant(indices))
    factor = 1.5 / (1 if op == hvd.Sum else SIZE)
    close(a, factor * everyone(3, seed=1).sum(0))
    close(b, factor * dense(map(slices_of, RANKS)))
    close(c, factor * (everyone(3, seed=1) + 1).sum(0))
    assert shape.numpy().tolist() == [4, 2]


def test_slices_of_other_dtypes():
    slices = tf.IndexedSlices(tf.constant([[2, 4]]), tf.constant([0]))
    assert hvd.allreduce(slices).values.numpy().tolist() == [[2 // SIZE, 4 // SIZE]] * SIZE
    half = tf.IndexedSlices(tf.ones((1, 2), tf.bfloat16), tf.constant([0], tf.int64))
    found = hvd.allreduce(half)
    assert found.values.dtype == tf.bfloat16
    assert found.indices.dtype == tf.int64
    np.testing.assert_allclose(tf.cast(found.values, tf.float32), 1 / SIZE, rtol=0.01)
    with pytest.raises(hvd.UnsupportedError, match="not defined for"):
        hvd.allreduce(half, op=hvd.Max)


# Gradients of gradients


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_second_derivative_of_the_sum(mode):
    """With y the sum over ranks and cubes for losses, both derivatives are those of all losses."""

    def twice(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(hvd.allreduce(x, op=hvd.Sum, name="x") ** 3)
            first = inner.gradient(loss, x)
        return first, outer.gradient(first, x)

    first, second = traced(twice, mode)(tf.constant(of(RANK, 4)))
    total = everyone(4).sum(0)
    close(first, SIZE * 3 * total**2)
    close(second, SIZE**2 * 6 * total)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("root", sorted({0, SIZE - 1}))
def test_second_derivatives_of_what_moves_rows(root, mode):
    """Of squares; where one backward averages, the ranks' ones reach a row from one of them."""
    cases = [
        (hvd.allgather, 2 / SIZE),
        (lambda x: hvd.broadcast(x, root), 2 / SIZE * (root == RANK)),
        (hvd.alltoall, 2),
        (lambda x: hvd.alltoall(x, [1] * SIZE)[0], 2),
        (lambda x: hvd.reducescatter(x, op=hvd.Average), 2),
    ]
    for function, wanted in cases:

        def twice(x, function=function):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = tf.reduce_sum(function(x) ** 2)
                first = inner.gradient(loss, x)
            return outer.gradient(first, x)

        second = traced(twice, mode)(tf.constant(of(RANK, SIZE)))
        close(second, np.full(SIZE, wanted))


def test_gradients_through_a_loop():
    """Each turn's rows, and their shapes, are those of that turn."""

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.constant(0.0, tf.float64)
            for i in tf.range(1, 4):
                gathered = hvd.allgather(x[:i])
                received, _ = hvd.alltoall(x[: i * SIZE], tf.fill([SIZE], i))
                total += tf.reduce_sum(gathered) + 10 * tf.reduce_sum(received)
        return tape.gradient(total, x)

    wanted = np.zeros(3 * SIZE)
    for i in range(1, 4):
        wanted[:i] += 1
        wanted[: i * SIZE] += 10
    close(gradient(tf.constant(of(RANK, 3 * SIZE))), wanted)


def test_complex_gradients():
    x = tf.complex(tf.constant(of(RANK, 3)), tf.constant(of(RANK, 3, seed=1)))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = hvd.allreduce(x, op=hvd.Sum)
        loss = tf.reduce_sum(tf.abs(y) ** 2)
    close(tape.gradient(loss, x), 2 * SIZE * y)


def test_infinite_gradients_stay_on_the_root():
    x = tf.constant([1.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = hvd.broadcast(x, 0) * np.inf
    assert tape.gradient(loss, x).numpy().tolist() == [np.inf if RANK == 0 else 0.0]


# Process sets


@pytest.fixture
def upper():
    """The ranks but the first."""
    process_set = hvd.add_process_set(range(1, SIZE))
    yield process_set
    assert hvd.remove_process_set(process_set)


@several
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_process_sets(upper, mode):
    ranks = upper.ranks
    one = tf.constant(of(RANK, len(ranks)))
    if RANK == 0:
        with pytest.raises((hvd.ArgumentError, tf.errors.OpError), match="not in the process set"):
            traced(lambda x: hvd.allreduce(x, process_set=upper), mode)(one)
        return
    here = {"process_set": upper}
    n, place = len(ranks), RANK - 1
    stack = weights(n, ranks=ranks)

    def gradient(function):
        (y,), (found,) = differentiated(lambda x: [function(x)], mode, one)
        return y, found

    y, found = gradient(lambda x: hvd.allreduce(x, op=hvd.Sum, **here))
    close(y, everyone(n, ranks=ranks).sum(0))
    close(found, stack.sum(0))
    y, found = gradient(lambda x: hvd.allgather(x, **here))
    close(y, everyone(n, ranks=ranks).ravel())
    close(found, weights(n * n, ranks=ranks).mean(0)[place * n : place * n + n])
    y, found = gradient(lambda x: hvd.broadcast(x, SIZE - 1, **here))
    close(y, of(SIZE - 1, n))
    close(found, stack.mean(0) * (RANK == SIZE - 1))
    y, found = gradient(lambda x: hvd.alltoall(x, **here))
    close(y, everyone(n, ranks=ranks)[:, place])
    close(found, stack[:, place])
    y, found = gradient(lambda x: hvd.reducescatter(x, op=hvd.Sum, **here))
    close(y, everyone(n, ranks=ranks).sum(0)[place : place + 1])
    close(found, n * weights(1, ranks=ranks).ravel())
    slices = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([RANK]))
    found = hvd.allreduce(slices, op=hvd.Average, **here)
    assert found.indices.numpy().tolist() == ranks
    np.testing.assert_allclose(found.values, 1 / n)


# Errors


def assert_raises(error, text, function, mode):
    """Eagerly the error itself; in a graph one of TensorFlow's, with the text."""
    kind = error if mode == "eager" else tf.errors.OpError
    with pytest.raises(kind, match=text) as caught:
        traced(function, mode)()
    assert error.__name__ in f"{type(caught.value).__name__} {caught.value}"


@several
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_ranks_that_differ(mode):
    odd = RANK == SIZE - 1
    shape = [2 + odd]
    dtype = tf.float64 if odd else tf.float32
    x = tf.zeros([SIZE])
    cases = {
        "shape": [
            lambda: hvd.allreduce(tf.zeros(shape)),
            lambda: hvd.allgather(tf.zeros([2, *shape])),
            lambda: hvd.broadcast(tf.zeros(shape), 0),
            lambda: hvd.alltoall(tf.zeros([SIZE, *shape])),
            lambda: hvd.reducescatter(tf.zeros(shape)),
        ],
        "dtype": [
            lambda: hvd.allreduce(tf.zeros(2, dtype)),
            lambda: hvd.allgather(tf.zeros(2, dtype)),
            lambda: hvd.broadcast(tf.zeros(2, dtype), 0),
            lambda: hvd.alltoall(tf.zeros(SIZE, dtype)),
            lambda: hvd.reducescatter(tf.zeros(SIZE, dtype)),
        ],
        "root_rank": [lambda: hvd.broadcast(x, int(odd))],
        "op": [
            lambda: hvd.allreduce(x, op=hvd.Max if odd else hvd.Min),
            lambda: hvd.reducescatter(x, op=hvd.Max if odd else hvd.Min),
        ],
        "names": [lambda: hvd.allgather(x, name=f"x{int(odd)}")],
        "different collectives": [lambda: hvd.allgather(x) if odd else hvd.allreduce(x)],
    }
    for text, functions in cases.items():
        for function in functions:
            assert_raises(hvd.MismatchError, text, function, mode)
    assert hvd.allreduce(tf.ones([]), op=hvd.Sum) == SIZE


@several
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_one_rank_that_cannot_call(mode):
    odd = RANK == SIZE - 1
    error = hvd.ArgumentError if odd else hvd.MismatchError
    splits = [1] * (SIZE + odd)
    assert_raises(error, "splits", lambda: hvd.alltoall(tf.zeros(SIZE), splits), mode)
    shape = [SIZE + odd]
    assert_raises(error, "shared equally", lambda: hvd.alltoall(tf.zeros(shape)), mode)
    root = SIZE if odd else 0
    assert_raises(error, "is not a rank", lambda: hvd.broadcast(tf.zeros(2), root), mode)


def test_what_is_no_dense_tensor_of_numbers():
    ragged = tf.ragged.constant([[1.0], [2.0, 3.0]])
    sparse = tf.sparse.from_dense([[1.0, 0.0]])
    text = tf.constant(["a"])
    slices = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([0]))
    for function in (
        hvd.allreduce,
        hvd.allgather,
        lambda x: hvd.broadcast(x, 0),
        hvd.alltoall,
        hvd.reducescatter,
    ):
        for x in (ragged, sparse, text):
            with pytest.raises(hvd.UnsupportedError, match="not supported"):
                function(x)
            with pytest.raises(hvd.UnsupportedError, match="not supported"):
                traced(partial(function, x), "graph")()
        if function is not hvd.allreduce:
            with pytest.raises(hvd.UnsupportedError, match="IndexedSlices"):
                function(slices)
    with pytest.raises(hvd.UnsupportedError, match="object"):
        hvd.allreduce(object())


def test_dtypes_that_are_not_reduced():
    with pytest.raises(hvd.UnsupportedError, match="Average is not defined for bool"):
        hvd.allreduce(tf.constant([True]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="Average is not defined for bool"):
        tf.function(hvd.allreduce)(tf.constant([True]))
    with pytest.raises(hvd.UnsupportedError, match="Adasum"):
        hvd.allreduce(tf.constant([1]), op=hvd.Adasum)


@pytest.mark.parametrize(
    "function", [hvd.allreduce, hvd.allgather, hvd.alltoall, hvd.reducescatter, hvd.rank_op]
)
def test_xla(function):
    """It cannot call Python, and would say so in words that nobody understands."""
    with pytest.raises(hvd.UnsupportedError, match="XLA"):
        tf.function(lambda: function(tf.ones([SIZE])), jit_compile=True)()


def test_graphs_of_tensorflow_1():
    with tf.Graph().as_default(), pytest.raises(hvd.UnsupportedError, match=r"tf\.Graph"):
        hvd.allreduce(tf.ones([2]))


def test_not_initialised():
    hvd.shutdown()
    try:
        assert hvd.process_set_included_op().numpy() == -1
        for function in (hvd.allreduce, hvd.allgather):
            with pytest.raises(hvd.NotInitializedError):
                function(tf.ones([2]))
            with pytest.raises(tf.errors.OpError, match=r"call hvd\.init\(\) first"):
                tf.function(function)(tf.ones([2]))
    finally:
        hvd.init()
