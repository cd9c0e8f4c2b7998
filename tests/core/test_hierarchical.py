"""The all-reduce over several nodes: threads as ranks, each node with an arena of its own."""

import threading

import numpy as np
import pytest

from hvdkit import collectives
from hvdkit.collectives import hierarchical, pick
from hvdkit.collectives.hierarchical import ONE_NODE, Layout
from hvdkit.collectives.joining import serve_joined
from hvdkit.collectives.reduction import plan_reduction
from hvdkit.dtypes import DTYPES, ReduceOp, bfloat16
from hvdkit.errors import ArgumentError, HorovodInternalError, MismatchError, StallError
from hvdkit.native import why_unavailable

from .nodes import on_nodes
from .worlds import in_group

needs_native = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

#: Ranks on each node: the first has none that share one.
NODES = [(1, 1), (1, 1, 1), (2, 2), (3, 2), (1, 2), (2, 1), (2, 2, 1), (1, 3, 1), (4, 1), (3, 3)]
FLOATS = [np.dtype(np.float32), np.dtype(np.float16), bfloat16]
SUM = {"op": ReduceOp.SUM, "name": None, "prescale": 1.0, "postscale": 1.0}
HIERARCHICAL = SUM | {"algorithm": "hierarchical"}


def allreduce(group, x, **changes):
    out = np.empty_like(x)
    collectives.allreduce(group, x, out, **(HIERARCHICAL | changes))
    return out


def data_of(rank, count, dtype, op):
    """Contributions whose combination is exact in every dtype, whatever the order."""
    rng = np.random.default_rng(rank)
    low = 0 if dtype.kind in "ub" else -2
    high = 3 if op is not ReduceOp.PRODUCT else 2
    return rng.integers(low, high, count).astype(dtype)


def wanted(op, everyone):
    stacked = np.stack(everyone)
    if stacked.dtype.kind == "b":
        return stacked.any(0) if op in (ReduceOp.SUM, ReduceOp.MAX) else stacked.all(0)
    wide = stacked.astype(np.float64) if stacked.dtype.kind in "fV" else stacked
    ufunc = {ReduceOp.MIN: np.min, ReduceOp.MAX: np.max, ReduceOp.PRODUCT: np.prod}
    total = ufunc.get(op, np.sum)(wide, axis=0)
    return total.astype(stacked.dtype)


# The layout


def test_layout_of_leaders():
    layout = Layout.of([0, 1, 0, 1, 4, 0])
    assert layout.nodes == ((0, 2, 5), (1, 3), (4,))
    assert layout.shards == 1
    assert layout.per_node == 3
    assert layout.holders(0) == (0, 1, 4)
    assert Layout.of([0, 1, 2]).per_node == 1


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
def test_counts_share_out_all_elements_among_the_holders(count):
    layout = Layout.of([0, 0, 0, 3, 3, 3, 3])
    small, large = layout.counts(count, 3, 3), layout.counts(count, 4, 3)
    assert sum(small) == sum(large) == count
    assert large == (*small, 0)
    assert max(small) - min(small) <= 1


def test_a_short_message_is_one_shard():
    layout = Layout.of([0, 0, 2, 2])
    assert layout.shards_of(hierarchical.ONE_SHARD) == 1
    assert layout.shards_of(hierarchical.ONE_SHARD + 1) == 2
    assert layout.counts(9, 2, 1) == (9, 0)


# The result


@pytest.fixture(params=["small", "large"])
def across(request, monkeypatch):
    """Make shards cross as small ones do, or as large ones."""
    pick.usual_across.cache_clear()
    if request.param == "large":
        monkeypatch.setattr(hierarchical, "ONE_SHARD", -1)
        monkeypatch.setattr(pick, "GATHERED_BY_TWO", -1)
        monkeypatch.setattr(pick, "GATHERED_ACROSS", -1)
    yield
    pick.usual_across.cache_clear()


@needs_native
@pytest.mark.usefixtures("across")
@pytest.mark.parametrize("nodes", NODES, ids=str)
def test_every_op_and_dtype(nodes):
    size = sum(nodes)

    def body(group):
        results = []
        for dtype in DTYPES:
            for op in ReduceOp:
                if op in (ReduceOp.ADASUM, ReduceOp.AVERAGE):
                    continue
                if dtype.kind == "c" and op in (ReduceOp.MIN, ReduceOp.MAX):
                    continue
                x = data_of(group.rank, 37, dtype, op)
                before = x.copy()
                result = allreduce(group, x, op=op)
                everyone = [data_of(rank, 37, dtype, op) for rank in range(size)]
                np.testing.assert_array_equal(result, wanted(op, everyone))
                np.testing.assert_array_equal(x, before)
                results.append(result.tobytes())
        return results

    results = on_nodes(nodes, body)
    assert all(theirs == results[0] for theirs in results)


@needs_native
@pytest.mark.usefixtures("across")
@pytest.mark.parametrize("nodes", NODES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_ranks_end_with_the_same_bits(nodes, dtype):
    def body(group):
        rng = np.random.default_rng(group.rank)
        x = (rng.standard_normal(5003) * 10).astype(dtype)
        options = {"op": ReduceOp.AVERAGE, "prescale": 0.3, "postscale": 7.0}
        return x.astype(np.float64), allreduce(group, x, **options)

    given, results = zip(*on_nodes(nodes, body, segment_bytes=4096), strict=True)
    assert len({result.tobytes() for result in results}) == 1
    exact = sum(given) * 0.3 / len(given) * 7.0
    digits = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}[dtype.name]
    largest = sum(np.abs(x) for x in given) * 2.1 / len(given)
    assert (np.abs(results[0].astype(np.float64) - exact) <= digits * largest + 1e-6).all()


@needs_native
@pytest.mark.parametrize("nodes", [(2, 3), (2, 1, 2), (1, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 4096, 70_001])
def test_lengths_in_place_and_not(nodes, count):
    def body(group):
        x = np.arange(count, dtype=np.int64) + group.rank
        total = np.arange(count) * group.size + sum(range(group.size))
        assert (allreduce(group, x) == total).all()
        collectives.allreduce(group, x, x, **HIERARCHICAL)
        assert (x == total).all()
        assert (allreduce(group, x.reshape(1, -1, 1), op=ReduceOp.MAX)[0, :, 0] == total).all()

    on_nodes(nodes, body, segment_bytes=65536)


@needs_native
def test_integers_are_scaled_as_on_one_node():
    def body(group):
        x = np.array([10, -7, 3], np.int32) * (group.rank + 1)
        result = allreduce(group, x, op=ReduceOp.AVERAGE, prescale=0.5)
        flat = allreduce(group, x, op=ReduceOp.AVERAGE, prescale=0.5, algorithm="ring")
        assert result.tolist() == flat.tolist()

    on_nodes((2, 2), body)


# What is picked


@needs_native
def test_auto_takes_it_where_ranks_share_nodes():
    def body(group):
        x = np.ones(20_000, np.float32)
        plan = collectives.allreduce(group, x, x.copy(), **SUM, algorithm="auto")
        small = collectives.allreduce(group, x[:4], x[:4].copy(), **SUM, algorithm="auto")
        return plan.algorithm, small.algorithm, str(group.hierarchy)

    assert set(on_nodes((2, 3), body, segment_bytes=65536)) == {
        ("hierarchical", "hierarchical", "2 nodes, messages cut in 2 shards")
    }


@needs_native
def test_one_rank_a_node_is_the_flat_schedule():
    def body(group):
        x = np.ones(500_000, np.float32)
        asked = collectives.allreduce(group, x, x.copy(), **HIERARCHICAL)
        auto = collectives.allreduce(group, x, x.copy(), **SUM, algorithm="auto")
        return asked.algorithm, auto.algorithm

    assert set(on_nodes((1, 1, 1), body, segment_bytes=65536)) == {("ring", "ring")}


@needs_native
def test_a_group_on_one_node_says_so():
    def body(group):
        assert group.no_hierarchy == ONE_NODE
        with pytest.raises(ArgumentError, match=f"cannot be had here: {ONE_NODE}"):
            allreduce(group, np.ones(3))
        return allreduce(group, np.ones(3), algorithm="auto").tolist()

    assert on_nodes((3,), body) == [[3.0] * 3] * 3


@needs_native
def test_a_node_without_an_arena_leaves_all_to_the_flat_way():
    def body(group):
        with pytest.raises(ArgumentError, match="no room on the second node"):
            allreduce(group, np.ones(3))
        x = np.ones(20_000)
        plan = collectives.allreduce(group, x, x, **SUM, algorithm="auto")
        assert (x == 5).all()
        return plan.algorithm

    trouble = {2: "no room on the second node"}
    picked = on_nodes((2, 3), body, segment_bytes=65536, trouble=lambda r: trouble.get(r, ""))
    assert set(picked) == {"halving_doubling"}


# Agreement


@needs_native
def test_ranks_that_disagree_all_learn_it_and_go_on():
    def body(group):
        target = np.full(900, 7.0)
        with pytest.raises(MismatchError, match="disagree on the op"):
            op = ReduceOp.MAX if group.rank == 3 else ReduceOp.SUM
            collectives.allreduce(group, np.ones(900), target, **(HIERARCHICAL | {"op": op}))
        assert (target == 7.0).all()
        with pytest.raises(MismatchError, match="different collectives"):
            if group.rank == 0:
                collectives.barrier(group, name=None, algorithm="auto")
            else:
                allreduce(group, np.ones(900))
        assert (allreduce(group, np.ones(900)) == group.size).all()

    on_nodes((2, 2), body)


@needs_native
def test_a_rank_that_has_joined_adds_nothing():
    def body(group):
        if group.rank == 1:
            serve_joined(group)
            return None
        results = [allreduce(group, np.full(n, 2.0)).max() for n in (3, 3000)]
        serve_joined(group)
        return results

    assert on_nodes((2, 3), body) == [[8.0, 8.0], None, [8.0, 8.0], [8.0, 8.0], [8.0, 8.0]]


# The end


@needs_native
def test_an_error_across_ends_the_waits_of_the_node():
    """A rank that lost its peer on another node does not leave those of its own in the arena."""

    def body(group):
        assert group.hierarchy is not None
        cross = group.hierarchy.cross
        if group.rank in (0, 2):  # the holders of the first shard
            cross.abort(HorovodInternalError("the link is down"))
        with pytest.raises(HorovodInternalError) as error:
            allreduce(group, np.ones(900))
        return str(error.value)

    words = on_nodes((2, 2), body)
    assert words[0] == words[2] == "the link is down"
    assert "cannot go on together" in words[1]
    assert "cannot go on together" in words[3]


@needs_native
def test_abort_ends_what_waits_in_the_arena_and_across():
    """Rank 0 waits for rank 1 in the arena, rank 2 for rank 0 across, and rank 3 for rank 1."""

    def body(group):
        if group.rank == 1:
            return
        x = np.ones(900)
        plan = plan_reduction(group, "allreduce", x, **HIERARCHICAL)
        timer = threading.Timer(0.2, group.abort, [StallError("given up")])
        timer.start()
        with pytest.raises(StallError, match="given up"):
            group.hierarchy.allreduce(group, plan, x, x)
        timer.join()
        with pytest.raises(StallError, match="given up"):
            allreduce(group, x)

    on_nodes((2, 2), body)


@needs_native
def test_closing_lets_go_of_the_arena():
    def body(group):
        allreduce(group, np.ones(9))
        group.close()
        with pytest.raises(RuntimeError, match="closed"):
            group.hierarchy.arena.native.barrier(0)

    on_nodes((2, 2), body)


# Small arrays over messages


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 9, 128, 129, 3000])
def test_gathered(size, count):
    def body(group):
        options = {"op": ReduceOp.AVERAGE, "prescale": 2.0, "algorithm": "gathered"}
        x = np.arange(count, dtype=np.float32) * (group.rank + 1)
        result = allreduce(group, x, **options)
        np.testing.assert_array_equal(x, np.arange(count) * (group.rank + 1))
        collectives.allreduce(group, x, x, **(SUM | options))
        np.testing.assert_array_equal(x, result)
        return result

    results = in_group(size, body)
    np.testing.assert_allclose(results[0], np.arange(count) * (size + 1.0), rtol=1e-6)
    assert len({result.tobytes() for result in results}) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX])
def test_gathered_ops_and_dtypes(op, dtype):
    if dtype.kind == "c" and op in (ReduceOp.MIN, ReduceOp.MAX):
        pytest.skip("complex numbers have no order")

    def body(group):
        x = data_of(group.rank, 21, dtype, op)
        return allreduce(group, x, op=op, algorithm="gathered")

    everyone = [data_of(rank, 21, dtype, op) for rank in range(3)]
    for result in in_group(3, body):
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, wanted(op, everyone))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_gathered_16_bit_floats_are_rounded_once(dtype):
    """1 + e + e in steps stays 1 where e is half of what the dtype can tell from 1."""
    half = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype.name]

    def body(group):
        x = np.array([1.0 if group.rank == 0 else half], dtype)
        return float(allreduce(group, x, algorithm="gathered")[0])

    assert in_group(3, body) == [1.0 + 2 * half] * 3


def test_gathered_overflow_is_an_infinity_without_a_warning():
    def body(group):
        return float(allreduce(group, np.array([60000], np.float16), algorithm="gathered")[0])

    assert in_group(2, body) == [np.inf, np.inf]


def test_gathered_leaves_the_target_alone_where_ranks_disagree():
    def body(group):
        x = np.ones(3 + group.rank)
        with pytest.raises(MismatchError, match="disagree on the shape"):
            collectives.allreduce(group, x, x, **(SUM | {"prescale": 3.0, "algorithm": "gathered"}))
        assert (x == 1.0).all()
        assert allreduce(group, np.ones(2), algorithm="gathered").tolist() == [2.0, 2.0]

    in_group(2, body)
