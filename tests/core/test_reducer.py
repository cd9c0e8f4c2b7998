"""Buckets start in one order on every rank, whatever the order in which gradients come."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdkit.engine.bucketing import Gradient
from hvdkit.engine.progress import Handle
from hvdkit.engine.reducer import GradientReducer
from hvdkit.errors import HvdkitError

COUNT = 16  # float32: one aligned place of 64 bytes
SIX = [Gradient(f"g{i}", (4, 4), np.dtype("f4")) for i in range(6)]


class Network:
    """Doubles what it is given when it is waited for, as an all-reduce over two ranks would."""

    def __init__(self, failing=()):
        self.started, self.finished, self.failing = [], [], failing

    def start(self, buffer, name):
        self.started.append(name)
        network = self

        def work():
            network.finished.append(name)
            if name in network.failing:
                raise ConnectionError(name)
            buffer.__imul__(2)

        class Lazy(Handle):
            def wait(self, timeout=None):
                if not self.poll():
                    self.run()
                return super().wait(timeout)

        return Lazy(work)


def reducer_over(network, gradients=SIX, bucket_bytes=128):
    return GradientReducer(
        gradients,
        bucket_bytes=bucket_bytes,
        allocate=np.zeros,
        start=network.start,
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
    with pytest.raises(HvdkitError, match=r"'g4' came a second time.*step\(\)"):
        reducer.ready(4)
    put(reducer, 5)
    with pytest.raises(HvdkitError, match="'g5' came a second time"):
        reducer.ready(5)


def test_absent_gradients_count_as_zeros():
    network = Network()
    reducer = reducer_over(network)
    for view in reducer.views:
        view[...] = 7  # of the step before
    put(reducer, 5, 3)
    put(reducer, 0, 1)
    assert network.started == []
    reducer.finish()
    assert network.started == NAMES
    assert [float(view[0, 0]) for view in reducer.views] == [2, 0, 0, 0, 0, 6]


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


def test_a_bucket_that_cannot_be_started_rewinds_after_the_others_have_ended():
    """Its error is raised; those before it have ended, so that their buffers may be written."""
    network = Network()
    reducer = reducer_over(network)
    start = network.start

    def start_but_one(buffer, name):
        if name == "bucket.1":
            raise ConnectionError(name)
        return start(buffer, name)

    reducer._start = start_but_one
    put(reducer, 5)
    put(reducer, 4)
    with pytest.raises(ConnectionError, match=r"bucket\.1"):
        reducer.finish()
    assert not reducer.in_flight
    assert network.finished == network.started


def test_no_gradients():
    reducer = reducer_over(Network(), [])
    assert not reducer.in_flight
    reducer.finish()
    assert reducer.missing() == []
