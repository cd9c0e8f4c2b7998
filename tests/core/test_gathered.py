"""The gathered all-reduce: made again by the native module, and by Python where that must."""

import numpy as np
import pytest

from hvdkit import collectives, native
from hvdkit.collectives import gathered
from hvdkit.collectives.calls import Call
from hvdkit.collectives.frames import CHANGES, COUNTS, LAST, VERSION
from hvdkit.dtypes import DTYPES, ReduceOp
from hvdkit.errors import ArgumentError, MismatchError
from hvdkit.native import why_unavailable

from .operands import operand, reductions
from .worlds import in_group

HOW = {"op": ReduceOp.SUM, "name": None, "prescale": 1.0, "postscale": 1.0, "algorithm": "gathered"}
needs_native = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


def allreduce(group, x, **changes):
    out = np.empty_like(x)
    plan = collectives.allreduce(group, x, out, **(HOW | changes))
    return out, plan


@pytest.fixture(params=["native", "python"])
def way(request, monkeypatch):
    """Who makes a call again."""
    if request.param == "python":
        monkeypatch.setattr(gathered, "recurring", lambda *_: None)
    elif why_unavailable() is not None:
        pytest.skip(str(why_unavailable()))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("count", [0, 1, 7, 500, 5000])
def test_calls_like_earlier_ones_have_results_of_their_own(count):
    def body(group):
        for turn in range(6):
            x = np.arange(count, dtype=np.int32) + group.rank + turn
            result, plan = allreduce(group, x)
            assert (result == 3 * np.arange(count) + 3 + 3 * turn).all()
            assert (x == np.arange(count) + group.rank + turn).all()
        return plan.bound.calls

    assert in_group(3, body) == [6] * 3


@pytest.mark.usefixtures("way")
def test_calls_in_any_order():
    """The frame that is expected depends on the call before."""

    def body(group):
        rng = np.random.default_rng(7)  # the same on all ranks
        counts = [1, 3, 200, 400, 401, 20_000]
        for count in rng.choice(counts, 300):
            if rng.integers(10) == 0:
                gathered_object = group.transport.allgather_object(group.rank)
                assert gathered_object == [0, 1]
            x = np.full(count, group.rank + 1.0, np.float32)
            result, _ = allreduce(group, x)
            assert (result == 3).all()

    in_group(2, body)


@needs_native
def test_the_native_module_makes_what_comes_as_it_came(monkeypatch):
    python = []
    plain = gathered.GatheredAllreduce.__call__

    def counted(self, source, target):
        python.append(source.size)
        return plain(self, source, target)

    monkeypatch.setattr(gathered.GatheredAllreduce, "__call__", counted)

    def body(group):
        for _ in range(50):
            for count in (1, 500):
                allreduce(group, np.ones(count, np.float32))

    in_group(2, body)
    # Python takes the first turn, in which 500 do not fit, and what follows until all is as before.
    assert len(python) <= 2 * 6

    def loops(group):
        for _ in range(20):
            group.differs(Call("barrier", None))  # a call that has nothing to tell
            for _ in range(3):
                allreduce(group, np.ones(500, np.float32))

    python.clear()
    in_group(2, loops)
    # In turn it comes after itself and after another call; both ways are known.
    assert len(python) <= 2 * 8

    def sometimes(group):
        for turn in range(24):
            for _ in range(1 if turn % 3 else 5):
                group.differs(Call("barrier", None))
            if turn == 8:
                python.clear()
            for _ in range(5):
                allreduce(group, np.ones(500, np.float32))

    in_group(2, sometimes)
    # After two barriers another comes, or this: to expect one of them anew concerns no other call.
    assert len(python) <= 2 * 8


@needs_native
def test_what_is_no_longer_expected_is_not_made_natively():
    from hvdkit.native import _native

    made = _native.Recurring(lambda *_: 7, 5)
    state = np.zeros(COUNTS + VERSION + 1, np.int64)
    made.prepare(state, 0, COUNTS, True, lambda *_: True, lambda *_: 8)
    assert made(1, 2) == 0
    state[LAST] = 0
    assert made(1, 2) == 0
    state[[LAST, COUNTS + VERSION]] = 0, 1
    assert made(1, 2) == 7
    made.prepare(state, 0, COUNTS, True, lambda *_: False, lambda *_: 8)
    assert made(1, 2) == 8, "which has taken the place of the other"
    state[[LAST, CHANGES]] = 0, 1
    assert made(1, 2) == 7


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_as_in_python(dtype, monkeypatch):
    def results(group):
        found = []
        for how in reductions(dtype):
            x = operand(dtype, group.rank)
            for _ in range(3):
                out, _ = allreduce(group, x, **how)
            found.append(out.tobytes())
        return found

    kernels = native.load()
    in_c = in_group(3, results, kernels=kernels)
    monkeypatch.setattr(gathered, "recurring", lambda *_: None)
    assert in_group(3, results, kernels=kernels) == in_c
    assert in_c[0] == in_c[1] == in_c[2]


@pytest.mark.usefixtures("way")
def test_a_mismatch_is_an_error_on_every_rank_and_what_comes_next_is_right():
    def body(group):
        for _ in range(3):
            allreduce(group, np.ones(3, np.float32))
        x = np.ones(3 + group.rank, np.float32)
        with pytest.raises(MismatchError, match="disagree on the shape"):
            collectives.allreduce(group, x, x, **HOW)
        assert (x == 1).all()
        result, _ = allreduce(group, np.ones(3, np.float32))
        return result.tolist()

    assert in_group(2, body) == [[2, 2, 2]] * 2


@needs_native
def test_what_is_wrong_with_the_arguments_is_an_error():
    from hvdkit.native import _native

    recipe = (11, 1, 1.0, 1, 1.0, 5)
    rows = np.zeros((2, 4), np.int64)
    with pytest.raises(TypeError):
        _native.Gathered(None)
    with pytest.raises(TypeError, match="takes 6 arguments"):
        _native.Gathered(recipe[:5], rows, 0, 2, print)
    with pytest.raises(ValueError, match="no frames"):
        _native.Gathered(recipe, rows, 2, 2, print)
    with pytest.raises(TypeError):
        _native.Recurring(None)
    made = _native.Recurring(lambda *_: 0, 5)
    with pytest.raises(TypeError, match="takes 2 arguments"):
        made(1)
    assert made(1, 2) == 0, "nothing is prepared"
    state = np.zeros(COUNTS + 2, np.int64)  # one less than counts have
    with pytest.raises(ValueError, match="no state"):
        made.prepare(state[:2], 0, 0, False, print, print)
    for counts, expected in ((4, False), (0, True)):
        with pytest.raises(ValueError, match="no such counts"):
            made.prepare(state, 0, counts, expected, print, print)
    assert made(1, 2) == 0, "what failed has prepared nothing"


def test_an_algorithm_that_is_not_known_is_still_an_error():
    def body(group):
        with pytest.raises(ArgumentError, match="gathered"):
            allreduce(group, np.ones(1), algorithm="gather")

    in_group(2, body)
