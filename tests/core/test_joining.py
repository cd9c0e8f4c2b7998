"""Joining: a rank without data takes part in what the others do, and changes nothing."""

import numpy as np
import pytest

from core.worlds import every_kernels, in_group
from hvdkit import collectives
from hvdkit.collectives.adasum import adasum
from hvdkit.collectives.joining import neutral, serve_joined
from hvdkit.dtypes import DTYPES, Average, Max, Min, Product, ReduceOp, Sum, bfloat16
from hvdkit.errors import ArgumentError, MismatchError, UnsupportedError

PLAIN = {"name": None, "algorithm": "auto"}
OPS = [Sum, Average, Min, Max, Product]


def allreduce(group, x, **changes):
    out = np.empty_like(x)
    how = {"op": Sum, "prescale": 1.0, "postscale": 1.0, **PLAIN}
    collectives.allreduce(group, x, out, **(how | changes))
    return out


def barrier(group, **changes):
    collectives.barrier(group, **(PLAIN | changes))


OTHERS = {
    "allgather": lambda g, x: collectives.allgather(g, x, **PLAIN),
    "broadcast": lambda g, x: collectives.broadcast(g, x, root=0, **PLAIN),
    "alltoall": lambda g, x: collectives.alltoall(g, x, None, **PLAIN),
    "reducescatter": lambda g, x: collectives.reducescatter(
        g, x, op=Sum, prescale=1.0, postscale=1.0, **PLAIN
    ),
}


def undefined(op, dtype):
    return (op is Average and dtype.kind == "b") or (op in (Min, Max) and dtype.kind == "c")


def contributions(dtype, count):
    """Return two ranks' arrays: both signs, zeros, ones and what is large."""
    values = [np.array([-3, 0, 1, 100, -128, 7]), np.array([2, 0, 1, -5, -128, 7])]
    return [np.resize(value, count).astype(dtype) for value in values]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_rank_that_has_joined_changes_no_result(op, dtype):
    """Three ranks, of which the middle one has joined, against the other two alone."""
    if undefined(op, dtype):
        pytest.skip("not defined")

    def alone(group):
        how = {"op": Sum} if op is Average else {"op": op}
        return [allreduce(group, contributions(dtype, n)[group.rank], **how) for n in (0, 1, 50)]

    def with_joined(group):
        if group.rank == 1:
            serve_joined(group)
            return None
        mine = group.rank // 2
        results = [allreduce(group, contributions(dtype, n)[mine], op=op) for n in (0, 1, 50)]
        serve_joined(group)
        return results

    for kernels in every_kernels():
        wanted = in_group(2, alone, kernels=kernels)
        got = in_group(3, with_joined, kernels=kernels)
        for rank in (0, 2):
            for total, result in zip(wanted[0], got[rank], strict=True):
                if op is Average:  # of all three
                    kernels.scale(total := total.copy(), divisor=3)
                np.testing.assert_array_equal(result, total)


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("prescale", [0.5, -2.0, 0.0, 3.0])
def test_factors_do_not_make_something_of_nothing(op, prescale):
    def body(group):
        if group.rank == 0:
            serve_joined(group)
            return
        x = np.array([-3.0, 0.0, 1.0, 1e30])
        result = allreduce(group, x, op=op, prescale=prescale, postscale=2.0)
        divisor = 2 if op is Average else 1
        np.testing.assert_allclose(result, 2.0 * prescale * x / divisor, rtol=1e-15)
        serve_joined(group)

    in_group(2, body)


@pytest.mark.parametrize("prescale", [0.5, -2.0])
@pytest.mark.parametrize("op", [Min, Max], ids=str)
def test_the_smallest_of_scaled_integers(op, prescale):
    def body(group):
        if group.rank == 0:
            serve_joined(group)
            return
        result = allreduce(group, np.array([-100, 0, 100]), op=op, prescale=prescale)
        assert result.tolist() == [-100 * prescale, 0, 100 * prescale]
        serve_joined(group)

    in_group(2, body)


@pytest.mark.parametrize("algorithm", ["ring", "tree", "recursive_doubling", "halving_doubling"])
def test_every_algorithm(algorithm):
    def body(group):
        if group.rank != 3:
            result = allreduce(group, np.arange(40.0), algorithm=algorithm, name="x")
            np.testing.assert_array_equal(result, 3 * np.arange(40.0))
        serve_joined(group)

    in_group(4, body)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_with_fewer_and_fewer_steps(size):
    """Rank r has r + 1 steps; in step k, all ranks from k on still have data."""

    def body(group):
        for step in range(group.rank + 1):
            there = range(step, size)
            assert (
                allreduce(group, np.full(3, group.rank + 1)).tolist()
                == [sum(rank + 1 for rank in there)] * 3
            )
            assert (
                allreduce(group, np.full(3, 6.0), op=Average).tolist()
                == [6.0 * len(there) / size] * 3
            )
        serve_joined(group)

    in_group(size, body)


def test_all_may_join_again_and_again_and_work_between():
    def body(group):
        for turn in range(4):
            if group.rank != turn % 3:
                assert allreduce(group, np.ones(2)).tolist() == [2, 2]
            serve_joined(group)
            assert allreduce(group, np.ones(2)).tolist() == [3, 3]

    in_group(3, body)


@pytest.mark.parametrize("algorithm", ["auto", "dissemination"])
def test_barriers_go_on(algorithm):
    came = []

    def body(group):
        for turn in range(3):
            if group.rank != 2:
                came.append(group.rank)
                barrier(group, algorithm=algorithm, name="b")
                assert len(came) >= 2 * (turn + 1)
                barrier(group, algorithm=algorithm, name="b")
        serve_joined(group)

    in_group(3, body)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_collectives_are_refused_and_the_ranks_are_in_step(kind):
    def body(group):
        if group.rank in (1, 2):
            serve_joined(group)
            return
        for _ in range(2):
            with pytest.raises(UnsupportedError, match=rf"{kind}: ranks 1-2 called join\(\)"):
                OTHERS[kind](group, np.zeros((4, 2)))
            assert allreduce(group, np.ones(2)).tolist() == [2, 2]
        serve_joined(group)

    in_group(4, body)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_adasum_goes_on(size):
    """Of one array and of several; with zeros for the rank that has joined."""

    def body(group):
        if group.rank == 1:
            serve_joined(group)
            return
        result = allreduce(group, np.array([3.0, 4.0]), op=ReduceOp.ADASUM)
        np.testing.assert_allclose(result, [3.0, 4.0])
        parts = [np.array([1.0, 2.0]), np.full((2, 2), 5.0)]
        factors = {"prescale": 0.5, "postscale": 2.0}
        adasum(group, parts, name="parts", **factors)
        np.testing.assert_allclose(parts[0], [1.0, 2.0])
        np.testing.assert_allclose(parts[1], np.full((2, 2), 5.0))
        serve_joined(group)

    in_group(size, body)


def test_the_others_disagree():
    """They get their error, of which no joined rank is part; and that goes on serving."""

    def body(group):
        if group.rank == 0:
            serve_joined(group)
            return
        with pytest.raises(MismatchError, match="allreduce: ranks disagree on the shape") as caught:
            allreduce(group, np.ones(1 + group.rank))
        assert "rank 0" not in str(caught.value)
        assert allreduce(group, np.ones(2)).tolist() == [2, 2]
        serve_joined(group)

    in_group(3, body)


@pytest.mark.parametrize("refused", [(1,), (1, 2)], ids=["one", "both"])
def test_others_that_cannot_make_the_call(refused):
    def body(group):
        if group.rank == 0:
            serve_joined(group)
            return
        op = "median" if group.rank in refused else Sum
        error = ArgumentError if group.rank in refused else MismatchError
        with pytest.raises(error, match="unknown operation 'median'"):
            allreduce(group, np.ones(2), op=op)
        assert allreduce(group, np.ones(2)).tolist() == [2, 2]
        serve_joined(group)

    in_group(3, body)


def test_an_error_that_every_rank_gets_is_not_the_joined_ranks():
    """The MPI library's own all-reduce, where there is no MPI."""

    def body(group):
        if group.rank == 0:
            serve_joined(group)
            return
        with pytest.raises(UnsupportedError, match="'mpi' needs ranks that are MPI processes"):
            allreduce(group, np.ones(2), algorithm="mpi")
        assert allreduce(group, np.ones(2)).tolist() == [1, 1]
        serve_joined(group)

    in_group(2, body)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_neutral(op, dtype):
    if undefined(op, dtype):
        pytest.skip("not defined")
    nothing = neutral(dtype, (2, 3), op, 1.0)
    assert (nothing.dtype, nothing.shape) == (dtype, (2, 3))
    wanted = {Sum: 0, Average: 0, Product: 1}
    if op in wanted:
        assert np.all(nothing == np.array(wanted[op]).astype(dtype))
    elif dtype.kind in "iu":
        info = np.iinfo(dtype)
        assert np.all(nothing == (info.max if op is Min else info.min))
    elif dtype.kind == "b":
        assert np.all(nothing == (op is Min))
    else:
        assert np.all(nothing == np.array(np.inf if op is Min else -np.inf, dtype))


def test_adasum_takes_zeros():
    """Which leave the other as it is."""
    assert neutral(bfloat16, (2,), ReduceOp.ADASUM, 2.0).tolist() == [0, 0]
