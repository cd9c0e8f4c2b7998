"""Every schedule executed by threads over rendezvous messages, cut into tiny segments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdkit.collectives.executor import WINDOW, Executor
from hvdkit.collectives.program import bounds_of, even_bounds, lay_out
from hvdkit.dtypes import ReduceOp, bfloat16
from hvdkit.native import NumpyKernels
from hvdkit.schedules.registry import ALGORITHMS, get
from hvdkit.schedules.steps import Exchange

from .worlds import every_kernels, on_ranks

SIZES = (1, 2, 3, 4, 5, 8)
TINY = 16  # bytes of a segment: chunks of a hundred numbers are many of them
REDUCING = [("allreduce", name) for name in ALGORITHMS["allreduce"]]
SEGMENTS = 3

every_size = pytest.mark.parametrize("size", SIZES)


def identify(value):
    return "-".join(value) if isinstance(value, tuple) else None


def integers(size, count, dtype=np.int64, seed=0):
    """What each rank contributes, in numbers whose sum is exact."""
    rng = np.random.default_rng([seed, size])
    return [rng.integers(-99, 100, count).astype(dtype) for _ in range(size)]


def execute(
    kind,
    name,
    arrays,
    *,
    op=ReduceOp.SUM,
    counts=None,
    root=0,
    segment_bytes=TINY,
    kernels=None,
):
    """Run a schedule over copies of `arrays`, one a rank, and return what becomes of them."""
    algorithm = get(kind, name)
    size = len(arrays)
    chunks = algorithm.chunks(size, SEGMENTS)

    def rank(transport):
        data = arrays[transport.rank].copy()
        moves = lay_out(
            algorithm.steps((transport.rank - root) % size, size, chunks),
            size,
            even_bounds(data.size, chunks) if counts is None else bounds_of(counts),
            longest=max(1, segment_bytes // data.itemsize),
            root=root,
        )
        Executor(transport, kernels or NumpyKernels(), spin=0).run(moves, data, op=op)
        return data

    return on_ranks(size, rank)


def assert_all_equal(results, wanted):
    __tracebackhide__ = True
    for rank, result in enumerate(results):
        np.testing.assert_array_equal(result, wanted, err_msg=f"rank {rank}")


# All-reduce


@every_size
@pytest.mark.parametrize("algorithm", REDUCING, ids=identify)
def test_allreduce(algorithm, size):
    arrays = integers(size, 331)
    assert_all_equal(execute(*algorithm, arrays), np.sum(arrays, 0))


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 6])
@pytest.mark.parametrize("algorithm", REDUCING, ids=identify)
def test_allreduce_of_about_as_many_elements_as_ranks(algorithm, count):
    arrays = integers(5, count)
    assert_all_equal(execute(*algorithm, arrays), np.sum(arrays, 0))


@pytest.mark.parametrize("segment_bytes", [1, 8, 40, 10**6])
@pytest.mark.parametrize("algorithm", REDUCING, ids=identify)
def test_allreduce_in_segments_of_any_length(algorithm, segment_bytes):
    """From less than one element to more than the message."""
    arrays = integers(3, 50)
    results = execute(*algorithm, arrays, segment_bytes=segment_bytes)
    assert_all_equal(results, np.sum(arrays, 0))


@pytest.mark.parametrize("algorithm", REDUCING, ids=identify)
@pytest.mark.parametrize(
    ("op", "combine"),
    [
        (ReduceOp.AVERAGE, np.add),
        (ReduceOp.MIN, np.minimum),
        (ReduceOp.MAX, np.maximum),
        (ReduceOp.PRODUCT, np.multiply),
    ],
)
def test_allreduce_with_each_op(algorithm, op, combine):
    arrays = integers(5, 60, np.int32)
    assert_all_equal(execute(*algorithm, arrays, op=op), combine.reduce(arrays, 0, dtype=np.int32))


@pytest.mark.parametrize("algorithm", REDUCING, ids=identify)
def test_allreduce_leaves_every_other_rounding_to_the_kernels(algorithm):
    """16-bit floats: what differs from exact sums is at most a rounding for each addition."""
    arrays = [a.astype(bfloat16) for a in integers(5, 64)]
    results = execute(*algorithm, arrays)
    exact = np.sum([a.astype(np.float64) for a in arrays], 0)
    largest = np.sum([np.abs(a.astype(np.float64)) for a in arrays], 0)
    for result in results:
        assert np.all(np.abs(result.astype(np.float64) - exact) <= 5 * largest * 2.0**-9)


def difficult(size, count, dtype, seed=0):
    """Floats whose sum depends on the order, with NaN, infinities and signed zeros."""
    rng = np.random.default_rng([seed, size])
    numbers = rng.standard_normal((size, count)) * 10.0 ** rng.integers(-3, 4, (size, count))
    special = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0], (size, count))
    return list(np.where(rng.random((size, count)) < 0.4, special, numbers).astype(dtype))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX, ReduceOp.SUM, ReduceOp.PRODUCT])
@pytest.mark.parametrize("dtype", [np.float16, bfloat16.type, np.float32, np.float64])
def test_all_ranks_and_all_kernels_have_the_same_bits(size, op, dtype):
    arrays = difficult(size, 120, dtype)
    if op in (ReduceOp.SUM, ReduceOp.PRODUCT):  # which of several NaN it is, nobody promises
        arrays = [np.where(np.isfinite(a), a, np.ones_like(a)).astype(dtype) for a in arrays]
        arrays = [np.clip(a, dtype(-3), dtype(3)).astype(dtype) for a in arrays]
    for _, name in REDUCING:
        bits = {
            result.tobytes()
            for kernels in every_kernels()
            for result in execute("allreduce", name, arrays, op=op, kernels=kernels)
        }
        assert len(bits) == 1, name


class First(NumpyKernels):
    """Keeps the first operand: an operation that is not commutative."""

    def reduce(self, out, incoming, _op, *, incoming_first):
        if incoming_first:
            out[:] = incoming


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("algorithm", REDUCING, ids=identify)
def test_the_lower_ranks_operand_comes_first(algorithm, size):
    """Two ranks that exchange what they have must not each put its own operand first."""
    arrays = [np.full(40, rank, np.int32) for rank in range(size)]
    results = execute(*algorithm, arrays, kernels=First())
    for result in results:
        assert result.tobytes() == results[0].tobytes()


class Order(NumpyKernels):
    """Sums, and notes which operand was first: contributions are powers of two, one a rank."""

    def __init__(self):
        self.seen = []

    def reduce(self, out, incoming, op, *, incoming_first):
        self.seen.append((incoming_first, int(out[0]), int(incoming[0])))
        super().reduce(out, incoming, op, incoming_first=incoming_first)


def test_the_order_is_that_of_the_two_ranks():
    kernels = Order()
    execute("allreduce", "recursive_doubling", [np.array([1]), np.array([2])], kernels=kernels)
    assert sorted(kernels.seen) == [(False, 1, 2), (True, 2, 1)]


# The other collectives


@every_size
@pytest.mark.parametrize("name", ALGORITHMS["reducescatter"])
@pytest.mark.parametrize("ragged", [False, True])
def test_reducescatter(name, size, ragged):
    counts = [(7 * r) % 5 if ragged else 20 for r in range(size)]
    arrays = integers(size, sum(counts))
    results = execute("reducescatter", name, arrays, counts=counts)
    bounds = list(itertools.accumulate(counts, initial=0))
    for rank, result in enumerate(results):
        part = slice(bounds[rank], bounds[rank + 1])
        np.testing.assert_array_equal(result[part], np.sum(arrays, 0)[part])


@every_size
@pytest.mark.parametrize("name", ALGORITHMS["allgather"])
@pytest.mark.parametrize("counts", [[20] * 8, [0, 3, 50, 1, 0, 0, 9, 17], [0] * 8])
def test_allgather(name, size, counts):
    counts = counts[:size]
    wanted = integers(1, sum(counts))[0]
    bounds = list(itertools.accumulate(counts, initial=0))
    arrays = []
    for rank in range(size):
        mine = np.full_like(wanted, -1000)
        part = slice(bounds[rank], bounds[rank + 1])
        mine[part] = wanted[part]
        arrays.append(mine)
    assert_all_equal(execute("allgather", name, arrays, counts=counts), wanted)


@every_size
@pytest.mark.parametrize("name", ALGORITHMS["broadcast"])
def test_broadcast_from_each_root(name, size):
    arrays = integers(size, 111, np.int16)
    for root in range(size):
        assert_all_equal(execute("broadcast", name, arrays, root=root), arrays[root])


@pytest.mark.parametrize("name", ALGORITHMS["broadcast"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_broadcast_of_next_to_nothing(name, count):
    arrays = integers(4, count)
    assert_all_equal(execute("broadcast", name, arrays, root=3), arrays[3])


@every_size
@pytest.mark.parametrize("name", ALGORITHMS["alltoall"])
def test_alltoall(name, size):
    algorithm = get("alltoall", name)
    splits = np.random.default_rng(size).integers(0, 30, (size, size))
    parts = [[np.arange(splits[a][b]) + 1000 * a + b for b in range(size)] for a in range(size)]

    def rank(transport):
        me = transport.rank
        outgoing, incoming = splits[me].tolist(), splits[:, me].tolist()
        source, target = np.concatenate(parts[me]), np.zeros(sum(incoming), np.int64)
        start = sum(incoming[:me])
        target[start : start + incoming[me]] = parts[me][me]
        moves = lay_out(
            algorithm.steps(me, size, algorithm.chunks(size, 1)),
            size,
            bounds_of(incoming),
            source=bounds_of(outgoing),
            longest=2,
        )
        Executor(transport, NumpyKernels(), spin=0).run(moves, target, source=source)
        return target

    for me, received in enumerate(on_ranks(size, rank)):
        np.testing.assert_array_equal(received, np.concatenate([row[me] for row in parts]))


@every_size
@pytest.mark.parametrize("name", ALGORITHMS["barrier"])
def test_barrier(name, size):
    arrays = [np.zeros(1, np.uint8)] * size
    execute("barrier", name, arrays, op=ReduceOp.MAX)


# Whatever there is, drawn


@st.composite
def cases(draw):
    kind, name = draw(st.sampled_from(REDUCING))
    size = draw(st.integers(1, 5))
    count = draw(st.integers(0, 3 * size + 40))
    return kind, name, size, count, draw(st.integers(1, 100)), draw(st.integers(0, 999))


@given(cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_allreduce(case):
    kind, name, size, count, segment_bytes, seed = case
    arrays = integers(size, count, np.int32, seed)
    results = execute(kind, name, arrays, segment_bytes=segment_bytes)
    assert_all_equal(results, np.sum(arrays, 0, dtype=np.int32))


# How a step is run


class Counting:
    """A transport that notes how many messages are in flight, over a thread's."""

    def __init__(self, transport):
        self.inner, self.rank, self.size = transport, transport.rank, transport.size
        self.sending = []
        self.most = 0
        self.new_backoff = transport.new_backoff

    def isend(self, data, destination):
        request = self.inner.isend(data, destination)
        self.sending = [r for r in self.sending if not r.done] + [request]
        self.most = max(self.most, len(self.sending))
        return request

    def irecv(self, data, source):
        return self.inner.irecv(data, source)


def test_no_more_than_a_window_of_segments_is_in_flight():
    def rank(transport):
        counting = Counting(transport)
        peer = 1 - transport.rank
        step = Exchange(send=(peer, 0), reduce=(peer, 1))
        data = np.arange(2000)
        if transport.rank:
            step = Exchange(send=(peer, 1), reduce=(peer, 0))
        moves = lay_out([step], 2, even_bounds(data.size, 2), longest=2)
        Executor(counting, NumpyKernels(), spin=0).run(moves, data)
        return counting.most

    assert on_ranks(2, rank) == [WINDOW, WINDOW]


class Late:
    """A receive that is posted only after it was looked at a few times."""

    def __init__(self, post):
        self.post, self.looks, self.request = post, 0, None

    def Test(self):  # noqa: N802
        self.looks += 1
        if self.looks == 5:
            self.request = self.post()
        return self.request is not None and self.request.Test()


def test_a_chunk_that_leaves_and_is_reduced_in_one_step_leaves_as_it_was():
    """In recursive doubling: a slow receiver must not get what the sender has already reduced."""

    def rank(transport):
        data = np.full(200, 1 + transport.rank)
        peer = 1 - transport.rank
        receive = transport.irecv
        if transport.rank == 1:
            transport.irecv = lambda *message: Late(lambda: receive(*message))
        step = Exchange(send=(peer, 0), reduce=(peer, 0))
        moves = lay_out([step], 2, even_bounds(data.size, 1), longest=2)
        Executor(transport, NumpyKernels(), spin=0).run(moves, data)
        return data

    assert_all_equal(on_ranks(2, rank), np.full(200, 3))
