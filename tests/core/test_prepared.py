"""Schedules on short messages, whose memory and messages are set up once."""

import numpy as np
import pytest

from hvdkit.collectives import prepared
from hvdkit.collectives.executor import Executor
from hvdkit.collectives.group import Group
from hvdkit.collectives.scheduled import run_schedule
from hvdkit.dtypes import ReduceOp, bfloat16
from hvdkit.errors import HorovodInternalError
from hvdkit.native import NumpyKernels, why_unavailable
from hvdkit.schedules import flights
from hvdkit.schedules.registry import ALGORITHMS

from .nodes import on_nodes
from .tcp_worlds import on_tcp_ranks
from .worlds import in_group

LONG = 1 << 20
"""Segments so long that all short messages are prepared."""


@pytest.fixture(autouse=True)
def all_are_prepared(monkeypatch):
    """Fail where a message goes by way of the executor."""

    def run(*_args, **_kwargs):
        raise AssertionError("the executor was asked")

    monkeypatch.setattr(Executor, "run", run)


@pytest.mark.parametrize("algorithm", ALGORITHMS["allreduce"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_every_all_reduce_again_and_again(algorithm, size, count):
    def body(group):
        for turn in range(3):
            x = np.arange(count, dtype=np.int64) * (group.rank + 1) + turn
            run_schedule(group, "allreduce", algorithm, x)
            weight = sum(range(1, size + 1))
            assert (x == np.arange(count) * weight + size * turn).all()

    in_group(size, body, segment_bytes=LONG)


@pytest.mark.parametrize("algorithm", ALGORITHMS["broadcast"])
@pytest.mark.parametrize("root", [0, 2])
def test_broadcasts(algorithm, root):
    def body(group):
        for turn in range(3):
            x = np.full(77, 10 * group.rank + turn, np.uint8)
            run_schedule(group, "broadcast", algorithm, x, root=root)
            assert (x == 10 * root + turn).all()

    in_group(5, body, segment_bytes=LONG)


def test_dtypes_and_ops_of_one_length_do_not_meet():
    def body(group):
        for _ in range(2):
            for dtype in (np.float32, np.int32, np.float16, bfloat16):
                for op, wanted in ((ReduceOp.SUM, 6), (ReduceOp.MAX, 3), (ReduceOp.PRODUCT, 6)):
                    x = np.full(9, group.rank + 1, np.float32).astype(dtype)
                    run_schedule(group, "allreduce", "ring", x, op=op)
                    assert (x.astype(np.float32) == wanted).all()

    in_group(3, body, segment_bytes=LONG)


def test_the_bits_are_those_of_the_executor(monkeypatch):
    """The lower rank's operand comes first in both."""
    rng = np.random.default_rng(3)
    data = rng.standard_normal((4, 999)).astype(np.float32)

    def body(group):
        x = data[group.rank].copy()
        run_schedule(group, "allreduce", "halving_doubling", x)
        return x

    ours = in_group(4, body, segment_bytes=LONG)
    monkeypatch.undo()
    theirs = in_group(4, body, segment_bytes=64)
    for one, other in zip(ours, theirs, strict=True):
        assert one.tobytes() == other.tobytes() == ours[0].tobytes()


def test_long_messages_and_those_in_many_segments_are_the_executors():
    def body(group):
        with pytest.raises(AssertionError, match="executor"):
            run_schedule(group, "allreduce", "ring", np.ones(flights.LONGEST + 1, np.uint8))
        group.segment_bytes = group.estimates.usual_segment = 100
        run_schedule(group, "allreduce", "ring", np.ones(400, np.uint8))
        with pytest.raises(AssertionError, match="executor"):
            run_schedule(group, "allreduce", "ring", np.ones(401, np.uint8))

    in_group(2, body, segment_bytes=LONG)


def test_few_are_kept_and_all_are_let_go(monkeypatch):
    monkeypatch.setattr(prepared, "MOST_KEPT", 3)
    freed = []
    plain = prepared.PreparedSchedule.free

    def free(self):
        freed.append(self)
        plain(self)

    monkeypatch.setattr(prepared.PreparedSchedule, "free", free)

    def body(group):
        for _ in range(2):
            for count in range(1, 6):
                x = np.ones(count)
                run_schedule(group, "allreduce", "ring", x)
                assert (x == 2).all()
        group.close()

    in_group(2, body, segment_bytes=LONG)
    assert len(freed) == 2 * 10


class Steps:
    """Notes steps, as the timeline does."""

    tracing = True

    def __init__(self):
        self.steps = []

    def step(self, name, began, nbytes):
        assert began > 0
        self.steps.append((name, nbytes))


def test_steps_are_told():
    def body(group):
        group.recorder = Steps()
        run_schedule(group, "allreduce", "recursive_doubling", np.ones(10))
        return group.recorder.steps

    steps = in_group(2, body, segment_bytes=LONG)[0]
    assert steps == [("step 0: send to 1, reduce from 1", 80)]


def test_steps_in_flight_together_are_told_as_one():
    def body(group):
        group.recorder = Steps()
        run_schedule(group, "allreduce", "all_pairs", np.ones(9))
        return group.recorder.steps

    assert in_group(3, body, segment_bytes=LONG)[0] == [
        ("steps 0 to 1: send to 1, reduce from 2; send to 2, reduce from 1", 48),
        ("steps 2 to 3: send to 1, store from 2; send to 2, store from 1", 48),
    ]


def test_abort_ends_the_wait():
    def body(group):
        x = np.ones(10)
        run_schedule(group, "allreduce", "ring", x)
        if group.rank == 0:
            group.executor.backoff.stop = HorovodInternalError("given up")
            with pytest.raises(HorovodInternalError, match="given up"):
                run_schedule(group, "allreduce", "ring", x)
            assert group.executor.backoff.abandoned

    in_group(2, body, segment_bytes=LONG)


def test_more_ranks_than_a_flight_has_steps():
    """Seventeen: two flights a half, in each of which a rank meets all sixteen others."""

    def body(t):
        group = Group(t, NumpyKernels(), "sockets", segment_bytes=LONG, spin=100)
        for turn in range(2):
            x = np.arange(40, dtype=np.int64) * (t.rank + 1) + turn
            run_schedule(group, "allreduce", "all_pairs", x)
            assert (x == np.arange(40) * 153 + 17 * turn).all()

    on_tcp_ranks(17, body)


@pytest.mark.parametrize("algorithm", ALGORITHMS["allreduce"])
def test_over_sockets(algorithm):
    def body(t):
        group = Group(t, NumpyKernels(), "sockets", segment_bytes=LONG, spin=100)
        for turn in range(10):
            x = np.arange(5000, dtype=np.float32) + t.rank + turn
            run_schedule(group, "allreduce", algorithm, x)
            assert (x == 3 * np.arange(5000) + 3 + 3 * turn).all()

    on_tcp_ranks(3, body)


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_across_nodes():
    def body(group):
        for turn in range(3):
            x = np.full(3000, turn, np.float32)
            run_schedule(group.hierarchy.cross, "allreduce", "ring", x)
            assert (x == 2 * turn).all()

    on_nodes((2, 2), body, segment_bytes=LONG)
