"""Every collective against numpy: op x dtype x shape x algorithm, contiguous and not."""

import numpy as np
import pytest
from drawing import data_of, expected, op_and_dtype, same_on_all_ranks, shapes, strided
from hypothesis import given
from hypothesis import strategies as st

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.collectives.pick import known_algorithms
from hvdkit.collectives.reducescatter import rows_per_rank
from hvdkit.dtypes import DTYPES

RANK, SIZE = hvd.rank(), hvd.size()
seeds = st.integers(0, 2**20)


def available(kind):
    """Return the algorithms that can be had here."""
    here = context()
    there = {
        "shm": here.group.arena is not None,
        "hierarchical": here.group.hierarchy is not None,
        "mpi": here.kind == "mpi",
    }
    return [name for name in known_algorithms(kind) if there.get(name, True)]


def algorithms(kind):
    """Strategy of the algorithms that can be had here."""
    return st.sampled_from(available(kind))


def assert_equal(actual, wanted):
    __tracebackhide__ = True
    assert actual.dtype == wanted.dtype
    assert actual.shape == wanted.shape
    np.testing.assert_array_equal(actual.astype(wanted.dtype), wanted)


def assert_same_bits_on_all_ranks(array):
    everyone = hvd.allgather(np.frombuffer(array.tobytes(), np.uint8)[np.newaxis])
    assert (everyone == everyone[0]).all()


@given(op_and_dtype(), shapes(), algorithms("allreduce"), seeds, st.booleans())
@same_on_all_ranks(150)
def test_allreduce(op_dtype, shape, algorithm, seed, contiguous):
    op, dtype = op_dtype
    everyone = [data_of(rank, seed, shape, dtype) for rank in range(SIZE)]
    mine = everyone[RANK] if contiguous else strided(everyone[RANK])
    before = mine.copy()
    result = hvd.allreduce(mine, op=op, algorithm=algorithm)
    assert_equal(result, expected(op, everyone))
    assert_equal(mine, before)
    same = hvd.allreduce_(mine, op=op, algorithm=algorithm)
    assert same is mine
    assert_equal(mine, result)


@given(op_and_dtype(), shapes(1), algorithms("reducescatter"), seeds, st.booleans())
@same_on_all_ranks(80)
def test_reducescatter(op_dtype, shape, algorithm, seed, contiguous):
    op, dtype = op_dtype
    everyone = [data_of(rank, seed, shape, dtype) for rank in range(SIZE)]
    mine = everyone[RANK] if contiguous else strided(everyone[RANK])
    rows = rows_per_rank(shape[0], SIZE)
    start = sum(rows[:RANK])
    wanted = expected(op, everyone)[start : start + rows[RANK]]
    assert_equal(hvd.reducescatter(mine, op=op, algorithm=algorithm), wanted)


@given(st.sampled_from(DTYPES), shapes(), algorithms("allgather"), seeds, st.booleans())
@same_on_all_ranks(80)
def test_allgather(dtype, shape, algorithm, seed, ragged):
    counts = np.random.default_rng(seed).integers(0, 9, SIZE)
    everyone = [
        data_of(rank, seed, (counts[rank], *shape[1:]) if shape and ragged else shape, dtype)
        for rank in range(SIZE)
    ]
    wanted = np.concatenate([np.atleast_1d(theirs) for theirs in everyone])
    assert_equal(hvd.allgather(everyone[RANK], algorithm=algorithm), wanted)


@given(st.sampled_from(DTYPES), shapes(), algorithms("broadcast"), seeds, st.booleans())
@same_on_all_ranks(80)
def test_broadcast(dtype, shape, algorithm, seed, contiguous):
    root = seed % SIZE
    wanted = data_of(root, seed, shape, dtype)
    mine = data_of(RANK, seed, shape, dtype)
    if not contiguous:
        mine = strided(mine)
    before = mine.copy()
    assert_equal(hvd.broadcast(mine, root, algorithm=algorithm), wanted)
    assert_equal(mine, before)
    assert hvd.broadcast_(mine, root, algorithm=algorithm) is mine
    assert_equal(mine, wanted)


@given(st.sampled_from(DTYPES), shapes(1), algorithms("alltoall"), seeds)
@same_on_all_ranks(80)
def test_alltoall(dtype, shape, algorithm, seed):
    splits = np.random.default_rng(seed).integers(0, 6, (SIZE, SIZE))
    everyone = [
        data_of(rank, seed, (splits[rank].sum(), *shape[1:]), dtype) for rank in range(SIZE)
    ]
    parts = [np.split(everyone[rank], np.cumsum(splits[rank])[:-1]) for rank in range(SIZE)]
    wanted = np.concatenate([parts[rank][RANK] for rank in range(SIZE)])
    received, counts = hvd.alltoall(everyone[RANK], splits=splits[RANK], algorithm=algorithm)
    assert_equal(received, wanted)
    assert_equal(counts, splits[:, RANK])


@given(algorithms("alltoall"), st.integers(0, 40))
@same_on_all_ranks(20)
def test_alltoall_in_equal_parts(algorithm, rows):
    everyone = [data_of(rank, rows, (rows * SIZE, 3), np.dtype("f4")) for rank in range(SIZE)]
    wanted = np.concatenate([theirs[RANK * rows : (RANK + 1) * rows] for theirs in everyone])
    assert_equal(hvd.alltoall(everyone[RANK], algorithm=algorithm), wanted)


@given(op_and_dtype(), algorithms("allreduce"), st.integers(1, 3000), seeds)
@same_on_all_ranks(80)
def test_allreduce_is_bitwise_the_same_on_all_ranks_and_again(op_dtype, algorithm, count, seed):
    """With numbers whose sum depends on the order, with NaN, infinities and signed zeros."""
    op, dtype = op_dtype
    rng = np.random.default_rng([seed, RANK])
    if dtype.kind in "fcV":
        numbers = rng.standard_normal(count) * 10.0 ** rng.integers(-3, 3, count)
        special = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], count)
        mine = np.where(rng.random(count) < 0.1, special, numbers).astype(dtype)
    else:
        mine = rng.integers(0, 100, count).astype(dtype)
    with np.errstate(all="ignore"):
        first = hvd.allreduce(mine, op=op, algorithm=algorithm)
        second = hvd.allreduce(mine, op=op, algorithm=algorithm)
    if algorithm != "mpi":  # the library's own promises nothing for NaN
        assert_same_bits_on_all_ranks(first)
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("algorithm", [n for n in available("allreduce") if n != "shm"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32", "complex64"])
def test_scale_factors(algorithm, dtype):
    numpy_dtype = next(d for d in DTYPES if d.name == dtype)
    everyone = [data_of(rank, 5, (1000,), numpy_dtype) * 4 for rank in range(SIZE)]
    result = hvd.allreduce(
        everyone[RANK],
        op=hvd.Sum,
        prescale_factor=0.5,
        postscale_factor=2.0,
        algorithm=algorithm,
    )
    assert_equal(result, expected(hvd.Sum, everyone))
    tripled = hvd.allreduce(everyone[RANK], op=hvd.Sum, postscale_factor=3.0, algorithm=algorithm)
    assert_equal(tripled, expected(hvd.Sum, everyone) * numpy_dtype.type(3))


@pytest.mark.parametrize("algorithm", available("barrier"))
def test_barrier(algorithm):
    for _ in range(20):
        hvd.barrier(algorithm=algorithm)


def test_what_numpy_can_read_is_taken():
    assert_equal(hvd.allreduce(2.5, op=hvd.Sum), np.array(2.5 * SIZE))
    assert_equal(hvd.allreduce([1, 2], op=hvd.Max), np.array([1, 2]))
    assert_equal(hvd.allreduce(memoryview(b"ab"), op=hvd.Min), np.frombuffer(b"ab", np.uint8))
    fortran = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    assert_equal(hvd.allreduce(fortran), np.arange(12.0).reshape(3, 4))


def test_memory_that_ranks_share():
    """Buffers of `hvd.empty` are reduced in place, also at an offset that only some ranks use."""
    buffer = hvd.empty((3, 1000), np.float32)
    assert not buffer.any()
    for step in range(3):
        buffer[...] = np.arange(3000).reshape(3, 1000) + RANK * step
        hvd.allreduce_(buffer, op=hvd.Sum)
        wanted = np.arange(3000).reshape(3, 1000) * SIZE + step * sum(range(SIZE))
        assert_equal(buffer, wanted.astype(np.float32))
    buffer[...] = RANK
    part = buffer[RANK % 2, 17:900]
    hvd.allreduce_(part, op=hvd.Max)
    assert_equal(part, np.full(883, SIZE - 1, np.float32))


def test_memory_that_ranks_share_is_given_back():
    """There is room for 256 regions at a time, and for any number one after the other."""
    for _ in range(300):
        buffer = hvd.empty(3, np.int64)
        part = buffer[1:]
        del buffer
        part[:] = 1
        hvd.allreduce_(part, op=hvd.Sum)
        assert part.tolist() == [SIZE, SIZE]


def test_objects_and_numbers_of_ranks():
    assert hvd.broadcast_object({"rank": RANK}, SIZE - 1) == {"rank": SIZE - 1}
    mine = [hvd.rank(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()]
    rank, local_rank, local_size, cross_rank, cross_size = hvd.allgather(np.array([mine])).T
    assert rank.tolist() == list(range(SIZE))
    assert len(set(zip(local_rank, cross_rank, strict=True))) == SIZE
    assert (local_rank < local_size).all()
    assert (cross_rank < cross_size).all()
    assert local_size[local_rank == 0].sum() == cross_size[cross_rank == 0].sum() == SIZE
