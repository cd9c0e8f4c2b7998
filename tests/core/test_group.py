"""The collectives over a group of threads: agreement, refusal, and every algorithm of ours."""

import numpy as np
import pytest

from hvdkit import collectives
from hvdkit.collectives.alltoall import check_splits
from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.collectives.reducescatter import rows_per_rank
from hvdkit.dtypes import ReduceOp
from hvdkit.errors import ArgumentError, MismatchError, StallError, UnsupportedError
from hvdkit.native import NumpyKernels
from hvdkit.schedules.registry import ALGORITHMS
from hvdkit.transport.base import Backoff

from .worlds import in_group, outcomes

PLAIN = {"name": None, "algorithm": "auto"}
REDUCE = {"op": ReduceOp.SUM, "prescale": 1.0, "postscale": 1.0, **PLAIN}


def allreduce(group, x, **changes):
    out = np.empty_like(x)
    collectives.allreduce(group, x, out, **(REDUCE | changes))
    return out


def reducescatter(group, x, **changes):
    return collectives.reducescatter(group, x, **(REDUCE | changes))


def allgather(group, x, **changes):
    return collectives.allgather(group, x, **(PLAIN | changes))


def broadcast(group, x, root=0, **changes):
    collectives.broadcast(group, x, root=root, **(PLAIN | changes))
    return x


def alltoall(group, x, splits=None, **changes):
    return collectives.alltoall(group, x, splits, **(PLAIN | changes))


def barrier(group, _=None, **changes):
    collectives.barrier(group, **(PLAIN | changes))


EVERY = [allreduce, reducescatter, allgather, broadcast, alltoall, barrier]
every = pytest.mark.parametrize("collective", EVERY, ids=lambda f: f.__name__)


def assert_in_step(group):
    """After an error the ranks are in step, and the next call is right."""
    assert allreduce(group, np.arange(3.0)).tolist() == [0.0, group.size, 2.0 * group.size]


# Agreement


def test_agree_learns_everybodys_values():
    def body(group):
        gathered = group.agree(Call("x", None), [group.rank, 7, -group.rank])
        assert gathered.tolist() == [[r, 7, -r] for r in range(3)]
        assert group.agree(Call("x", None)).shape == (3, 0)

    in_group(3, body)


@pytest.mark.parametrize("values", [(), (1, 2)])
def test_ranks_that_disagree_all_learn_what_each_had(values):
    def body(group):
        group.agree(Call("x", None, (("shape", str(group.rank == 2)),)), values)

    errors = outcomes(4, body)
    assert {type(error) for error in errors} == {MismatchError}
    assert len({str(error) for error in errors}) == 1
    assert "  ranks 0-1, 3:  False\n  rank 2:        True\n" in str(errors[0])


def test_ranks_in_different_calls_with_different_numbers_of_values():
    def body(group):
        group.agree(Call(f"call {group.rank}", None), [1] * group.rank)

    assert all(isinstance(error, MismatchError) for error in outcomes(3, body))


def test_plans_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr("hvdkit.collectives.group.MOST_PLANS", 3)

    def body(group):
        for turn in range(10):
            assert allreduce(group, np.full(turn, 1)).tolist() == [2] * turn
            assert len(group._plans) <= 3

    in_group(2, body)


@every
def test_different_shapes_or_dtypes(collective):
    if collective is barrier:
        pytest.skip("a barrier has neither")

    def body(group):
        with pytest.raises(MismatchError, match="disagree on the dtype"):
            collective(group, np.zeros((4, 2), np.int32 if group.rank else np.int64))
        with pytest.raises(MismatchError, match="disagree on the shape"):
            collective(group, np.zeros((4, 2 + group.rank)))
        assert_in_step(group)

    in_group(2, body)


@every
def test_different_names(collective):
    def body(group):
        with pytest.raises(MismatchError, match=r"different names[\s\S]*name='a'[\s\S]*name='b'"):
            collective(group, np.zeros((4, 2)), name="ab"[group.rank])
        assert_in_step(group)

    in_group(2, body)


def test_different_collectives():
    def body(group):
        with pytest.raises(MismatchError, match="different collectives"):
            EVERY[group.rank](group, np.zeros((6, 6)))
        assert_in_step(group)

    in_group(6, body)


def test_different_roots():
    def body(group):
        with pytest.raises(MismatchError, match="disagree on the root_rank"):
            broadcast(group, np.zeros(3), root=group.rank)
        assert_in_step(group)

    in_group(2, body)


def test_a_kept_plan_is_checked_again_each_time():
    def body(group):
        for _ in range(3):
            allreduce(group, np.zeros(3))
        with pytest.raises(MismatchError, match="disagree on the shape"):
            allreduce(group, np.zeros(3 + group.rank))
        assert_in_step(group)

    in_group(2, body)


# Refusal: the rank at fault gets its own error, the others learn why they need not wait


def assert_refused(call, error, message):
    """`call` fails on rank 1 with `error`; the others learn of it; and all go on."""

    def body(group):
        with pytest.raises(error if group.rank == 1 else MismatchError, match=message) as caught:
            call(group)
        if group.rank != 1:
            assert "rank 1:" in str(caught.value)
            assert error.__name__ in str(caught.value)
        assert_in_step(group)

    in_group(3, body)


@every
def test_one_rank_asks_for_an_unknown_algorithm(collective):
    assert_refused(
        lambda g: collective(g, np.zeros((3, 2)), algorithm="rnig" if g.rank == 1 else "auto"),
        ArgumentError,
        f"unknown {collective.__name__} algorithm 'rnig'",
    )


@every
def test_one_rank_has_a_dtype_that_is_not_supported(collective):
    if collective is barrier:
        pytest.skip("a barrier has no dtype")
    assert_refused(
        lambda g: collective(g, np.zeros((3, 2), "datetime64[s]" if g.rank == 1 else "i8")),
        UnsupportedError,
        "dtype datetime64",
    )


@pytest.mark.parametrize("collective", [allreduce, reducescatter], ids=lambda f: f.__name__)
def test_one_rank_asks_for_an_unknown_op(collective):
    assert_refused(
        lambda g: collective(g, np.zeros(3), op="median" if g.rank == 1 else "sum"),
        ArgumentError,
        "unknown operation 'median'",
    )


@pytest.mark.parametrize("collective", [allreduce, reducescatter], ids=lambda f: f.__name__)
def test_an_op_that_is_not_defined(collective):
    assert_refused(
        lambda g: collective(g, np.zeros(3, bool), op=(ReduceOp.MAX, ReduceOp.AVERAGE)[g.rank % 2]),
        UnsupportedError,
        "not defined for bool",
    )


@pytest.mark.parametrize("root", [-1, 3, "0", None, 1.0])
def test_one_rank_gives_a_root_that_is_none(root):
    assert_refused(
        lambda g: broadcast(g, np.zeros(3), root=root if g.rank == 1 else 0),
        ArgumentError,
        "is not a rank; ranks are 0 to 2",
    )


@pytest.mark.parametrize("collective", [reducescatter, alltoall], ids=lambda f: f.__name__)
def test_one_rank_has_a_scalar(collective):
    assert_refused(
        lambda g: collective(g, np.zeros(() if g.rank == 1 else 3)),
        ArgumentError,
        f"{collective.__name__} needs an array of at least one dimension",
    )


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([1, 1], "2 entries for 3 ranks"),
        ([1, 1, 2], "sum up to 4, but the array has 3 rows"),
        ([2, 2, -1], "negative"),
    ],
)
def test_one_rank_gives_splits_that_do_not_fit(splits, message):
    assert_refused(
        lambda g: alltoall(g, np.zeros(3), splits if g.rank == 1 else [1, 1, 1]),
        ArgumentError,
        message,
    )


def test_rows_that_cannot_be_shared_equally():
    assert_refused(
        lambda g: alltoall(g, np.zeros(4 if g.rank == 1 else 3)),
        ArgumentError,
        "4 rows cannot be shared equally among 3 ranks",
    )


@pytest.mark.parametrize("collective", EVERY, ids=lambda f: f.__name__)
def test_shared_memory_that_there_is_not(collective):
    def body(group):
        with pytest.raises(ArgumentError, match="'shm' cannot be had here: threads share none"):
            collective(group, np.zeros((2, 2)), algorithm="shm")
        assert_in_step(group)

    in_group(2, body)


# What is no number at all: no rank may wait for one whose arguments could not even be read


@pytest.mark.parametrize("collective", [allreduce, reducescatter], ids=lambda f: f.__name__)
@pytest.mark.parametrize("change", [{"op": []}, {"prescale": "half"}, {"postscale": None}], ids=str)
def test_one_rank_gives_nonsense_for_op_or_factor(collective, change):
    assert_refused(
        lambda g: collective(g, np.zeros(3), **(change if g.rank == 1 else {})),
        ArgumentError,
        "operation" if "op" in change else "factor",
    )


@pytest.mark.parametrize("splits", [5, ["a", "b", "c"], [1.5, 1.5, 1.0], [None] * 3], ids=str)
def test_one_rank_gives_nonsense_for_splits(splits):
    assert_refused(
        lambda g: alltoall(g, np.zeros(3), splits if g.rank == 1 else [1, 1, 1]),
        ArgumentError,
        "splits",
    )


# The MPI library's own collectives


@every
def test_algorithm_mpi_needs_mpi(collective):
    def body(group):
        with pytest.raises(UnsupportedError, match="'mpi' needs ranks that are MPI processes"):
            collective(group, np.zeros((2, 2)), algorithm="mpi")
        assert_in_step(group)

    in_group(2, body)


# Results


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["auto", *ALGORITHMS["allreduce"]])
def test_allreduce(name, size):
    def body(group):
        x = np.arange(77, dtype=np.float32).reshape(7, 11) * (group.rank + 1)
        before = x.copy()
        total = allreduce(group, x, algorithm=name)
        np.testing.assert_array_equal(total, np.arange(77).reshape(7, 11) * sum(range(size + 1)))
        np.testing.assert_array_equal(x, before)
        mean = allreduce(
            group, x, op=ReduceOp.AVERAGE, prescale=size, postscale=2.0, algorithm=name
        )
        np.testing.assert_allclose(mean, 2 * total)
        collectives.allreduce(group, x, x, **(REDUCE | {"algorithm": name}))
        np.testing.assert_array_equal(x, total)

    in_group(size, body)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["auto", *ALGORITHMS["reducescatter"]])
@pytest.mark.parametrize("rows", [0, 1, 4, 5, 13])
def test_reducescatter(name, size, rows):
    def body(group):
        x = np.arange(rows * 3).reshape(rows, 3)
        counts = rows_per_rank(rows, size)
        start = sum(counts[: group.rank])
        wanted = (x * size)[start : start + counts[group.rank]]
        np.testing.assert_array_equal(reducescatter(group, x, algorithm=name), wanted)

    in_group(size, body)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["auto", *ALGORITHMS["allgather"]])
def test_allgather(name, size):
    def body(group):
        parts = [np.full((2 * (r % 3), 4), r, np.int16) for r in range(size)]
        gathered = allgather(group, parts[group.rank], algorithm=name)
        np.testing.assert_array_equal(gathered, np.concatenate(parts))
        assert gathered.dtype == np.int16
        assert allgather(group, np.array(group.rank), algorithm=name).tolist() == [*range(size)]

    in_group(size, body)


@pytest.mark.parametrize("name", ["auto", *ALGORITHMS["broadcast"]])
def test_broadcast(name):
    def body(group):
        for root in range(3):
            x = np.full((5, 6), group.rank, np.float16)
            broadcast(group, x, root=root, algorithm=name)
            assert np.all(x == root)

    in_group(3, body)


@pytest.mark.parametrize("name", ["auto", *ALGORITHMS["alltoall"]])
def test_alltoall(name):
    def body(group):
        x = np.repeat(np.arange(3) + 10 * group.rank, [group.rank, 2, 1])
        received, counts = alltoall(group, x, [group.rank, 2, 1], algorithm=name)
        wanted = [[10, 20, 20], [1, 1, 11, 11, 21, 21], [2, 12, 22]][group.rank]
        assert received.tolist() == wanted
        assert counts.tolist() == [[0, 1, 2], [2, 2, 2], [1, 1, 1]][group.rank]

    in_group(3, body)


@pytest.mark.parametrize("name", ["auto", *ALGORITHMS["barrier"]])
def test_no_rank_leaves_a_barrier_before_all_have_come(name):
    came = []

    def body(group):
        for turn in range(1, 6):
            came.append(group.rank)
            barrier(group, algorithm=name)
            assert len(came) >= 4 * turn
            barrier(group, algorithm=name)

    in_group(4, body)


def test_rows_per_rank():
    assert rows_per_rank(7, 3) == (3, 2, 2)
    assert rows_per_rank(2, 3) == (1, 1, 0)
    assert rows_per_rank(0, 2) == (0, 0)


def test_splits_that_fit():
    assert check_splits((6, 2), None, 3) == [2, 2, 2]
    assert check_splits((6,), np.array([1, 0, 5]), 3) == [1, 0, 5]
    assert check_splits((0,), None, 3) == [0, 0, 0]


class Closing:
    """A transport of one rank that notes whether it was closed."""

    rank, size, closed = 0, 1, False

    def close(self):
        self.closed = True

    def interrupt(self, error):
        pass

    def new_backoff(self, spin):
        return Backoff(spin)


@pytest.mark.parametrize("how", ["at rest", "not in step", "failed", "given up"])
def test_a_transport_on_which_messages_may_yet_come_stays(how):
    """Whoever communicates in its place next would take them for its own."""
    transport = Closing()
    group = Group(transport, NumpyKernels(), "none", segment_bytes=64, spin=0)
    if how == "failed":
        group.abort(StallError("too late"))
    if how == "given up":
        group.executor.backoff.abandoned.append("a message")
    group.close(in_step=how != "not in step")
    assert transport.closed == (how == "at rest")
