"""The all-reduce over several nodes, between real processes: nodes are parts of this machine.

Each of the layouts below says on which node a rank is; each node has an arena of its own.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from drawing import data_of, expected, op_and_dtype, same_on_all_ranks, shapes
from hypothesis import given
from hypothesis import strategies as st

import hvdkit as hvd
from hvdkit import collectives, native
from hvdkit.api import context
from hvdkit.collectives.group import Group
from hvdkit.collectives.hierarchical import open_hierarchy
from hvdkit.dtypes import ReduceOp
from hvdkit.errors import MismatchError
from hvdkit.transport.arena import Arena

RANK, SIZE = hvd.rank(), hvd.size()
HOW = {"name": None, "prescale": 1.0, "postscale": 1.0, "algorithm": "hierarchical"}

pytestmark = pytest.mark.skipif(
    native.why_unavailable() is not None or context().group.arena is None or SIZE < 2,
    reason="needs the native module and shared memory between at least two ranks",
)


def group_over(node_of: Sequence[int]) -> Group:
    """Return a group of all ranks, of which rank r is on node ``node_of[r]``.  Collective."""
    transport = context().group.transport.duplicate()
    local = transport.subset([r for r in range(SIZE) if node_of[r] == node_of[RANK]])
    how = {"kernels": context().group.kernels, "segment_bytes": 1 << 16, "spin": 100}

    def arena() -> Arena | str:
        return Arena.create(local, slot_bytes=1 << 16, spin=100, directory=Path("/dev/shm"))

    hierarchy = open_hierarchy(transport, local, arena, **how)
    return Group(transport, arena="several nodes", hierarchy=hierarchy, **how)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param([rank // 2 for rank in range(SIZE)], id="two a node"),
        pytest.param([rank // 3 for rank in range(SIZE)], id="three a node"),
        pytest.param([rank % 2 for rank in range(SIZE)], id="dealt in turn to two nodes"),
        pytest.param([int(rank > 0) for rank in range(SIZE)], id="all but the first on one"),
        pytest.param(list(range(SIZE)), id="one a node"),
    ],
)
def group(request):
    if len(set(request.param)) == 1:
        pytest.skip("all ranks would be on one node")
    made = group_over(request.param)
    yield made
    made.close()


@given(op_and_dtype(), shapes(), st.integers(0, 2**20), st.booleans())
@same_on_all_ranks(60)
def test_against_numpy(group, op_dtype, shape, seed, in_place):
    op, dtype = op_dtype
    everyone = [data_of(rank, seed, shape, dtype) for rank in range(SIZE)]
    mine = everyone[RANK].copy()
    target = mine if in_place else np.empty_like(mine)
    collectives.allreduce(group, mine, target, op=op, **HOW)
    wanted = expected(op, everyone)
    assert target.dtype == wanted.dtype
    np.testing.assert_array_equal(target.astype(wanted.dtype), wanted)


@pytest.mark.parametrize("count", [1, 1000, 300_001])
def test_same_bits_on_all_ranks(group, count):
    mine = np.random.default_rng(RANK).standard_normal(count).astype(np.float32)
    collectives.allreduce(group, mine, mine, op=ReduceOp.AVERAGE, **HOW)
    everyone = hvd.allgather(mine.view(np.uint32)[np.newaxis])
    assert (everyone == everyone[0]).all()


def test_a_mismatch_is_an_error_everywhere_and_the_next_call_is_right(group):
    wrong = np.ones(1000 + (RANK == SIZE - 1))
    with pytest.raises(MismatchError, match="disagree on the shape"):
        collectives.allreduce(group, wrong, wrong, op=ReduceOp.SUM, **HOW)
    assert (wrong == 1).all()
    x = np.ones(1000)
    collectives.allreduce(group, x, x, op=ReduceOp.SUM, **HOW)
    assert (x == SIZE).all()


def test_gathered_among_all_ranks(group):
    how = HOW | {"algorithm": "gathered"}
    for count in (1, 100, 5000):
        x = np.full(count, RANK + 1, np.int32)
        collectives.allreduce(group, x, x, op=ReduceOp.SUM, **how)
        assert (x == SIZE * (SIZE + 1) // 2).all()


def test_gathered_again_and_again_whatever_comes_in_between(group):
    """Messages that were set up once, in several pieces where they are long."""
    rng = np.random.default_rng(3)  # the same on all ranks
    for turn, count in enumerate(rng.choice([1, 60, 6000, 12_000], 200)):
        x = np.full(count, RANK + turn, np.float64)
        collectives.allreduce(group, x, x, op=ReduceOp.SUM, **(HOW | {"algorithm": "gathered"}))
        assert (x == SIZE * turn + SIZE * (SIZE - 1) // 2).all()
        if rng.integers(5) == 0:
            collectives.barrier(group, name=None, algorithm="dissemination")
        if rng.integers(20) == 0:
            wrong = np.ones(count + RANK)
            with pytest.raises(MismatchError, match="disagree on the shape"):
                collectives.allreduce(
                    group, wrong, wrong, op=ReduceOp.SUM, **(HOW | {"algorithm": "gathered"})
                )
