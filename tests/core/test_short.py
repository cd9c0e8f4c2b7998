"""The all-reduce of short arrays by a schedule, which ranks that expect it begin without asking."""

import sys
import threading
import time

import numpy as np
import pytest

from hvdkit import collectives
from hvdkit.collectives import gathered, prepared, short
from hvdkit.collectives.frames import Frames
from hvdkit.collectives.group import Group
from hvdkit.collectives.joining import serve_joined
from hvdkit.dtypes import DTYPES, ReduceOp
from hvdkit.engine.stall import waits_for_others
from hvdkit.errors import HorovodInternalError, MismatchError
from hvdkit.native import NumpyKernels, why_unavailable
from hvdkit.schedules import flights
from hvdkit.schedules.registry import ALGORITHMS

from .nodes import on_nodes
from .operands import operand, reductions
from .tcp_worlds import on_tcp_ranks
from .worlds import changes_of, every_kernels, in_group

LONG = 1 << 20
"""Segments so long that all short messages are prepared."""

HOW = {"op": ReduceOp.SUM, "name": None, "prescale": 1.0, "postscale": 1.0, "algorithm": "ring"}

needs_native = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
LAYOUTS = [(2, 2), (2, 1), (1, 3), (3, 2), (2, 1, 2), ((0, 2), (1, 3, 4))]


def allreduce(group, x, **changes):
    out = np.empty_like(x)
    collectives.allreduce(group, x, out, **(HOW | changes))
    return out


def barrier(group):
    collectives.barrier(group, name=None, algorithm="auto")


@pytest.fixture(params=["native", "python"])
def way(request, monkeypatch):
    """Who makes a call again, and its steps."""
    if request.param == "python":
        monkeypatch.setattr(short, "recurring", lambda *_: None)
        monkeypatch.setattr(prepared, "quick_schedule", lambda *_: None)
    elif why_unavailable() is not None:
        pytest.skip(str(why_unavailable()))


@pytest.fixture
def agreements(monkeypatch):
    """How many ranks each frame was exchanged among that a rank has exchanged."""
    sizes = []
    plain = Frames.agree

    def agree(self, *args, **kwargs):
        sizes.append(self._transport.size)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Frames, "agree", agree)
    return sizes


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("algorithm", ALGORITHMS["allreduce"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_nobody_asks_once_all_expect_it(algorithm, size, agreements):
    def body(group):
        for turn in range(8):
            x = np.arange(1001, dtype=np.int64) * (group.rank + 1) + turn
            result = allreduce(group, x, algorithm=algorithm)
            assert (result == np.arange(1001) * sum(range(size + 1)) + size * turn).all()
            assert (x == np.arange(1001) * (group.rank + 1) + turn).all()

    in_group(size, body, segment_bytes=LONG)
    assert len(agreements) == 4 * size, "the first three, and the first that comes after two others"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("nodes", LAYOUTS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 3000, 20_001])
@needs_native
def test_over_nodes(nodes, count, agreements):
    def body(group):
        # 3,000 elements cross as one shard, 20,001 as several.
        for turn in range(8):
            x = np.arange(count, dtype=np.float32) + group.rank + turn
            result = allreduce(group, x, algorithm="hierarchical")
            added = sum(range(group.size)) + group.size * turn
            assert (result == group.size * np.arange(count) + added).all()
        return group.size

    sizes = on_nodes(nodes, body, segment_bytes=LONG)
    assert agreements.count(sizes[0]) == 4 * sizes[0], "as above; the others are across nodes"


@pytest.mark.parametrize("algorithm", ["halving_doubling", "all_pairs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_native
def test_the_same_bits_in_python_and_by_the_executor(dtype, algorithm, monkeypatch):
    def results(group):
        found = []
        for how in reductions(dtype):
            x = operand(dtype, group.rank)
            for _ in range(6):  # the fifth is the first that nobody asks about
                out = allreduce(group, x, algorithm=algorithm, **how)
            found.append(out.tobytes())
        return found

    kernels = every_kernels()[-1]
    in_c = in_group(3, results, kernels=kernels, segment_bytes=LONG)
    assert in_c[0] == in_c[1] == in_c[2]
    monkeypatch.setattr(short, "recurring", lambda *_: None)
    monkeypatch.setattr(prepared, "quick_schedule", lambda *_: None)
    assert in_group(3, results, kernels=kernels, segment_bytes=LONG) == in_c
    monkeypatch.setattr(flights, "LONGEST", -1)
    assert in_group(3, results, kernels=kernels, segment_bytes=LONG) == in_c


@pytest.mark.usefixtures("way")
def test_calls_in_any_order():
    """What is expected comes, or another call, of this kind or of others."""

    def body(group):
        rng = np.random.default_rng(7)  # the same on all ranks
        for _ in range(300):
            what = rng.choice(["again", "again", "barrier", "gathered", "long", "object"])
            for _ in range(rng.integers(1, 5)):
                x = np.full({"long": 300_000}.get(what, 300), group.rank + 1.0, np.float32)
                if what == "barrier":
                    barrier(group)
                elif what == "object":
                    assert group.transport.allgather_object(group.rank) == [0, 1]
                else:
                    algorithm = "gathered" if what == "gathered" else "ring"
                    assert (allreduce(group, x, algorithm=algorithm) == 3).all()

    in_group(2, body, segment_bytes=LONG)


@needs_native
def test_ranks_with_and_without_the_module_expect_the_same(monkeypatch):
    plain = short.recurring

    def on_some(general, signature):
        return plain(general, signature) if general._group.rank == 0 else None

    monkeypatch.setattr(short, "recurring", on_some)
    states = []

    def body(group):
        rng = np.random.default_rng(3)
        for _ in range(400):
            count = rng.choice([10, 300, 301])
            algorithm = str(rng.choice(["ring", "ring", "gathered"]))
            for _ in range(rng.integers(1, 6)):
                x = np.full(count, group.rank + 1.0, np.float32)
                assert (allreduce(group, x, algorithm=algorithm) == 6).all()
        states.append(group.frames.state.tolist())

    in_group(3, body, segment_bytes=LONG)
    assert states[0] == states[1] == states[2]


def test_one_other_call_at_the_end_of_a_loop_changes_nothing(agreements):
    def body(group):
        changes = []
        for _ in range(4):
            for _ in range(10):
                assert (allreduce(group, np.ones(300)) == 2).all()
            barrier(group)
            changes.append(changes_of(group.frames.state))
        return changes

    changes = in_group(2, body, segment_bytes=LONG)[0]
    assert changes[-1] == changes[-2]
    agreements.clear()
    in_group(2, body, segment_bytes=LONG)
    # The first loop's four; in each the barrier, and two calls after it, until they are expected.
    assert len(agreements) == 2 * (4 + 4 + 2 * 2)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("algorithm", ["ring", "tree", "all_pairs"])
@pytest.mark.parametrize("before", [0, 1, 5])
def test_ranks_that_disagree_all_learn_it_and_go_on(before, algorithm):
    how = {"algorithm": algorithm}

    def body(group):
        for turn in range(3):
            for _ in range(before):
                assert (allreduce(group, np.full(300, turn), **how) == 3 * turn).all()
            x = np.ones(300 + (group.rank == 2))
            with pytest.raises(MismatchError, match="rank 2"):
                collectives.allreduce(group, x, x, **(HOW | how))
            assert (x == 1).all()
            with pytest.raises(MismatchError, match="rank 1"):
                barrier(group) if group.rank == 1 else allreduce(group, x[:300], **how)

    in_group(3, body, segment_bytes=LONG)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("nodes", [(2, 2), (1, 2), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("other", range(3))
@pytest.mark.parametrize("count", [300, 12_000])
@needs_native
def test_ranks_of_nodes_that_disagree_all_learn_it_and_go_on(nodes, other, count):
    how = {"algorithm": "hierarchical"}

    def body(group):
        for turn in range(2):
            for _ in range(5):
                assert (allreduce(group, np.full(count, turn), **how) == group.size * turn).all()
            x = np.ones(count + (group.rank == other))
            with pytest.raises(MismatchError, match=f"rank {other}"):
                collectives.allreduce(group, x, x, **(HOW | how))
            assert (x == 1).all()
            for _ in range(5):
                allreduce(group, np.ones(count), **how)
            for _ in range(3):
                barrier(group)

    on_nodes(nodes, body, segment_bytes=LONG)


@pytest.mark.usefixtures("way")
def test_a_node_of_which_all_are_in_another_call():
    if why_unavailable() is not None:
        pytest.skip(str(why_unavailable()))
    how = {"algorithm": "hierarchical"}

    def body(group):
        for _ in range(5):
            allreduce(group, np.ones(300), **how)
        with pytest.raises(MismatchError):
            barrier(group) if group.rank < 2 else allreduce(group, np.ones(300), **how)
        return allreduce(group, np.ones(300), **how)[0]

    assert on_nodes((2, 2), body, segment_bytes=LONG) == [4] * 4


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("nodes", [None, (2, 1)])
def test_a_rank_that_has_joined_takes_part(nodes):
    if nodes is not None and why_unavailable() is not None:
        pytest.skip(str(why_unavailable()))
    algorithm = "ring" if nodes is None else "hierarchical"

    def body(group):
        for turn in range(group.rank + 3):
            result = allreduce(group, np.full(300, 2.0), algorithm=algorithm)
            others = 2.0 * sum(turn < rank + 3 for rank in range(3))
            assert (result == others).all()
        serve_joined(group)
        assert (allreduce(group, np.ones(300), algorithm=algorithm) == 3).all()

    if nodes is None:
        in_group(3, body, segment_bytes=LONG)
    else:
        on_nodes(nodes, body, segment_bytes=LONG)


@pytest.mark.usefixtures("way")
def test_what_is_no_longer_kept_is_no_longer_expected(monkeypatch):
    monkeypatch.setattr(prepared, "MOST_KEPT", 2)

    def body(group):
        for counts in ((10,), (10, 20, 30), (10, 20), (40, 50)):
            for _ in range(6):
                for count in counts:
                    assert (allreduce(group, np.ones(count)) == 2).all()

    in_group(2, body, segment_bytes=LONG)


def test_what_is_let_go_of_has_no_memory():
    def body(group):
        collectives.allreduce(group, np.ones(9999), np.ones(9999), **HOW)
        (kept,) = group.prepared._kept.values()
        group.adopt(group.estimates)
        return kept._memory.nbytes, group.prepared._kept

    assert in_group(2, body, segment_bytes=LONG) == [(0, {})] * 2


@needs_native
def test_after_a_tuning_was_adopted_what_was_expected_is_still_refused():
    """What is not there is not expected, until it is made again: a call meanwhile knew nothing."""

    def body(group):
        def expected():
            barrier(group)
            assert (allreduce(group, np.ones(300)) == 2).all()

        def gathered():
            assert (allreduce(group, np.ones(8), algorithm="gathered") == 2).all()

        for _ in range(4):
            expected()
        barrier(group)
        gathered()
        for _ in range(7):
            expected()
        group.adopt(group.estimates)
        barrier(group)
        gathered()
        expected()
        barrier(group)
        with pytest.raises(MismatchError):
            gathered() if group.rank == 0 else allreduce(group, np.ones(300))
        expected()

    in_group(2, body, segment_bytes=LONG)


@pytest.mark.usefixtures("way")
def test_a_call_that_was_interrupted_is_not_begun_again():
    """Its first message would be taken for that of the step in which the others wait."""

    def body(group):
        for _ in range(5):
            allreduce(group, np.ones(300))
        if group.rank == 1:
            return
        group.executor.backoff.stop = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            allreduce(group, np.ones(300))
        group.executor.backoff.stop = None
        with pytest.raises(HorovodInternalError, match="was interrupted"):
            allreduce(group, np.ones(300))
        with pytest.raises(HorovodInternalError, match="was interrupted"):
            barrier(group)

    in_group(2, body, segment_bytes=LONG)


@pytest.mark.usefixtures("way")
def test_what_ended_a_call_is_said_again():
    def body(group):
        for _ in range(5):
            allreduce(group, np.ones(300))
        if group.rank == 1:
            return
        group.executor.backoff.stop = HorovodInternalError("rank 1 is lost")
        for _ in range(2):
            with pytest.raises(HorovodInternalError, match="rank 1 is lost"):
                allreduce(group, np.ones(300))
            group.executor.backoff.stop = None

    in_group(2, body, segment_bytes=LONG)


@needs_native
@pytest.mark.parametrize("before", [0, 5])
def test_a_rank_that_waits_on_its_node_is_known_to_wait(before):
    threads = []

    def body(group):
        for _ in range(before):
            allreduce(group, np.ones(300), algorithm="hierarchical")
        if group.rank == 0:
            threads.append(threading.get_ident())
        if group.rank == 1:
            deadline = time.monotonic() + 20
            while (
                not (threads and waits_for_others(sys._current_frames()[threads[0]]))
                and time.monotonic() < deadline
            ):
                time.sleep(0.01)
            assert time.monotonic() < deadline
        allreduce(group, np.ones(300), algorithm="hierarchical")

    on_nodes((2, 2), body, segment_bytes=LONG)


class Chaos:
    """What all ranks do alike, and what only some do, in an order that depends on a seed.

    Args:
        group: of the rank.
        seed: the same on all ranks.
    """

    ALGORITHMS = ("ring", "tree", "gathered", "halving_doubling", "recursive_doubling")

    def __init__(self, group, seed):
        self.group = group
        self.together = np.random.default_rng(seed)
        self.alone = np.random.default_rng([seed, group.rank])
        names = self.ALGORITHMS + ("hierarchical",) * 4 * (group.hierarchy is not None)
        self.calls = [
            (str(self.together.choice(names)), int(self.together.choice([1, 8, 9, 300, 301, 5000])))
            for _ in range(6)
        ]

    def make(self, call):
        if call is None:
            barrier(self.group)
            return
        algorithm, count = call
        x = np.arange(count) + float(self.group.rank)
        out = x if self.alone.random() < 0.3 else np.full(count, -1.0)
        before = out.copy()
        try:
            collectives.allreduce(self.group, x, out, **(HOW | {"algorithm": algorithm}))
        except MismatchError:
            assert (out == before).all()
            raise
        size = self.group.size
        assert (out == size * np.arange(count) + sum(range(size))).all()

    def play(self, turns):
        for _ in range(turns):
            loop = [self.any() for _ in range(self.together.integers(1, 4))]
            for _ in range(self.together.integers(1, 6)):
                for call in loop:
                    self.make(call)
                    self.disturb()
            if self.together.random() < 0.2:
                self.differ()
        frames = self.group.frames
        lengths = {last: following.length for last, following in frames._following.items()}
        return frames.state.item(0), lengths, self.group.operations

    def any(self):
        place = self.together.integers(len(self.calls) + 1)
        return None if place == len(self.calls) else self.calls[place]

    def disturb(self):
        """Do what one rank may do and another not."""
        if self.alone.random() < 0.03:
            self.group._plans.clear()
        if self.alone.random() < 0.03:
            self.group.recorder = Steps() if self.group.recorder is None else None
        if self.together.random() < 0.01:
            self.group.adopt(self.group.estimates)

    def differ(self):
        one, other = self.any(), self.any()
        others = self.together.random(self.group.size) < 0.5
        differs = one != other and 0 < others.sum() < self.group.size
        try:
            self.make(other if others[self.group.rank] else one)
        except MismatchError:
            assert differs
        else:
            assert not differs


@pytest.mark.parametrize("where", [2, 3, (2, 2), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("seed", range(3))
@needs_native
def test_anything_in_any_order(where, seed, monkeypatch):
    """Ranks natively or not, that lose what they kept, trace, adopt, and disagree."""
    monkeypatch.setattr(prepared, "MOST_KEPT", 3 if seed else 64)
    plain = short.recurring

    def on_some(general, signature):
        native = np.random.default_rng([seed, general._group.rank]).random() < 0.6
        return plain(general, signature) if native else None

    monkeypatch.setattr(short, "recurring", on_some)
    monkeypatch.setattr(gathered, "recurring", on_some)

    def body(group):
        return Chaos(group, seed).play(40)

    run = in_group if isinstance(where, int) else on_nodes
    results = run(where, body, segment_bytes=LONG)
    assert all(result == results[0] for result in results)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("algorithm", ["ring", "tree"])
def test_over_sockets(algorithm):
    def body(t):
        group = Group(t, NumpyKernels(), "sockets", segment_bytes=LONG, spin=100)
        for turn in range(10):
            x = np.arange(5000, dtype=np.float32) + t.rank + turn
            result = allreduce(group, x, algorithm=algorithm)
            assert (result == 3 * np.arange(5000) + 3 + 3 * turn).all()
            if turn in (5, 8):
                with pytest.raises(MismatchError):
                    allreduce(group, x[: 5000 - group.rank], algorithm=algorithm)

    on_tcp_ranks(3, body)


class Steps:
    """Notes steps, as the timeline does."""

    tracing = True

    def __init__(self):
        self.steps = []

    def operation(self, *_args, **_kwargs):
        pass

    def step(self, name, _began, nbytes):
        self.steps.append((name, nbytes))


@pytest.mark.usefixtures("way")
def test_steps_are_told_and_calls_counted():
    def body(group):
        group.recorder = Steps()
        for _ in range(5):
            allreduce(group, np.ones(10), algorithm="recursive_doubling")
        kinds = [
            (kind, dtype, name, calls, nbytes)
            for kind, dtype, name, calls, nbytes, _ in group.counts()
        ]
        return group.recorder.steps, kinds, group.operations

    steps, counts, operations = in_group(2, body, segment_bytes=LONG)[0]
    assert steps == [("step 0: send to 1, reduce from 1", 80)] * 5
    assert counts == [("allreduce", "float64", "recursive_doubling", 5, 400)]
    assert operations == 5


@needs_native
def test_an_error_across_ends_the_waits_of_the_node():
    everyone = threading.Barrier(4)

    def body(group):
        for _ in range(5):
            assert (allreduce(group, np.ones(300), algorithm="hierarchical") == 4).all()
        everyone.wait(30)
        if group.rank in (0, 2):
            group.hierarchy.cross.abort(HorovodInternalError("the link is down"))
        with pytest.raises(HorovodInternalError) as error:
            allreduce(group, np.ones(300), algorithm="hierarchical")
        return str(error.value)

    words = on_nodes((2, 2), body, segment_bytes=LONG)
    assert words[0] == words[2] == "the link is down"
    assert all("cannot go on together" in words[rank] for rank in (1, 3))


@needs_native
def test_what_is_wrong_with_the_arguments_is_an_error():
    from hvdkit.native import _native

    memory, recipe = np.zeros(128, np.uint8), (11, 1, 1.0, 1, 1.0, 5)
    for chunks, steps in (
        (((120, 8),), ()),
        (((4, 8),), ()),
        (((0, 128),), ()),
        (((136, 0),), ()),
        (((0, 6),), ()),
        (((0, 8),), ((print, ((1, 16, True),)),)),
        (((0, 8),), ((print, ((-1, 16, True),)),)),
        (((0, 8),), ((print, ((0, 20, True),)),)),
        (((0, 8),), ((print, ((0, -8, True),)),)),
        (((0, 8),), ((print, ((0, 120, True),)),)),
    ):
        with pytest.raises(ValueError, match=r"memory|chunk"):
            _native.Schedule(memory, 11, chunks, steps)
    made = _native.Schedule(memory, 11, ((0, 8), (16, 8)), ())
    x = np.arange(4, dtype=np.float32)
    with pytest.raises(TypeError, match="takes 4 arguments"):
        made(recipe)
    with pytest.raises(TypeError, match="recipe"):
        made((), 1, x, x)
    with pytest.raises(ValueError, match="the schedule 16"):
        made(recipe, 1, x[:2], x)
    out = np.zeros(4, np.float32)
    assert made((11, 1, 2.0, 1, 0.5, 5), 1, x, out)
    assert out.tolist() == x.tolist()
