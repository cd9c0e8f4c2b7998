"""Named operations: matched whatever the order, and every handle comes to an end."""

import random
import threading
import time
import weakref

import numpy as np
import pytest

from core.progress_jobs import (
    SECONDS,
    Job,
    allgather,
    assert_in_step,
    error_of,
    message_mail,
    pipe_mail,
    start,
    value_of,
)
from core.worlds import wait_until
from hvdkit.dtypes import Adasum, Average, Max, Min, Product, Sum, bfloat16
from hvdkit.errors import ArgumentError, MismatchError, UnsupportedError

# Results


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("connect", [None, pipe_mail, message_mail])
def test_ranks_may_start_in_any_order(size, connect):
    names = [f"tensor {i}" for i in range(40)]

    def body(rank):
        for turn in range(3):
            order = random.Random(10 * turn + rank).sample(range(40), 40)
            handles = {i: start(job, rank, names[i], rank + i) for i in order}
            for i in random.Random(rank).sample(range(40), 40):
                assert value_of(handles[i]) == sum(range(size)) + size * i

    with Job(size, connect=connect) as job:
        job.on_ranks(body)


def test_mail_is_urgent_while_something_waits_for_other_ranks():
    """Else it may be looked for less often, for the sake of what shares the core."""
    with Job(2) as job:
        box = job.boxes[1]
        wait_until(lambda: box.patient)
        handle = start(job, 1, "x")
        wait_until(lambda: not box.patient)
        start(job, 0, "x")
        value_of(handle)
        wait_until(lambda: box.patient)


def test_rank_0_is_urgent_for_ranks_that_wait_for_its_decision_alone():
    with Job(3, sets=[(1, 2)]) as job:
        wait_until(lambda: job.boxes[1].patient and job.boxes[2].patient)
        for turn in range(3):
            handles = [start(job, rank, f"x{turn}", number=1) for rank in (1, 2)]
            assert [value_of(handle) for handle in handles] == [3, 3]
            assert not job.boxes[0].patient


@pytest.mark.parametrize(
    ("op", "wanted"), [(Sum, 6), (Average, 2), (Min, 1), (Max, 3), (Product, 6)], ids=str
)
def test_ops_and_factors(op, wanted):
    def body(rank):
        assert value_of(start(job, rank, "x", rank + 1, op=op)) == wanted
        handle = start(job, rank, "y", rank + 1, op=op, postscale_factor=0.5)
        assert value_of(handle) == wanted / 2

    with Job(3) as job:
        job.on_ranks(body)


@pytest.mark.parametrize("fuse_bytes", [0, 1000, 1 << 30])
def test_several_arrays_of_several_dtypes_are_one_operation(fuse_bytes):
    dtypes = ["f4", "f8", "i4", bfloat16, "f4", "?"]
    shapes = [(5,), (2, 3), (), (0, 4), (300,), (1,)]

    def body(rank):
        handles = []
        for turn in range(4):
            sources = [
                np.full(s, rank + turn).astype(d) for d, s in zip(dtypes, shapes, strict=True)
            ]
            targets = [np.empty_like(source) for source in sources]
            handles.append(
                job.at(rank).allreduce_async(
                    list(zip(sources, targets, strict=True)),
                    op=Sum,
                    name=f"group {turn}",
                    result=targets,
                )
            )
        for turn, handle in enumerate(handles):
            for target in handle.wait(SECONDS):
                wanted = np.full(target.shape, 2 * turn + 1).astype(target.dtype)
                np.testing.assert_array_equal(target, wanted)

    with Job(2, fuse_bytes=fuse_bytes) as job:
        job.on_ranks(body)


def test_in_place():
    def body(rank):
        array = np.full(5, rank + 1.0)
        job.at(rank).allreduce_async([(array, array)], name="x", op=Sum).wait(SECONDS)
        assert array.tolist() == [3.0] * 5

    with Job(2) as job:
        job.on_ranks(body)


def test_without_names_operations_are_matched_by_number_and_kind():
    def body(rank):
        mine = [start(job, rank, None, 1), start(job, rank, None, 10)]
        other = allgather(job, rank, None, np.full(1 + rank, rank))
        assert [value_of(handle) for handle in mine] == [2, 20]
        assert other.wait(SECONDS).tolist() == [0, 1, 1]

    with Job(2) as job:
        job.on_ranks(body)


def test_other_collectives():
    def body(rank):
        for turn in range(3):
            handle = allgather(job, rank, "rows", np.full((1 + rank + turn, 2), rank))
            wanted = [[0, 0]] * (1 + turn) + [[1, 1]] * (2 + turn)
            assert handle.wait(SECONDS).tolist() == wanted

    with Job(2) as job:
        job.on_ranks(body)


def test_adasum_by_name():
    def body(rank):
        assert value_of(start(job, rank, "x", 4.0, op=Adasum)) == 4.0
        zeros = [(np.full(2, 1.0), np.empty(2)), (np.full(3, 2.0), np.empty(3))]
        job.at(rank).allreduce_async(zeros, name="y", op=Adasum).wait(SECONDS)
        assert [target.tolist() for _, target in zeros] == [[1, 1], [2, 2, 2]]

    with Job(2) as job:
        job.on_ranks(body)


def test_process_sets_that_overlap_in_whatever_order():
    """Were each rank to run its own order, 0 and 1 and 2 would wait in a circle."""
    sets = [(0, 1), (1, 2), (0, 2), (1,)]

    def body(rank):
        mine = [n for n in job.members if rank in job.members[n]]
        for turn in range(20):
            order = mine[turn % len(mine) :] + mine[: turn % len(mine)]
            handles = {n: start(job, rank, "x", number=n) for n in order[:: 1 - 2 * (rank % 2)]}
            for n, handle in handles.items():
                assert value_of(handle) == sum(job.members[n])

    with Job(3, sets) as job:
        job.on_ranks(body)


def test_threads_share_a_rank():
    def body(rank):
        def several(thread):
            for turn in range(25):
                name = f"{thread}.{turn}"
                done.append(value_of(start(job, rank, name, turn)) == 2 * turn)

        done = []
        threads = [threading.Thread(target=several, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert done == [True] * 100

    with Job(2) as job:
        job.on_ranks(body)


def test_synchronous_and_asynchronous_calls_do_not_wait_for_each_other():
    """Rank 0 starts x and then calls; rank 1 does it the other way round."""

    def body(rank):
        if rank == 0:
            handle = start(job, rank, "x")
            assert job.at(rank).allreduce(np.ones(2)).tolist() == [1, 1]
        else:
            assert job.at(rank).allreduce(np.ones(2)).tolist() == [1, 1]
            handle = start(job, rank, "x")
        assert value_of(handle) == 1

    with Job(2) as job:
        for _ in range(10):
            job.on_ranks(body)


def test_a_callback_may_start_the_next_operation():
    def body(rank):
        done = threading.Event()

        def then(handle):
            following.append(start(job, rank, "second", value_of(handle)))
            done.set()

        following = []
        start(job, rank, "first", 1).when_done(then)
        assert done.wait(SECONDS)
        assert value_of(following[0]) == 4

    with Job(2) as job:
        job.on_ranks(body)


def test_staging_is_done_on_the_progress_thread_around_the_operation():
    def body(rank):
        array, threads = np.zeros(2), []

        def fetch():
            threads.append(threading.current_thread().name)
            array[:] = rank + 1

        def store(found):
            threads.append(threading.current_thread().name)
            return found * 10

        handle = job.at(rank).allreduce_async(
            [(array, array)], name="x", op=Sum, result=array, fetch=fetch, store=store
        )
        assert handle.wait(SECONDS).tolist() == [30.0, 30.0]
        assert threads == ["hvdkit-progress"] * 2

    with Job(2) as job:
        job.on_ranks(body)


# Nobody oversleeps: nothing runs by the clock, so that one lost wake-up is a hang


def test_no_submission_is_slept_through():
    def body(rank):
        for turn in range(300):
            if turn % 3 == rank:
                time.sleep(random.Random(turn).random() * 2e-4)
            assert value_of(start(job, rank, f"{turn % 7}", 1)) == 2

    with Job(2) as job:
        job.on_ranks(body)


def test_no_join_is_slept_through():
    def body(rank):
        for turn in range(200):
            if turn % 2 == rank:
                time.sleep(random.Random(turn).random() * 2e-4)
            assert job.progress[rank].join().wait(SECONDS) in (0, 1)

    with Job(2) as job:
        job.on_ranks(body)


def test_no_new_process_set_is_slept_through():
    """Rank 0 may hear of an operation in it before it knows the set."""
    with Job(2, [(1,)]) as job:
        members = job.progress[0]._submissions._members
        for _ in range(100):
            del members[1]
            handle = start(job, 1, "x", 5, number=1)
            if not handle.poll():
                time.sleep(1e-4)
            members[1] = (1,)
            job.progress[0].reconsider()
            assert value_of(handle) == 5


def started(work):
    """Return a thread that is in the midst of `work`."""
    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.01)
    return thread


@pytest.mark.parametrize("what", ["submit", "join", "close"])
def test_the_worst_moment_to_ask_is_just_before_the_sleep(what, monkeypatch):
    """The thread has looked for news, has found none, and is not asleep yet."""
    job = Job(1)
    progress, handles = job.progress[0], []
    asks = {
        "submit": lambda: handles.append(start(job, 0, "x", 1)),
        "join": lambda: handles.append(progress.join()),
        "close": lambda: handles.append(started(progress.close)),
    }
    announce = progress._announce

    def announce_and_be_interrupted():
        monkeypatch.undo()
        announce()
        asks[what]()

    monkeypatch.setattr(progress, "_announce", announce_and_be_interrupted)
    start(job, 0, "to wake it")
    deadline = time.monotonic() + SECONDS
    while not handles and time.monotonic() < deadline:
        time.sleep(0.001)
    if what == "close":
        handles[0].join(SECONDS)
        assert not handles[0].is_alive()
    else:
        handles[0].wait(SECONDS)
    job.close()


# What fails, fails on every rank, and the next operation is right


def test_ranks_that_disagree_all_get_the_same_error():
    with Job(3) as job:
        handles = [start(job, rank, "x", count=4 if rank == 1 else 3) for rank in range(3)]
        errors = [error_of(handle) for handle in handles]
        assert {type(error) for error in errors} == {MismatchError}
        assert len({str(error) for error in errors}) == 1
        assert "allreduce 'x': ranks disagree on the shape" in str(errors[0])
        assert "  ranks 0, 2:  float64 (3)\n  rank 1:      float64 (4)\n" in str(errors[0])
        assert_in_step(job)


def test_ranks_that_start_different_collectives_of_one_name():
    with Job(2) as job:
        handles = [start(job, 0, "x"), allgather(job, 1, "x", np.zeros(3))]
        for handle in handles:
            assert "ranks called different collectives" in str(error_of(handle))
        assert_in_step(job)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"op": "median"}, ArgumentError, "unknown operation 'median'"),
        ({"op": Average, "dtype": "?"}, UnsupportedError, "Average is not defined for bool"),
        ({"op": Sum, "dtype": "M8[s]"}, UnsupportedError, "dtype datetime64"),
        ({"op": Sum, "prescale_factor": "half"}, UnsupportedError, "half"),
    ],
    ids=str,
)
def test_a_rank_that_cannot_make_the_call_says_why_to_the_others(how, error, message):
    with Job(3) as job:
        how = dict(how)
        array = np.zeros(3, how.pop("dtype", "f8"))
        with pytest.raises(error, match=message):
            job.at(1).allreduce_async([(array, array)], name="x", **how)
        for handle in [start(job, rank, "x") for rank in (0, 2)]:
            raised = error_of(handle)
            assert isinstance(raised, MismatchError)
            assert message in str(raised)
        assert_in_step(job)


def test_a_name_that_is_in_use_is_refused_on_every_rank():
    with Job(2) as job:
        first = start(job, 1, "x", 5)
        with pytest.raises(ArgumentError, match="'x': the name is in use by an operation that"):
            start(job, 1, "x", 6)
        assert value_of(start(job, 0, "x", 5)) == 10
        assert value_of(first) == 10
        assert isinstance(error_of(start(job, 0, "x", 6)), MismatchError)
        assert_in_step(job)


def test_a_refused_use_of_a_name_is_never_taken_for_the_next_one():
    """Rank 1 uses x, is refused, and uses x again, all before rank 0 has come to the second use.

    What rank 0 then hears of the refused use once failed rank 1's third one, which was all right;
    and when rank 0 came to that, rank 1 added nothing to it.
    """
    with Job(2) as job:
        first = start(job, 1, "x", 1)
        with pytest.raises(ArgumentError):
            start(job, 1, "x", 2)
        assert value_of(start(job, 0, "x", 1)) == value_of(first) == 2
        third = start(job, 1, "x", 3)
        assert isinstance(error_of(start(job, 0, "x", 2)), MismatchError)
        assert not third.poll()
        assert value_of(start(job, 0, "x", 3)) == value_of(third) == 6


def test_an_error_does_not_overtake_an_operation_that_has_yet_to_begin():
    """The progress thread is busy when the decisions about two uses of x come in."""
    with Job(2) as job:
        gate = threading.Event()

        def wait_for_it(group):
            assert gate.wait(SECONDS)
            group.transport.allgather_object(None)

        busy = [job.at(rank).start("gate", [], wait_for_it, name="gate") for rank in range(2)]
        first = [start(job, rank, "x", 1) for rank in range(2)]
        with pytest.raises(ArgumentError, match="in use"):
            start(job, 1, "x", 2)
        with pytest.raises(UnsupportedError):
            job.at(0).allreduce_async([(np.zeros(2, "M8[s]"),) * 2], name="x", op=Sum)
        time.sleep(0.01)  # for the decisions to come in
        gate.set()
        assert [value_of(handle) for handle in first] == [2, 2]
        assert [handle.wait(SECONDS) for handle in busy] == [None, None]
        assert_in_step(job)


def test_all_ranks_are_refused_the_same():
    with Job(2) as job:
        for turn in range(3):
            handles = [start(job, rank, "x", 1) for rank in range(1)]
            with pytest.raises(ArgumentError):
                start(job, 0, "x", 1)
            handles.append(start(job, 1, "x", 1))
            assert [value_of(handle) for handle in handles] == [2, 2]
            assert isinstance(error_of(start(job, 1, "x", turn)), MismatchError)
        for rank in range(2):
            with pytest.raises(UnsupportedError):
                job.at(rank).allreduce_async([(np.zeros(2, "M8[s]"),) * 2], name="x", op=Sum)
        assert_in_step(job)
        assert all(progress.pending() == [] for progress in job.progress)


def test_an_operation_that_raises_fails_its_handle_and_nothing_else():
    def fail(_):
        raise KeyError("the work's own error")

    with Job(2) as job:
        handles = [job.at(rank).start("custom", [], fail, name="x") for rank in range(2)]
        for handle in handles:
            assert isinstance(error_of(handle), KeyError)
        assert_in_step(job)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_a_source_that_cannot_be_fetched_is_an_error_on_every_rank(together):
    """A device that is out of memory: the others must not wait for what this rank would bring."""

    def fail():
        raise MemoryError("the device is full")

    with Job(2) as job:
        gate = threading.Event()
        busy = [
            job.at(r).start("gate", [], lambda _: gate.wait(SECONDS), name="gate") for r in (0, 1)
        ]
        names = ["x", "y"] if together else ["x"]
        handles = [start(job, 0, name) for name in names]
        failing = [start(job, 1, name, fetch=fail) for name in names]
        gate.set()
        assert all(handle.wait(SECONDS) for handle in busy)
        assert all(isinstance(error_of(handle), MemoryError) for handle in failing)
        for handle in handles:
            error = error_of(handle)
            assert isinstance(error, MismatchError)
            assert "rank 1:  MemoryError: the device is full" in str(error)
        assert_in_step(job)


# What is kept


def test_a_thread_that_sleeps_keeps_no_arrays_alive():
    class Array(np.ndarray):
        pass

    def body(rank):
        array = np.ones(3).view(Array)
        gone = weakref.ref(array)
        job.at(rank).allreduce_async([(array, array)], name="x", op=Sum).wait(SECONDS)
        del array
        deadline = time.monotonic() + SECONDS
        while gone() is not None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert gone() is None

    with Job(2) as job:
        job.on_ranks(body)


def test_names_that_are_used_once_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr("hvdkit.engine.negotiation.MOST_KNOWN", 16)

    def body(rank):
        for turn in range(50):
            assert value_of(start(job, rank, None, 1)) == 2
            with pytest.raises(UnsupportedError):
                job.at(rank).allreduce_async([(np.zeros(2, "M8[s]"),) * 2], name=f"{turn}", op=Sum)

    with Job(2) as job:
        job.on_ranks(body)
        assert_in_step(job)
        for progress in job.progress:
            assert len(progress._announcer._told) <= 16
            assert not progress._submissions._uses
            assert not progress._submissions._submitted


def test_a_process_set_is_in_use_while_something_is_under_way_in_it():
    with Job(2, [(0, 1)]) as job:
        handle = start(job, 0, "x", number=1)
        assert job.progress[0].in_use(1)
        assert not job.progress[0].in_use(0)
        start(job, 1, "x", number=1)
        handle.wait(SECONDS)
        deadline = time.monotonic() + SECONDS
        while job.progress[0].in_use(1):
            assert time.monotonic() < deadline
        gate = threading.Event()
        running = [
            job.at(r, 1).start("gate", [], lambda _: gate.wait(SECONDS), name="g") for r in (0, 1)
        ]
        while job.progress[0].pending():
            time.sleep(1e-4)
        assert job.progress[0].in_use(1)
        gate.set()
        assert all(handle.wait(SECONDS) for handle in running)
        for progress in job.progress:
            progress.release(1)


def test_pending_are_those_that_have_not_begun():
    with Job(2) as job:
        before = time.perf_counter()
        handle = start(job, 0, "x")
        (operation,) = job.progress[0].pending()
        assert operation.key == (0, "x")
        assert before <= operation.submitted <= time.perf_counter()
        assert operation.handle is handle
        start(job, 1, "x")
        handle.wait(SECONDS)
        assert job.progress[0].pending() == []


def test_a_timeline_shows_how_long_each_waited_and_what_ran_together():
    class Spans(list):
        def span(self, track, name, begin, end, **args):
            self.append((track, name, begin, end, args))

    with Job(2) as job:
        for recording in job.recordings:
            recording.timeline = Spans()
        handles = [start(job, 0, name) for name in ("x", "y")]
        handles += [start(job, 1, name) for name in ("x", "y")]
        for handle in handles:
            handle.wait(SECONDS)
        for recording in job.recordings:
            spans = {name: (track, begin, end) for track, name, begin, end, _ in recording.timeline}
            for name in ("x", "y"):
                track, submitted, decided = spans[f"negotiate allreduce '{name}'"]
                assert track == f"waits: allreduce '{name}'"
                assert spans[f"queue allreduce '{name}'"][1] == decided > submitted
            recording.timeline = None
