"""The watch: stalls are warned of or ended, deadlocks are ended, and nobody else is disturbed."""

import logging
import threading
from types import SimpleNamespace

import pytest

from hvdkit.collectives.calls import JOIN, Call
from hvdkit.engine import channel as channel_module
from hvdkit.engine import stall
from hvdkit.engine.channel import Channel, Stage
from hvdkit.engine.handles import Handle
from hvdkit.engine.lane import Lane
from hvdkit.engine.stall import Abort, Farewell, Question, Watch
from hvdkit.engine.waits import Report
from hvdkit.errors import PeerError, StallError

WORLD = "all ranks"
X = (0, "x")


# A channel, looked at now and then


def test_how_long_is_known_from_one_look_to_the_next(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(
        channel_module, "time", SimpleNamespace(perf_counter=lambda: clock.now), raising=True
    )
    group = SimpleNamespace(operations=0, doing=None)
    lane = SimpleNamespace(busy=lambda: lane.taken, awaited=lambda: lane.taken, taken=False)
    channel = Channel(WORLD, (0, 1), group, lane)
    assert channel.look() == Stage(0, "nothing yet", 0.0, False, (0, 1))

    group.operations, group.doing, lane.taken = 1, Call("barrier", "b"), True
    assert channel.look() == Stage(1, "barrier 'b'", 0.0, True, (0, 1))
    clock.now += 2
    assert channel.look() == Stage(1, "barrier 'b'", 2.0, True, (0, 1))
    clock.now += 3
    assert channel.look().seconds == 5.0

    group.operations = 2  # the next call, as long as it takes
    assert channel.look().seconds == 0.0
    clock.now += 1
    assert channel.look().seconds == 1.0

    lane.taken = False
    assert channel.look() == Stage(2, "barrier 'b'", 0.0, False, (0, 1))
    clock.now += 50
    lane.taken = True  # before it has counted the next operation
    assert channel.look().seconds == 0.0


def test_the_plan_of_an_allreduce_stands_for_its_call():
    doing = SimpleNamespace(call=Call("allreduce", "x"))
    group = SimpleNamespace(operations=1, doing=doing)
    lane = SimpleNamespace(busy=lambda: True, awaited=lambda: True)
    assert Channel(WORLD, (0,), group, lane).look().title == "allreduce 'x'"


# The watch: several of them, with a clock of their own


class Ranks:
    """Watches of several ranks, whose messages arrive at once."""

    def __init__(self, monkeypatch, size, **limits):
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        monkeypatch.setattr(stall, "time", clock)
        monkeypatch.setattr(Watch, "_every_thread_waits", lambda _: True)
        self.size, self.sent, self.given_up = size, [], []
        self.named, self.deaf = {}, set()
        self.operations = [[] for _ in range(size)]
        self.channels = [[] for _ in range(size)]
        limits = {"check": 60.0, "shutdown": 0.0, "deadlock": 0.0} | limits
        self.watches = [
            Watch(self.channels[rank], rank=rank, size=size, **limits) for rank in range(size)
        ]
        for rank, watch in enumerate(self.watches):
            watch.attach(Progress(self, rank))

    def channel(self, *stages, key=WORLD):
        """Let rank r be at the r-th of `stages`; seconds count from when they were given."""
        for rank, at in enumerate(stages):
            if at is not None:
                self.channels[rank].append(Looked(self, key, at))

    def submit(self, rank, key, *, waits=True):
        handle = SimpleNamespace(waiters=int(waits))
        self.operations[rank].append(SimpleNamespace(key=key, submitted=self.now, handle=handle))

    def run(self, seconds, step=0.25):
        """Let all ranks look, again and again."""
        end = self.now + seconds
        while self.now < end:
            self.now += step
            for rank, watch in enumerate(self.watches):
                if rank not in self.deaf:
                    watch.look()


class Progress:
    def __init__(self, ranks, rank):
        self.ranks, self.rank = ranks, rank
        self.gone, self.last = set(), ""

    def post(self, destination, message):
        self.ranks.sent.append((self.rank, destination, message))
        if destination not in self.ranks.deaf:
            self.ranks.watches[destination].deliver(self.rank, message)

    def pending(self):
        return self.ranks.operations[self.rank]

    def waiting(self):
        assert self.rank == 0
        return self.ranks.named

    def give_up(self, key, error):
        assert self.rank == 0
        self.ranks.given_up.append((key, error))
        self.ranks.named.pop(key, None)


class Looked:
    """A channel at one stage, under way since it was made if it is under way at all."""

    def __init__(self, ranks, key, at):
        self.job, self.key, self.at, self.since = ranks, key, at, ranks.now
        self.ranks = at.ranks
        self.call = Call("allreduce", "loss")
        self.errors = []
        self.group = SimpleNamespace(operations=at.operations, failure=None, abort=self.abort)
        self.lane = SimpleNamespace(busy=lambda: self.at.seconds > 0)

    def abort(self, error):
        self.errors.append(error)
        self.group.failure = error

    def look(self):
        seconds = self.job.now - self.since if self.at.seconds else 0.0
        return Stage(self.at.operations, self.at.title, seconds, seconds > 0, self.ranks)


def in_call(operations, ranks=(0, 1, 2), title="allreduce 'loss'"):
    return Stage(operations, title, 1.0, True, ranks)


def idle(operations, ranks=(0, 1, 2)):
    return Stage(operations, "allreduce 'loss'", 0.0, False, ranks)


def test_ranks_that_do_not_wait_send_nothing(monkeypatch):
    ranks = Ranks(monkeypatch, 3)
    ranks.channel(idle(5), idle(3), idle(4))
    ranks.run(200)
    assert ranks.sent == []


def test_a_wait_of_a_moment_is_nobodys_business(monkeypatch):
    ranks = Ranks(monkeypatch, 3)
    ranks.channel(in_call(5), idle(4), idle(4))
    ranks.run(1.9)
    assert ranks.sent == []


@pytest.mark.parametrize("waiter", [0, 2])
def test_a_stall_is_warned_of_on_rank_0_once_in_each_interval(monkeypatch, caplog, waiter):
    ranks = Ranks(monkeypatch, 3, check=60.0)
    ranks.channel(*[in_call(5) if rank == waiter else idle(4) for rank in range(3)])
    ranks.run(59)
    assert caplog.records == []
    ranks.run(3)
    (record,) = caplog.records
    late = [rank for rank in range(3) if rank != waiter]
    assert record.levelno == logging.WARNING
    assert f"allreduce 'loss' is stalled: rank {waiter} waited 60 s for ranks" in record.message
    assert all(f"{rank}" in record.message.splitlines()[0] for rank in late)
    ranks.run(55)
    assert len(caplog.records) == 1
    ranks.run(5)
    assert len(caplog.records) == 2


def test_a_stall_that_comes_again_is_warned_of_again(monkeypatch, caplog):
    """Such as a rank that writes a checkpoint for a minute, once an hour."""
    ranks = Ranks(monkeypatch, 2, check=10.0)
    for turn in range(1, 4):
        for channels in ranks.channels:
            channels.clear()
        ranks.channel(in_call(turn, (0, 1)), idle(turn - 1, (0, 1)))
        ranks.run(12)
        assert len(caplog.records) == turn
    for channels in ranks.channels:
        channels.clear()
    ranks.channel(in_call(9, (0, 1)), idle(8, (0, 1)))
    ranks.run(5)
    assert len(caplog.records) == 3


def test_named_operations_are_warned_of(monkeypatch, caplog):
    ranks = Ranks(monkeypatch, 3, check=10.0)
    ranks.submit(1, X, waits=False)
    ranks.named[X] = (Call("allreduce", "x"), (1,), (0, 2))
    ranks.run(11)
    (record,) = caplog.records
    assert "allreduce 'x' is stalled: rank 1 waited 10 s for ranks 0, 2" in record.message


def test_joining_is_waiting_and_no_stall(monkeypatch, caplog):
    ranks = Ranks(monkeypatch, 2, check=1.0, shutdown=5.0)
    ranks.channel(in_call(5, (0, 1), JOIN), idle(4, (0, 1)))
    ranks.run(30)
    assert caplog.records == []
    assert ranks.channels[0][0].errors == []


def test_a_rank_that_does_not_answer_is_named(monkeypatch, caplog):
    """Its progress thread is stopped, or the machine is gone."""
    ranks = Ranks(monkeypatch, 3, check=10.0)
    ranks.channel(in_call(5), idle(4), in_call(5))
    ranks.deaf.add(1)
    ranks.run(20)
    assert "  rank 1:  does not answer" in caplog.records[0].message


def test_a_stall_that_takes_too_long_ends_in_an_error_on_every_rank_of_the_channel(monkeypatch):
    ranks = Ranks(monkeypatch, 3, check=1.0, shutdown=10.0)
    ranks.channel(idle(4), in_call(5), in_call(5))
    ranks.channel(idle(0, (0, 1)), idle(0, (0, 1)), key="another")
    ranks.run(9)
    assert all(channel.errors == [] for channels in ranks.channels for channel in channels)
    ranks.run(3)
    for channels in ranks.channels:
        first, *others = channels
        assert {type(error) for error in first.errors} == {StallError}
        assert "ranks 1-2 waited 10 s for rank 0" in str(first.errors[0])
        assert all(channel.errors == [] for channel in others)


def test_a_named_operation_that_takes_too_long_is_given_up(monkeypatch):
    ranks = Ranks(monkeypatch, 2, check=0.0, shutdown=10.0)
    ranks.submit(1, X)
    ranks.named[X] = (Call("allreduce", "x"), (1,), (0,))
    ranks.run(12)
    ((key, error),) = ranks.given_up
    assert key == X
    assert isinstance(error, StallError)
    assert "allreduce 'x' is stalled: rank 1 waited 10 s for rank 0" in str(error)


def test_a_deadlock_that_lasts_is_an_error_on_the_ranks_in_it(monkeypatch):
    ranks = Ranks(monkeypatch, 3, check=0.0, deadlock=5.0)
    ranks.channel(in_call(5, (0, 1)), idle(4, (0, 1)), key="set 1")
    ranks.channel(None, in_call(3, (1, 2)), idle(2, (1, 2)), key="set 2")
    ranks.channel(idle(6, (0, 2)), None, in_call(7, (0, 2)), key="set 3")
    ranks.run(6)
    assert all(channel.errors == [] for channels in ranks.channels for channel in channels)
    ranks.run(4)
    for channels in ranks.channels:
        for channel in channels:
            assert "deadlock: ranks 0-2 wait for each other" in str(channel.errors[0])


def test_a_deadlock_of_a_call_and_a_named_operation(monkeypatch):
    """Rank 0 waits for x, which rank 1 has yet to start; rank 1 sits in an all-reduce."""
    ranks = Ranks(monkeypatch, 2, check=0.0, deadlock=5.0)
    ranks.channel(idle(4, (0, 1)), in_call(5, (0, 1)))
    ranks.submit(0, X)
    ranks.named[X] = (Call("allreduce", "x"), (0,), (1,))
    ranks.run(10)
    ((key, error),) = ranks.given_up
    assert key == X
    assert "rank 0:  allreduce 'x' (asynchronous, process set 0), for rank 1" in str(error)
    assert "rank 1:  allreduce 'loss' (all ranks), for rank 0" in str(error)
    assert ranks.channels[1][0].errors[0].args == error.args


def test_a_deadlock_is_none_while_one_rank_computes(monkeypatch):
    ranks = Ranks(monkeypatch, 2, check=0.0, deadlock=5.0)
    ranks.channel(in_call(5, (0, 1)), idle(4, (0, 1)), key="set 1")
    ranks.channel(idle(2, (0, 1)), in_call(3, (0, 1)), key="set 2")
    monkeypatch.setattr(Watch, "_every_thread_waits", lambda _: False)
    ranks.run(60)
    assert all(channel.errors == [] for channels in ranks.channels for channel in channels)


def test_a_deadlock_must_last(monkeypatch):
    """What was reported may have been on its way: the calls that wait are others each time."""
    ranks = Ranks(monkeypatch, 2, check=0.0, deadlock=5.0)
    for turn in range(10):
        for channels in ranks.channels:
            channels.clear()
        ranks.channel(in_call(5, (0, 1)), idle(4, (0, 1)), key=f"a {turn}")
        ranks.channel(idle(2, (0, 1)), in_call(3, (0, 1)), key=f"b {turn}")
        ranks.run(4.5)
        assert all(channel.errors == [] for channels in ranks.channels for channel in channels)


def test_a_wait_that_is_both_too_long_and_a_deadlock_is_given_up_once(monkeypatch):
    ranks = Ranks(monkeypatch, 2, check=0.0, shutdown=8.0, deadlock=5.0)
    Y = (0, "y")  # noqa: N806
    ranks.submit(0, X)
    ranks.submit(1, Y)
    ranks.named[X] = (Call("allreduce", "x"), (0,), (1,))
    ranks.named[Y] = (Call("allreduce", "y"), (1,), (0,))
    ranks.run(30)
    assert [key for key, _ in ranks.given_up] == [X, Y]


def test_a_watch_that_is_off_does_nothing(monkeypatch):
    ranks = Ranks(monkeypatch, 2, check=0.0)
    assert ranks.watches[0].interval is None
    ranks.channel(in_call(5, (0, 1)), idle(4, (0, 1)))
    ranks.run(1000, step=50)
    assert ranks.sent == []


@pytest.mark.parametrize(
    ("limits", "interval"), [({}, 1.0), ({"check": 2.0}, 0.5), ({"deadlock": 1.0}, 0.25)]
)
def test_looks_are_as_frequent_as_the_shortest_limit_needs(monkeypatch, limits, interval):
    assert Ranks(monkeypatch, 2, **limits).watches[0].interval == interval


def test_what_ranks_say_to_each_other_is_little(monkeypatch):
    """In a stall of a minute: a report and a round of questions a second, not more."""
    ranks = Ranks(monkeypatch, 3)
    ranks.channel(in_call(5), idle(4), idle(4))
    ranks.run(60)
    kinds = [type(message) for _, _, message in ranks.sent]
    assert kinds.count(Question) <= 2 * 60
    assert kinds.count(Report) <= 2 * 60
    assert Abort not in kinds


def test_a_deadlock_is_found_while_others_go_on(monkeypatch):
    """Ranks 2 and 3 train on, in a process set of their own."""
    ranks = Ranks(monkeypatch, 4, check=0.0, deadlock=5.0)
    ranks.channel(in_call(5, (0, 1)), idle(4, (0, 1)), key="set 1")
    ranks.channel(idle(2, (0, 1)), in_call(3, (0, 1)), key="set 2")
    for turn in range(20):
        for rank in (2, 3):
            ranks.channels[rank].clear()
        ranks.channel(None, None, in_call(turn + 1, (2, 3)), idle(turn, (2, 3)), key="set 3")
        ranks.run(0.5)
    for rank in (0, 1):
        assert all("deadlock: ranks 0-1" in str(c.errors[0]) for c in ranks.channels[rank])
    assert all(channel.errors == [] for rank in (2, 3) for channel in ranks.channels[rank])


# Ranks that leave


def test_who_waits_for_a_rank_that_has_left_is_told(monkeypatch):
    ranks = Ranks(monkeypatch, 3, check=0.0)
    ranks.channel(idle(4), in_call(5), in_call(4))
    assert ranks.watches[0].part()
    assert ranks.channels[2][0].errors == []  # that is the operation which rank 0 took part in
    (error,) = ranks.channels[1][0].errors
    assert isinstance(error, PeerError)
    assert "allreduce 'loss': rank 0 called shutdown(), or the program ended there" in str(error)


def test_what_begins_after_a_farewell_ends_as_well(monkeypatch):
    """Also where there are no limits to how long ranks may wait."""
    ranks = Ranks(monkeypatch, 2, check=0.0)
    ranks.channel(idle(4, (0, 1)), idle(4, (0, 1)))
    assert ranks.watches[1].part()
    assert ranks.watches[0].interval == 0.25
    ranks.run(3)
    channel = ranks.channels[0][0]
    assert channel.errors == []
    channel.group.operations = 5
    ranks.run(1.5)
    assert isinstance(channel.errors[0], PeerError)
    ranks.run(5)
    assert len(channel.errors) == 1


def test_a_rank_says_farewell_once_in_each_channel_when_that_has_come_to_rest(monkeypatch):
    ranks = Ranks(monkeypatch, 3, check=0.0)
    ranks.channel(in_call(5), in_call(5), idle(5))
    ranks.channel(idle(2, (0, 1)), idle(2, (0, 1)), key="set 1")
    assert not ranks.watches[0].part()
    assert ranks.sent == [(0, 1, Farewell({"set 1": 2}))]
    assert not ranks.watches[0].part()
    ranks.channels[0][0].at = idle(5)
    assert ranks.watches[0].part()
    assert ranks.sent[1:] == [(0, rank, Farewell({WORLD: 5})) for rank in (1, 2)]
    assert ranks.watches[0].part()
    assert len(ranks.sent) == 3


def test_a_farewell_in_a_channel_that_is_not_there_any_more(monkeypatch):
    ranks = Ranks(monkeypatch, 2, check=0.0)
    ranks.channel(idle(4, (0, 1)))
    assert ranks.watches[0].part()
    ranks.run(3)


# Threads


def seen_by(watch):
    """Return what another thread finds, as the progress thread does."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(watch._every_thread_waits()), name="hvdkit-progress"
    )
    thread.start()
    thread.join()
    return found[0]


def seen_while(watch, wait):
    """Return what is found 50 ms after this thread has called `wait`."""
    found = []
    look = threading.Timer(0.05, lambda: found.append(seen_by(watch)))
    look.daemon = True
    look.start()
    wait()
    look.join()
    return found[0]


def a_watch():
    return Watch([], rank=0, size=1, check=0.0, shutdown=0.0, deadlock=0.0)


def test_a_thread_that_computes_may_yet_call():
    assert not seen_by(a_watch())


def test_a_thread_that_waits_for_a_handle_does_not():
    handle = Handle()
    end = threading.Timer(0.2, lambda: handle.complete(None))
    end.daemon = True
    end.start()
    assert seen_while(a_watch(), handle.wait)


def test_a_thread_that_waits_for_some_time_only_does():
    def wait():
        with pytest.raises(TimeoutError):
            Handle().wait(0.2)

    assert not seen_while(a_watch(), wait)


def test_other_threads_may_yet_call_as_well():
    """All but daemons that never do, such as those that show progress."""
    watch, gate = a_watch(), threading.Event()
    outcomes = []
    for daemon in (True, False):
        other = threading.Thread(target=gate.wait, daemon=daemon)
        other.start()
        handle = Handle()
        end = threading.Timer(0.2, handle.complete, [None])
        end.daemon = True
        end.start()
        outcomes.append(seen_while(watch, handle.wait))
        gate.set()
        other.join()
        gate.clear()
    assert outcomes == [True, False]


def test_a_daemon_that_was_seen_in_hvdkit_may_call_again():
    watch, gate = a_watch(), threading.Event()
    first, last = Handle(), Handle()
    other = threading.Thread(target=lambda: (first.wait(), gate.wait()), daemon=True)
    other.start()

    def wait():
        end = threading.Timer(0.2, lambda: last.complete(None))
        end.daemon = True
        end.start()
        last.wait()

    assert seen_while(watch, wait)
    first.complete(None)
    last = Handle()
    assert not seen_while(watch, wait)
    gate.set()
    other.join()


def test_a_lane_knows_whether_somebody_waits():
    lane, gate = Lane(threaded=True), threading.Event()
    assert not lane.awaited()
    first = lane.submit(gate.wait)
    second = lane.submit(int)
    while not lane.busy():
        pass
    assert not lane.awaited()
    for handle in (first, second):  # the second: it is queued behind the first
        waiter = threading.Thread(target=handle.wait)
        waiter.start()
        while not lane.awaited():
            pass
        if handle is first:
            first.waiters -= 1
            assert not lane.awaited()
            first.waiters += 1
    gate.set()
    second.wait()
    while lane.busy():
        pass
    assert lane.call(lane.awaited)  # the caller waits for its own call
    lane.close()
