"""Calls that are made again and again, and so go the short way; and when one of them changes."""

import numpy as np
import pytest

import hvdkit as hvd
from hvdkit.dtypes import bfloat16

RANK, SIZE = hvd.rank(), hvd.size()
TIMES = 4


def draw(turn, rank, shape):
    return np.random.default_rng([turn, rank]).integers(-50, 50, shape).astype(np.float64)


def everyone(turn, shape):
    return [draw(turn, rank, shape) for rank in range(SIZE)]


def allreduce(turn, shape, name=None):
    return hvd.allreduce(draw(turn, RANK, shape), op=hvd.Sum, name=name), sum(everyone(turn, shape))


def allreduce_in_place(turn, shape, name=None):
    x = draw(turn, RANK, shape)
    assert hvd.allreduce_(x, op=hvd.Sum, name=name) is x
    return x, sum(everyone(turn, shape))


def allgather(turn, shape, name=None):
    return hvd.allgather(draw(turn, RANK, shape), name=name), np.concatenate(everyone(turn, shape))


def reducescatter(turn, shape, name=None):
    result = hvd.reducescatter(draw(turn, RANK, shape), op=hvd.Sum, name=name)
    return result, np.array_split(sum(everyone(turn, shape)), SIZE)[RANK]


def broadcast(turn, shape, name=None):
    mine = draw(turn, RANK, shape)
    kept = mine.copy()
    result = hvd.broadcast(mine, SIZE - 1, name=name)
    np.testing.assert_array_equal(mine, kept)
    return result, draw(turn, SIZE - 1, shape)


def broadcast_in_place(turn, shape, name=None):
    x = draw(turn, RANK, shape)
    assert hvd.broadcast_(x, SIZE - 1, name=name) is x
    return x, draw(turn, SIZE - 1, shape)


def alltoall(turn, shape, name=None):
    rows = shape[0] // SIZE
    mine = slice(RANK * rows, (RANK + 1) * rows)
    result = hvd.alltoall(draw(turn, RANK, shape), name=name)
    return result, np.concatenate([x[mine] for x in everyone(turn, shape)])


COLLECTIVES = [
    allreduce,
    allreduce_in_place,
    allgather,
    reducescatter,
    broadcast,
    broadcast_in_place,
    alltoall,
]


@pytest.mark.parametrize("shape", [(0,), (SIZE,), (3 * SIZE, 5), (SIZE, 40_000)])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_time_the_result_is_of_that_call(collective, shape):
    earlier = []
    for turn in range(TIMES):
        result, wanted = collective(turn, shape)
        np.testing.assert_array_equal(result, wanted)
        earlier.append((result, wanted))
    for result, wanted in earlier:  # none of them has been written to since
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_names_and_shapes_in_turns(collective):
    for turn in range(TIMES):
        for name in ("a", "b", None):
            for rows in (SIZE, 2 * SIZE):
                result, wanted = collective(turn, (rows, 3), name)
                np.testing.assert_array_equal(result, wanted)


def test_bfloat16():
    for turn in range(TIMES):
        x = draw(turn, RANK, (9,)).astype(bfloat16)
        result = hvd.allreduce(x, op=hvd.Sum)
        assert result.dtype == bfloat16
        np.testing.assert_array_equal(result, sum(everyone(turn, (9,))).astype(bfloat16))


@pytest.mark.parametrize("collective", [allgather, reducescatter])
def test_large_results_are_apart(collective):
    """Such memory is used again, but not while anybody has it."""
    shape = (SIZE, (1 << 22) // (SIZE if collective is allgather else 1) + 5)
    kept, wanted_of_kept = collective(0, shape)
    part = kept[..., :7]
    for turn in range(1, 3):
        result, wanted = collective(turn, shape)
        np.testing.assert_array_equal(result, wanted)
        np.testing.assert_array_equal(part, wanted_of_kept[..., :7])
        del result


@pytest.mark.skipif(SIZE == 1, reason="one rank cannot disagree with itself")
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_mismatch_after_many_equal_calls(collective):
    for turn in range(TIMES):
        collective(turn, (SIZE, 2))
    with pytest.raises(hvd.MismatchError):
        collective(0, (SIZE, 3) if RANK == 0 else (SIZE, 2))
    for turn in range(TIMES):
        result, wanted = collective(turn, (SIZE, 2))
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.skipif(SIZE == 1, reason="one rank cannot disagree with itself")
def test_rows_change_on_one_rank_after_many_equal_calls():
    for rows in (4, 4, 4, 4, 5, 5, 4, 4):
        x = np.full((rows if RANK == 0 else 4, 2), RANK, np.float32)
        assert hvd.allgather(x).shape == (rows + 4 * (SIZE - 1), 2)


def test_read_only_and_strided_arrays_after_many_equal_calls():
    for turn in range(TIMES):
        allreduce(turn, (4,))
    x = np.repeat(draw(9, RANK, (4,)), 2)
    np.testing.assert_array_equal(hvd.allreduce(x[::2], op=hvd.Sum), sum(everyone(9, (4,))))
    hvd.allreduce_(x[::2], op=hvd.Sum)
    np.testing.assert_array_equal(x[::2], sum(everyone(9, (4,))))
    x.flags.writeable = False
    if SIZE == 1:
        with pytest.raises(hvd.UnsupportedError, match="writable"):
            hvd.allreduce_(x[:4], op=hvd.Sum)


def test_all_calls_are_counted():
    def counted():
        kinds = ("allgather", "broadcast", "reducescatter", "alltoall")
        return [hvd.stats().get(kind, {}).get("total", {}).get("operations", 0) for kind in kinds]

    before = counted()
    for turn in range(TIMES):
        for collective in (allgather, broadcast, reducescatter, alltoall):
            collective(turn, (SIZE, 7))
    assert counted() == [count + TIMES for count in before]


@pytest.mark.skipif(SIZE == 1, reason="there is no set but that of all ranks")
def test_a_process_set_has_short_ways_of_its_own():
    odd = hvd.add_process_set([rank for rank in range(SIZE) if rank % 2])
    for _ in range(TIMES):
        assert hvd.allreduce(np.ones(2), op=hvd.Sum).tolist() == [SIZE, SIZE]
        if odd.included():
            result = hvd.allreduce(np.ones(2), op=hvd.Sum, process_set=odd)
            assert result.tolist() == [odd.size()] * 2
    hvd.remove_process_set(odd)
