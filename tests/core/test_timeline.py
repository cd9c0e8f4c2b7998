"""The timeline: what trace viewers insist on, times of one clock, and files of jobs that died."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest

from core.worlds import on_ranks, wait_until
from hvdkit.engine import timeline
from hvdkit.engine.timeline import Timeline, measure_offset, merge, part_path, remove_parts
from hvdkit.errors import ArgumentError, HvdkitError
from hvdkit.transport.threads import ThreadTransport

SECONDS = 10
MICROSECOND = 1e-6


def open_timeline(path, *, rank=0, size=1, offset=0.0, flush_seconds=60.0):
    return Timeline(path, rank=rank, size=size, offset_seconds=offset, flush_seconds=flush_seconds)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.json"


def load(path):
    """Return the events of a file that has to be one strict JSON array."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_bytes(), parse_constant=refuse)


def events_of(path):
    return [event for event in load(path) if event["ph"] != "M"]


def names_of(path):
    return [event["name"] for event in events_of(path)]


# What a part holds


def test_a_span_as_viewers_want_it(path):
    trace = open_timeline(path, rank=3, size=4)
    trace.span("main", "allreduce", 2.0, 2.5, bytes=4096, dtype="float32", algorithm="shm")
    trace.close()
    (event,) = events_of(part_path(path, 3))
    assert event["args"] == {"bytes": 4096, "dtype": "float32", "algorithm": "shm"}
    assert (event["name"], event["ph"]) == ("allreduce", "X")
    assert (event["ts"], event["dur"]) == (2_000_000, 500_000)
    assert (event["pid"], event["tid"]) == (3, 3001)


def test_ranks_are_processes_and_tracks_are_threads(path):
    trace = open_timeline(path, rank=1, size=2)
    for number, track in enumerate(["main", "progress", "reducer 0", "main", "progress"]):
        trace.span(track, f"{number} on {track}", number, number + 1)
    trace.close()
    events = load(part_path(path, 1))
    assert {event["pid"] for event in events} == {1}
    named = {(e["name"], e["tid"]): e["args"] for e in events if e["ph"] == "M"}
    assert named["process_name", 0] == {"name": "rank 1"}
    assert named["process_sort_index", 0] == {"sort_index": 1}
    threads = {tid: args["name"] for (what, tid), args in named.items() if what == "thread_name"}
    assert list(threads.values()) == ["main", "progress", "reducer 0"]
    order = [args["sort_index"] for (what, _), args in named.items() if what == "thread_sort_index"]
    assert order == [1, 2, 3]
    for event in events:
        if event["ph"] != "M":
            assert event["name"].endswith(f"on {threads[event['tid']]}")
    assert 1 not in threads, "a viewer would take the thread of the process's number for its main"


def test_the_offset_is_added(path):
    trace = open_timeline(path, offset=-100.0)
    trace.span("main", "work", 101.0, 102.0)
    trace.close()
    (event,) = events_of(part_path(path, 0))
    assert (event["ts"], event["dur"]) == (1_000_000, 1_000_000)


def test_args_may_be_called_anything_and_be_anything(path):
    trace = open_timeline(path)
    trace.span("main", "work", 0.0, 1.0, name="grad.fc1", track=5, self=None, shape=(3, 4))
    trace.span("main", 'quote " \\ \n é ' + chr(0xDCFF), 1.0, 2.0, path=path, factor=float("inf"))
    trace.span("main", "keys", 2.0, 3.0, splits={(0, 1): 2})
    trace.close()
    first, second, third = events_of(part_path(path, 0))
    assert first["args"] == {"name": "grad.fc1", "track": 5, "self": None, "shape": [3, 4]}
    assert second["name"] == 'quote " \\ \n é ' + chr(0xDCFF)
    assert second["args"] == {"path": str(path), "factor": "inf"}
    assert third["args"] == {"splits": "{(0, 1): 2}"}


@pytest.mark.parametrize("origin", [0.0, 1234.567, 3.1e7])
def test_spans_that_touch_or_nest_still_do_so_for_every_viewer(path, origin):
    """Perfetto drops a span that ends after the next begins, even by one nanosecond, and some
    versions cut what lies below a nanosecond off: ts and dur must be whole ones, exactly."""
    trace = open_timeline(path, offset=-origin)
    marks = [origin + 1.37e-6 * step + 0.11e-6 * (step % 3) for step in range(300)]
    for begin, end in pairwise(marks):
        trace.span("main", "step", begin, end)
    trace.span("main", "all", marks[0], marks[-1])
    trace.close()
    *steps, whole = [
        (int(event["ts"] * 1000), int(event["dur"] * 1000), event["ts"], event["dur"])
        for event in events_of(part_path(path, 0))
    ]
    assert all(ts == 1000 * us and dur == 1000 * d for ts, dur, us, d in [*steps, whole])
    for (begin, duration, _, _), (following, _, _, _) in pairwise(steps):
        assert begin + duration == following
    assert whole[0] == steps[0][0]
    assert whole[0] + whole[1] == steps[-1][0] + steps[-1][1]
    for (begin, end), (ts, duration, _, _) in zip(pairwise(marks), steps, strict=True):
        assert abs(ts * 1e-9 - (begin - origin)) < 0.2 * MICROSECOND
        assert abs(duration * 1e-9 - (end - begin)) < 0.2 * MICROSECOND


# How it is written


def test_threads_may_write_at_once(path):
    trace = open_timeline(path, flush_seconds=0.001)
    count, workers = 3000, 4

    def work(number):
        for i in range(count):
            trace.span(f"worker {number}", f"{i}", i, i + 0.5, worker=number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.close()
    seen = [[] for _ in range(workers)]
    tids = [set() for _ in range(workers)]
    for event in events_of(part_path(path, 0)):
        seen[event["args"]["worker"]].append(event["name"])
        tids[event["args"]["worker"]].add(event["tid"])
    assert seen == [[str(i) for i in range(count)]] * workers
    assert len(set.union(*tids)) == workers


def test_events_are_in_the_file_after_a_while(path):
    trace = open_timeline(path, flush_seconds=0.01)
    part = part_path(path, 0)
    for name in ["first", "second"]:
        trace.span("main", name, 1.0, 1.0)
        wait_until(lambda name=name: name in part.read_text())
    trace.close()
    assert names_of(part) == ["first", "second"]


def test_many_events_do_not_wait(path, monkeypatch):
    monkeypatch.setattr(timeline, "LARGE", 100)
    trace = open_timeline(path)
    for _ in range(100):
        trace.span("main", "work", 1.0, 2.0)
    wait_until(lambda: part_path(path, 0).read_text().count('"work"') == 100)
    trace.close()


def test_nothing_comes_after_the_end(path):
    trace = open_timeline(path)
    trace.span("main", "work", 1.0, 2.0)
    trace.close()
    trace.span("main", "late", 2.0, 3.0)
    trace.span("main", "late", 2.0, 2.0)
    trace.close()
    assert names_of(part_path(path, 0)) == ["work"]


def test_a_part_without_events_is_whole(path):
    open_timeline(path, rank=1, size=2).close()
    assert [event["ph"] for event in load(part_path(path, 1))] == ["M", "M"]


def test_a_path_that_cannot_be_written(tmp_path):
    with pytest.raises(ArgumentError, match=re.escape("rank 1 of 2 cannot write")) as caught:
        open_timeline(tmp_path / "none" / "trace.json", rank=1, size=2)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_full_disk_ends_the_timeline_and_nothing_else(path):
    trace = open_timeline(path)
    trace.span("main", "work", 1.0, 2.0)
    trace._file.close()
    trace._file = open("/dev/full", "w", encoding="ascii")  # noqa: PTH123, SIM115
    with pytest.warns(UserWarning, match="timeline of rank 0 ends here.*No space left"):
        trace.close()
    trace.span("main", "late", 1.0, 2.0)
    assert not trace._events


# One clock


class Shifted:
    """A clock that is fast by `shift` seconds, and knows when it was read."""

    def __init__(self, shift):
        self.shift = shift
        self.readings = []

    def __call__(self):
        self.readings.append(time.perf_counter() + self.shift)
        return self.readings[-1]

    def trips(self):
        """The round trips: the clock is read as each begins and as it ends."""
        return [b - a for a, b in zip(self.readings[::2], self.readings[1::2], strict=True)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_offset_is_right_within_half_the_shortest_round_trip(size):
    shifts = [7.0, -3600.0, 0.0, 1e-3, 12345.678][:size]

    def rank(transport):
        clock = Shifted(shifts[transport.rank])
        return measure_offset(transport, clock=clock), clock

    results = on_ranks(size, rank)
    first, clock = results[0]
    assert first == -clock.readings[0], "rank 0's time is counted from the beginning"
    for number, (offset, clock) in enumerate(results[1:], start=1):
        truth = first + shifts[0] - shifts[number]
        assert abs(offset - truth) <= min(clock.trips()) / 2 + 1e-9
        assert min(clock.trips()) < 0.5


class SlowReplies(ThreadTransport):
    """Rank 0's replies take 20 ms, but one of them does not."""

    def __init__(self, world, rank):
        super().__init__(world, rank)
        self.sent = 0

    def isend(self, data, destination):
        if self.rank == 0:
            self.sent += 1
            if self.sent != 3:
                time.sleep(0.02)
        return super().isend(data, destination)


def test_one_good_round_trip_is_enough(monkeypatch):
    """An average of all would be wrong by nearly 10 ms: only one way is slow."""
    monkeypatch.setattr(timeline, "TRIPS", 6)

    def rank(transport):
        clock = Shifted(10.0 * transport.rank)
        return measure_offset(SlowReplies(transport.world, transport.rank), clock=clock), clock

    (first, _), (offset, clock) = on_ranks(2, rank)
    assert sorted(clock.trips())[1] >= 0.02
    assert abs(offset - (first - 10.0)) <= min(clock.trips()) / 2 + 1e-9


def test_an_event_that_ranks_share_is_at_one_time_in_the_merged_trace(path):
    """Ranks with clocks hours apart leave a barrier together, and the trace shows it."""

    def meet(transport):
        transport.world.barrier.wait()
        time.sleep(0.03)  # longer than the offset can be wrong by

    def rank(transport):
        number, size = transport.rank, transport.size
        clock = Shifted([0.0, 5000.0, -3000.0][number])
        trace = open_timeline(
            path, rank=number, size=size, offset=measure_offset(transport, clock=clock)
        )
        trace.span("main", "before", clock(), clock())
        meet(transport)
        moment = clock()
        trace.span("main", "together", moment, moment)
        meet(transport)
        trace.span("main", "after", clock(), clock())
        trace.close()

    on_ranks(3, rank)
    merge(path, 3)
    events = events_of(path)
    assert [event["name"] for event in events] == ["before"] * 3 + ["together"] * 3 + ["after"] * 3
    for name in ["before", "together", "after"]:
        assert {e["pid"] for e in events if e["name"] == name} == {0, 1, 2}
    together = [event["ts"] for event in events if event["name"] == "together"]
    assert max(together) - min(together) < 0.5e6


# One file


def write_parts(path, size, count=3):
    for rank in range(size):
        trace = open_timeline(path, rank=rank, size=size)
        for i in reversed(range(count)):
            trace.span("main", f"{i} of {rank}", i + rank / 10, i + rank / 10 + 0.05)
        trace.close()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_merged_events_are_in_order_of_time_and_the_parts_are_gone(path, size):
    write_parts(path, size)
    merge(str(path), size)
    assert names_of(path) == [f"{i} of {rank}" for i in range(3) for rank in range(size)]
    times = [event["ts"] for event in events_of(path)]
    assert times == sorted(times)
    assert {event["pid"] for event in load(path)} == set(range(size))
    head = [event["ph"] for event in load(path)].index("X")
    assert {event["ph"] for event in load(path)[head:]} == {"X"}, "names come first"
    assert list(path.parent.iterdir()) == [path]


def test_threads_of_different_ranks_have_different_numbers(path):
    for rank in range(3):
        trace = open_timeline(path, rank=rank, size=3)
        for track in "abc":
            trace.span(track, track, 1.0, 1.0)
        trace.close()
    merge(path, 3)
    assert len({event["tid"] for event in events_of(path)}) == 9


def test_parents_come_before_their_children(path):
    """Spans are recorded when they end, the innermost first, even if no time passed at all."""
    trace = open_timeline(path)
    trace.span("main", "first child", 1.0, 2.0)
    trace.span("main", "moment", 1.0, 1.0)
    trace.span("main", "grandchild", 1.0, 4.0)
    trace.span("main", "child", 1.0, 4.0)
    trace.span("main", "parent", 1.0, 4.0)
    trace.close()
    merge(path, 1)
    assert names_of(path) == ["parent", "child", "grandchild", "first child", "moment"]


@pytest.mark.parametrize("cut", range(1, 120, 7))
def test_a_part_that_was_cut_off_anywhere_can_be_merged(path, cut):
    write_parts(path, 2)
    part = part_path(path, 1)
    text = part.read_text()[:-cut]
    part.write_text(text)
    merge(path, 2)
    names = names_of(path)
    assert [name for name in names if name.endswith("of 0")] == ["0 of 0", "1 of 0", "2 of 0"]
    whole = re.findall(r'{"name":"(\d of 1)".*}(?=,?$)', text, re.MULTILINE)
    assert [name for name in names if name.endswith("of 1")] == sorted(whole)


def test_parts_that_are_empty_or_not_text(path):
    write_parts(path, 3)
    part_path(path, 0).write_bytes(b"")
    with part_path(path, 1).open("ab") as part:
        part.write(b'{"name":"\xff\xfe\0\0\0')
    merge(path, 3)
    assert [name[-1] for name in names_of(path)] == ["1", "2"] * 3


def test_missing_parts_are_named(path):
    write_parts(path, 5)
    for rank in [1, 2, 4]:
        part_path(path, rank).unlink()
    with pytest.warns(UserWarning, match=r"is without ranks 1-2, 4, whose parts are not here"):
        merge(path, 5)
    assert {event["pid"] for event in load(path)} == {0, 3}


def test_no_part_at_all(path):
    with pytest.warns(UserWarning, match="without ranks 0-1"):
        merge(path, 2)
    assert load(path) == []


def test_parts_stay_when_the_trace_cannot_be_written(path):
    write_parts(path, 2)
    path.mkdir()
    with pytest.raises(HvdkitError, match=r"(?s)cannot be joined into .*trace.rank0.json, stay"):
        merge(path, 2)
    left = {entry.name for entry in path.parent.iterdir()}
    assert left == {"trace.json", "trace.rank0.json", "trace.rank1.json"}


def test_parts_of_an_earlier_job_can_be_removed(path):
    write_parts(path, 3)
    other = path.with_name("trace.ranking.json")
    other.touch()
    remove_parts(path, 4)
    assert list(path.parent.iterdir()) == [other]


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("trace.json", "trace.rank2.json"),
        ("a.b/trace", "a.b/trace.rank2"),
        ("t.x.json", "t.x.rank2.json"),
    ],
)
def test_names_of_parts(path, part):
    assert str(part_path(path, 2)) == part


KILLED = """
import os, signal, sys, time
from hvdkit.engine.timeline import Timeline
trace = Timeline(sys.argv[1], rank=1, size=2, offset_seconds=0.0, flush_seconds=0.01)
for i in range(500):
    trace.span("main", f"{i} of 1", i, i + 1)
while b"499 of 1" not in trace.path.read_bytes():
    time.sleep(0.01)
trace.span("main", "never written", 0, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_rank_did_is_in_the_trace(path):
    write_parts(path, 1, count=2)
    job = subprocess.run([sys.executable, "-c", KILLED, path], timeout=60, check=False)
    assert job.returncode == -signal.SIGKILL
    part = part_path(path, 1).read_text()
    assert json.loads(part + "]"), "viewers add the bracket themselves"
    merge(path, 2)
    names = [name for name in names_of(path) if name.endswith("of 1")]
    assert names == [f"{i} of 1" for i in range(500)]
