"""Buckets start in one order on every rank, whatever the order in which gradients come."""

import itertools
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.worlds import in_group
from hvdkit.dtypes import Adasum, Average, Sum
from hvdkit.engine.bucketing import Gradient
from hvdkit.engine.channel import Channel
from hvdkit.engine.compression import Int8
from hvdkit.engine.compression.base import BucketCodec, Compressor
from hvdkit.engine.handles import Handle
from hvdkit.engine.lane import Lane
from hvdkit.engine.reducer import GradientReducer
from hvdkit.errors import HvdkitError

COUNT = 16  # float32: one aligned place of 64 bytes
SIX = [Gradient(f"g{i}", (4, 4), np.dtype("f4")) for i in range(6)]


class Network(Compressor):
    """Doubles what it is given when it is waited for, as an all-reduce over two ranks would.

    It stands for the compression, the lane and the group.
    """

    def __init__(self, failing=()):
        self.started, self.finished, self.failing = [], [], failing
        self.lane = self.group = self

    def bind(self, *_):
        return Doubling(self)

    def empty(self, count, dtype):
        return np.zeros(count, dtype)

    def submit(self, work):
        self.started.append(f"bucket.{len(self.started) % 3}")

        class Lazy(Handle):
            def wait(self, timeout=None):
                if not self.poll():
                    self.run(work)
                return super().wait(timeout)

        return Lazy()


class Doubling(BucketCodec):
    def __init__(self, network):
        self.network = network

    def allreduce(self, group, buffer, *, op, name, prescale, postscale):
        assert (group, op, prescale, postscale) == (self.network, Average, 1.0, 1.0)
        self.network.finished.append(name)
        if name in self.network.failing:
            raise ConnectionError(name)
        buffer *= 2

    def wire_bytes(self, _):
        return 0


def reducer_over(network, gradients=SIX, bucket_bytes=128):
    return GradientReducer(
        gradients, channel=network, bucket_bytes=bucket_bytes, compression=network
    )


NAMES = ["bucket.0", "bucket.1", "bucket.2"]
PAIRS = [{5, 4}, {3, 2}, {1, 0}]


def put(reducer, index, value=None):
    reducer.views[index][...] = index if value is None else value
    reducer.ready(index)


def test_views_have_the_gradients_shapes_and_share_the_buffers():
    gradients = [
        Gradient("a", (2, 3), np.dtype("f4")),
        Gradient("b", (), np.dtype("f8")),
        Gradient("c", (0, 4), np.dtype("f4")),
        Gradient("d", (5,), np.dtype("f4")),
    ]
    reducer = reducer_over(Network(), gradients, 10**6)
    for view, gradient in zip(reducer.views, gradients, strict=True):
        assert (view.shape, view.dtype) == (gradient.shape, gradient.dtype)
        assert not view.size or any(np.shares_memory(view, b) for b in reducer.buffers)
    for a, b in itertools.combinations(reducer.views, 2):
        assert not np.shares_memory(a, b)


@given(st.permutations(range(6)))
def test_buckets_start_in_plan_order_whatever_the_arrival_order(order):
    network = Network()
    reducer = reducer_over(network)
    came = set()
    for index in order:
        put(reducer, index)
        came.add(index)
        full = [name for name, pair in zip(NAMES, PAIRS, strict=True) if pair <= came]
        in_order = list(itertools.takewhile(full.__contains__, NAMES))
        assert network.started == in_order
    reducer.finish()
    assert network.started == NAMES
    assert [float(view[0, 0]) for view in reducer.views] == [0, 2, 4, 6, 8, 10]


def test_a_gradient_that_comes_twice_is_an_error_that_says_what_to_do():
    reducer = reducer_over(Network())
    put(reducer, 4)
    with pytest.raises(HvdkitError, match="'g4' came a second time before its bucket was"):
        reducer.ready(4)
    put(reducer, 5)
    with pytest.raises(HvdkitError, match="'g5' came a second time"):
        reducer.ready(5)


def test_what_has_not_come_travels_as_it_is():
    """An adapter has put zeros there, or what an earlier step left."""
    network = Network()
    reducer = reducer_over(network)
    for index in reducer.missing():
        reducer.views[index][...] = 7
    put(reducer, 5, 3)
    put(reducer, 0, 1)
    assert network.started == []
    reducer.finish()
    assert network.started == NAMES
    assert [float(view[0, 0]) for view in reducer.views] == [2, 14, 14, 14, 14, 6]


def test_missing_are_those_that_have_not_come_in_plan_order():
    reducer = reducer_over(Network())
    assert reducer.missing() == [5, 4, 3, 2, 1, 0]
    put(reducer, 4)
    put(reducer, 1)
    assert reducer.missing() == [5, 3, 2, 0]
    put(reducer, 5)
    assert reducer.missing() == [3, 2, 0]
    reducer.finish()
    assert reducer.missing() == [5, 4, 3, 2, 1, 0]


def test_in_flight_from_the_first_gradient_to_the_end_of_the_step():
    reducer = reducer_over(Network())
    assert not reducer.in_flight
    put(reducer, 0)
    assert reducer.in_flight
    for index in (5, 4, 3, 2, 1):
        put(reducer, index)
    assert reducer.in_flight
    reducer.finish()
    assert not reducer.in_flight


def test_steps_follow_one_another():
    network = Network()
    reducer = reducer_over(network)
    for step in range(1, 4):
        for index in range(6):
            put(reducer, index, step)
        reducer.finish()
        assert all(np.all(view == 2 * step) for view in reducer.views)
        assert network.started == NAMES * step


def test_an_error_in_one_bucket_still_waits_for_the_others_and_rewinds():
    """Else the next step would write into buffers that are in flight."""
    network = Network(failing=["bucket.0", "bucket.2"])
    reducer = reducer_over(network)
    for index in range(6):
        put(reducer, index, 1)
    with pytest.raises(ConnectionError, match=r"bucket\.0"):
        reducer.finish()
    assert network.finished == NAMES
    assert not reducer.in_flight
    assert reducer.missing() == [5, 4, 3, 2, 1, 0]
    network.failing = ()
    for index in range(6):
        put(reducer, index, 1)
    reducer.finish()
    assert np.all(reducer.views[0] == 2)


def test_a_bucket_that_cannot_be_started_rewinds_after_the_others_have_ended(monkeypatch):
    """Its error is raised; those before it have ended, so that their buffers may be written."""
    network = Network()
    reducer = reducer_over(network)
    submit = network.submit

    def submit_but_one(work):
        if len(network.started) == 1:
            raise ConnectionError("bucket.1")
        return submit(work)

    monkeypatch.setattr(network, "submit", submit_but_one)
    put(reducer, 5)
    put(reducer, 4)
    with pytest.raises(ConnectionError, match=r"bucket\.1"):
        reducer.finish()
    assert not reducer.in_flight
    assert network.finished == network.started == ["bucket.0"]


def test_no_gradients():
    reducer = reducer_over(Network(), [])
    assert not reducer.in_flight
    reducer.finish()
    assert reducer.missing() == []


def test_whether_a_gradient_has_come():
    reducer = reducer_over(Network())
    assert not reducer.has_come(4)
    put(reducer, 4)
    assert reducer.has_come(4)
    assert not reducer.has_come(5)
    put(reducer, 5)
    reducer.finish()
    assert not reducer.has_come(4)


def test_staging_brings_buckets_from_a_device_and_back():
    """Noted when full, fetched before they are reduced, stored after."""
    network = Network()
    log = []
    reducer = GradientReducer(
        SIX,
        channel=network,
        bucket_bytes=128,
        compression=network,
        staging=SimpleNamespace(
            came=lambda number: log.append(("came", number)),
            filled=lambda number: log.append(("filled", number)),
            fetch=lambda number: log.append(("fetch", number, float(reducer.views[5][0, 0]))),
            store=lambda number: log.append(("store", number, float(reducer.views[5][0, 0]))),
        ),
    )
    put(reducer, 5, 1)
    assert log == [("came", 0)]
    put(reducer, 4, 1)
    assert log == [("came", 0), ("came", 0), ("filled", 0)]
    log.clear()
    reducer.finish()
    assert log[:2] == [("filled", 1), ("filled", 2)]
    assert log[2:4] == [("fetch", 0, 1.0), ("store", 0, 2.0)]
    assert [entry[:2] for entry in log[4:]] == [
        *(("fetch", 1), ("store", 1), ("fetch", 2), ("store", 2))
    ]


# Over threads, with real lanes and groups


def on_channels(size, body, gradients=SIX, **how):
    """Call ``body(rank, reducer)`` on ranks that are threads."""

    def rank(group):
        lane = Lane(threaded=True)
        channel = Channel("gradients", tuple(range(size)), group, lane)
        try:
            return body(
                group.rank,
                GradientReducer(gradients, channel=channel, **({"bucket_bytes": 128} | how)),
            )
        finally:
            lane.close()

    return in_group(size, rank)


def step(reducer, order, value):
    for index in order:
        if reducer.views[index] is not None:
            put(reducer, index, value)
    for index in reducer.missing():
        reducer.views[index][...] = 0
    reducer.finish()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("op", "factor"), [(Average, 1), (Sum, None)])
def test_every_rank_ends_with_the_same_reduced_gradients(size, op, factor):
    def body(rank, reducer):
        order = np.random.default_rng(rank).permutation(6)
        for turn in range(3):
            step(reducer, order, rank + turn)
            mean = sum(range(size)) / size + turn
            wanted = 0.5 * 2.0 * mean * (factor or size)
            for view in reducer.views:
                np.testing.assert_array_equal(view, np.full((4, 4), wanted, np.float32))

    on_channels(size, body, op=op, prescale=0.5, postscale=2.0)


def test_adasum_takes_every_gradient_by_itself():
    """Parallel gradients are averaged, orthogonal ones are added, in one bucket."""
    gradients = [Gradient(name, (3,), np.dtype("f8")) for name in ("parallel", "orthogonal")]

    def body(rank, reducer):
        assert len(reducer.buckets) == 1
        reducer.views[0][...] = [1.0, 2.0, 3.0]
        reducer.views[1][...] = np.eye(3)[rank]
        reducer.ready(1)
        reducer.ready(0)
        reducer.finish()
        np.testing.assert_allclose(reducer.views[0], [1, 2, 3])
        np.testing.assert_allclose(reducer.views[1], [1, 1, 0])

    on_channels(2, body, gradients, op=Adasum)


def test_a_compression_reduces_the_buckets():
    def body(rank, reducer):
        assert reducer.wire_bytes < 6 * 64
        step(reducer, range(6), 1.0 + rank)
        for view in reducer.views:
            np.testing.assert_allclose(view, 1.5, rtol=0.02)

    on_channels(2, body, compression=Int8(block=16))


def test_a_gradient_that_failed_on_its_way_is_an_error_on_every_rank():
    """Buckets that differ between ranks: no rank may go on with half a model."""

    def body(rank, reducer):
        if rank == 1:
            reducer.buffers[0] = reducer.buffers[0][:8]
        with pytest.raises(HvdkitError, match=r"'bucket\.0': ranks disagree on the shape"):
            step(reducer, range(6), 1)
        assert not reducer.in_flight

    on_channels(2, body)


# The plan after the first step


def test_after_the_first_step_buckets_follow_the_order_of_rank_0():
    arrivals = [[0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0]]

    def body(rank, reducer):
        assert [bucket.members for bucket in reducer.buckets] == [(5, 4), (3, 2), (1, 0)]
        step(reducer, arrivals[rank], 1)
        assert not reducer.settled
        assert reducer.replan() == []
        assert reducer.settled
        assert [bucket.members for bucket in reducer.buckets] == [(0, 3), (1, 4), (2, 5)]
        step(reducer, arrivals[rank], 2)
        assert all(np.all(view == 2) for view in reducer.views)

    on_channels(2, body)


def test_what_came_twice_counts_where_it_came_first_and_what_never_came_is_last():
    def body(_, reducer):
        for order in ([2, 1], [1, 2, 0]):
            step(reducer, order, 1)
        reducer.replan()
        assert [index for bucket in reducer.buckets for index in bucket.members] == [
            *(2, 1, 0, 5, 4, 3)
        ]

    on_channels(2, body)


def test_gradients_that_are_apart_on_one_rank_have_no_bucket_on_any():
    """An embedding whose gradient is sparse."""

    def body(rank, reducer):
        step(reducer, range(6), 1)
        assert reducer.replan(apart=[3] if rank else [1]) == [1, 3]
        assert [view is None for view in reducer.views] == [False, True] * 2 + [False] * 2
        assert sorted(reducer.missing()) == [0, 2, 4, 5]
        assert not reducer.has_come(3)
        step(reducer, [5, 4, 2, 0], rank)
        assert not reducer.in_flight
        assert all(np.all(view == 0.5) for view in reducer.views if view is not None)

    on_channels(2, body)


def test_a_plan_that_stays_keeps_its_views():
    """Adapters have made gradients of them."""

    def body(_, reducer):
        before = reducer.views
        step(reducer, [5, 4, 3, 2, 1, 0], 1)
        reducer.replan()
        assert reducer.views is before

    on_channels(2, body)


def test_groups_travel_together():
    def body(rank, reducer):
        assert [set(bucket.members) for bucket in reducer.buckets] == [{5}, {3}, {2}, {1, 4, 0}]
        step(reducer, range(6), rank)
        assert all(np.all(view == 0.5) for view in reducer.views)

    on_channels(2, body, groups=[[1, 4, 0]])


def test_a_reducer_that_is_let_go_of_lets_go_of_its_buffers():
    lane = Lane(threaded=True)
    network = Network()
    network.lane = lane
    reducer = reducer_over(network)
    buffer = weakref.ref(reducer.buffers[0])
    for index in range(6):
        put(reducer, index)
    reducer.finish()
    lane.call(threading.get_ident)
    del reducer
    lane.close()
    assert buffer() is None
