"""The short way: which calls it knows, what it hands to whom, and that it leaks nothing."""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from hvdkit.dtypes import ReduceOp, bfloat16
from hvdkit.engine.lane import Lane
from hvdkit.native import NoShortWay

_native = pytest.importorskip("hvdkit.native._native", reason="no native module is built")

SUM = (ReduceOp.SUM, None, 1.0, "auto")


class Bound:
    """Stands for a collective of the arena: answers with `statuses`, then 0."""

    def __init__(self, *statuses):
        self.statuses = list(statuses)
        self.calls = []

    def __call__(self, source, target):
        self.calls.append((source, target))
        status = self.statuses.pop(0) if self.statuses else 0
        if isinstance(status, Exception):
            raise status
        return status


@pytest.fixture
def lane():
    lane = Lane(threaded=True)
    yield lane
    lane.close()


@pytest.fixture
def group():
    return SimpleNamespace(doing=None)


@pytest.fixture
def way(lane, group):
    return _native.ShortWay(np.ndarray, np.empty, lane, group)


def test_an_array_that_is_not_known_is_the_callers(way):
    x = np.zeros(3, np.float32)
    assert way(x, *SUM) is NotImplemented
    way.remember(x, SUM, Bound(), None, None, None)
    assert way(np.zeros(4, np.float32), *SUM) is NotImplemented
    assert way(np.zeros((3, 1), np.float32), *SUM) is NotImplemented
    assert way(np.zeros(3, np.int32), *SUM) is NotImplemented
    assert way([0.0, 0.0, 0.0], *SUM) is NotImplemented
    assert way(np.zeros((3, 2), np.float32)[:, 0], *SUM) is NotImplemented  # has gaps
    assert way(np.zeros(3, np.float32).view(np.recarray), *SUM) is NotImplemented
    assert way(np.zeros(3, np.float32), *SUM) is not NotImplemented


@pytest.mark.parametrize(
    "other",
    [
        (ReduceOp.MAX, None, 1.0, "auto"),
        (ReduceOp.SUM, "x", 1.0, "auto"),
        (ReduceOp.SUM, None, 2.0, "auto"),
        (ReduceOp.SUM, None, 1, "auto"),
        (ReduceOp.SUM, None, True, "auto"),
        (ReduceOp.SUM, None, np.ones(2), "auto"),
        (ReduceOp.SUM, None, 1.0, "ring"),
        (ReduceOp.SUM, None, 1.0),
        (1, None, 1.0, "auto"),
    ],
)
def test_other_arguments_are_another_call(way, other):
    x = np.zeros(3)
    way.remember(x, SUM, Bound(), None, None, None)
    assert way(x, *other) is NotImplemented


def test_equal_arguments_are_the_same_call(way):
    x = np.zeros(3)
    way.remember(x, (ReduceOp.SUM, "layer.1", 0.5, "auto"), Bound(), None, None, None)
    name = "".join(["layer", ".1"])
    assert way(x, ReduceOp.SUM, name, 1.0 / 2.0, "auto") is x


def test_the_result_is_the_array_itself_or_a_new_one(way, group):
    x, bound = np.zeros((2, 3), np.int16), Bound()
    way.remember(x, ("in place",), bound, "a plan", None, None)
    assert way(x, "in place") is x
    assert group.doing == "a plan"
    way.remember(x, ("new",), bound, "another", None, ((4, 3), x.dtype))
    result = way(x, "new")
    assert (result.shape, result.dtype) == ((4, 3), np.int16)
    assert group.doing == "another"
    assert bound.calls[0] == (x, x)
    assert bound.calls[1][1] is result


def test_a_read_only_array_is_not_written(way):
    x = np.zeros(3)
    x.flags.writeable = False
    way.remember(x, ("in place",), Bound(), None, None, None)
    way.remember(x, ("new",), Bound(), None, None, ((3,), x.dtype))
    assert way(x, "in place") is NotImplemented
    assert way(x, "new").shape == (3,)


def test_differing_signatures_are_tried_again_or_answered(way):
    x, asked = np.zeros(3), []
    way.remember(x, ("again",), Bound(1, 1), None, asked.append, None)
    assert way(x, "again") is x
    assert asked == [x, x] and asked[0] is x
    answer = np.ones(5)
    way.remember(x, ("answer",), Bound(1), None, lambda _: answer, None)
    assert way(x, "answer") is answer


def test_the_lane_is_left_whatever_happens(way, lane):
    def refuse(_):
        raise KeyError("refused")

    x = np.zeros(3)
    way.remember(x, ("fails",), Bound(RuntimeError("died")), None, None, None)
    way.remember(x, ("refused",), Bound(1), None, refuse, None)
    way.remember(x, ("no room",), Bound(), None, None, ((-1,), x.dtype))
    for argument, error in (
        ("fails", RuntimeError),
        ("refused", KeyError),
        ("no room", ValueError),
    ):
        with pytest.raises(error):
            way(x, argument)
        assert not lane.busy()


def test_a_lane_in_use_is_not_waited_for(way, lane):
    x, bound = np.zeros(3), Bound()
    way.remember(x, SUM, bound, None, None, None)
    with lane._busy:
        assert way(x, *SUM) is NotImplemented
    lane.free = False
    assert way(x, *SUM) is NotImplemented
    assert not bound.calls
    lane.free = True
    assert way(x, *SUM) is x


def test_a_call_may_forget_itself(way):
    x = np.zeros(3)
    way.remember(x, SUM, Bound(1), None, lambda _: way.clear(), None)
    assert way(x, *SUM) is x
    assert way(x, *SUM) is NotImplemented


def test_the_latest_of_two_equal_calls_counts(way):
    x, first, second = np.zeros(3), Bound(), Bound()
    way.remember(x, SUM, first, None, None, None)
    way.remember(x, SUM, second, None, None, None)
    way(x, *SUM)
    assert (len(first.calls), len(second.calls)) == (0, 1)


def test_thousands_of_calls_are_kept_and_no_more(way):
    bound = Bound()
    for number in range(4096):
        way.remember(np.zeros(number), SUM, bound, None, None, None)
    assert all(way(np.zeros(number), *SUM) is not NotImplemented for number in (0, 17, 4095))
    way.remember(np.zeros(5000), SUM, bound, None, None, None)
    assert way(np.zeros(17), *SUM) is NotImplemented
    assert way(np.zeros(5000), *SUM) is not NotImplemented


def test_bfloat16_is_not_taken_for_another_number_of_16_bits(way):
    x = np.zeros(3, bfloat16)
    way.remember(x, SUM, Bound(), None, None, None)
    assert way(x, *SUM) is x
    assert way(x.view(np.float16), *SUM) is NotImplemented


def test_nothing_is_leaked(lane, group):
    way = _native.ShortWay(np.ndarray, np.empty, lane, group)
    x, bound = np.zeros(3), Bound()
    way.remember(x, SUM, bound, None, lambda _, keep=way: keep, None)  # a cycle
    before = [sys.getrefcount(thing) for thing in (x, bound, x.dtype, ReduceOp.SUM)]
    for _ in range(100):
        way(x, *SUM)
        way(x, "unknown")
        bound.calls.clear()
    assert [sys.getrefcount(thing) for thing in (x, bound, x.dtype, ReduceOp.SUM)] == before
    gone = weakref.ref(bound)
    del way, bound
    gc.collect()
    assert gone() is None


def test_wrong_use_is_an_error(way, lane, group):
    with pytest.raises(TypeError, match="positional"):
        way(np.zeros(3), op=1)
    with pytest.raises(TypeError, match="6 arguments"):
        way.remember(np.zeros(3))
    with pytest.raises(TypeError, match="tuples"):
        way.remember(np.zeros(3), [], None, None, None, None)
    with pytest.raises(ValueError, match="already"):
        way.__init__(np.ndarray, np.empty, lane, group)
    with pytest.raises(TypeError):
        _native.ShortWay.__new__(_native.ShortWay)(np.zeros(3))


def test_without_the_module_nothing_is_known():
    way = NoShortWay()
    way.remember(np.zeros(3), SUM, Bound(), None, None, None)
    assert way(np.zeros(3), *SUM) is NotImplemented
    way.clear()
