"""Ranks that join or leave, and the named operations of the others."""

import itertools
import random
import threading
import time
from contextlib import suppress

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
from hvdkit.collectives.calls import Call
from hvdkit.dtypes import DTYPES, FLOATS, Adasum, Average, Max, Min, Product, Sum
from hvdkit.errors import (
    ArgumentError,
    HorovodInternalError,
    NotInitializedError,
    PeerError,
    UnsupportedError,
)


@pytest.fixture(autouse=True)
def short_farewells(monkeypatch):
    """Ranks leave one by one here, and need not wait for others that stay."""
    monkeypatch.setattr("hvdkit.engine.progress.SECONDS_FOR_FAREWELLS", 0.02)


# Joining


def test_a_rank_with_less_data_joins_and_the_others_go_on():
    steps = [2, 5, 3]

    def body(rank):
        for turn in range(steps[rank]):
            there = sum(steps[r] > turn for r in range(3))
            handles = [start(job, rank, f"{i}", 6.0, op=Average) for i in range(4)]
            assert [value_of(handle) for handle in handles] == [6.0 * there / 3] * 4
        return job.progress[rank].join().wait(SECONDS)

    with Job(3) as job:
        assert job.on_ranks(body) == [1, 1, 1]
        assert_in_step(job)


@pytest.mark.parametrize("op", [Sum, Average, Min, Max, Product, Adasum], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rank_that_has_joined_changes_nothing(op, dtype):
    if (op is Average and dtype.kind == "b") or (op in (Min, Max) and dtype.kind == "c"):
        pytest.skip("not defined")
    if op is Adasum and dtype not in FLOATS:
        pytest.skip("not defined")
    source = np.array([3, 0, 1, 100]).astype(dtype)
    with Job(2) as job:
        joining = job.progress[1].join()
        target = np.empty_like(source)
        job.at(0).allreduce_async([(source, target)], name="x", op=op).wait(SECONDS)
        wanted = source / 2 if op is Average else source
        np.testing.assert_array_equal(target, wanted.astype(dtype))
        job.progress[0].join()
        assert joining.wait(SECONDS) == 0


def test_what_a_rank_announced_before_it_joined_is_not_mixed_with_what_it_did_not():
    """Rank 1 brings `a` and then joins; rank 0 has a, b and c, which may travel together."""
    with Job(2) as job:
        for turn in range(20):
            last = start(job, 1, "a", turn)
            joining = job.progress[1].join()
            handles = [start(job, 0, name, turn) for name in "abc"]
            assert [value_of(handle) for handle in handles] == [2 * turn, turn, turn]
            assert value_of(last) == 2 * turn
            job.progress[0].join()
            joining.wait(SECONDS)


def test_groups_of_arrays_when_a_rank_has_joined():
    with Job(2) as job:
        job.progress[1].join()
        pairs = [(np.full(n, 1.0, d), np.empty(n, d)) for n, d in [(3, "f4"), (9, "f8"), (2, "f4")]]
        job.at(0).allreduce_async(pairs, name="x", op=Sum).wait(SECONDS)
        assert all(np.all(target == 1) for _, target in pairs)


def test_other_collectives_are_refused_when_a_rank_has_joined():
    with Job(3) as job:
        joining = job.progress[2].join()
        handles = [allgather(job, rank, "x", np.zeros(2)) for rank in range(2)]
        for handle in handles:
            error = error_of(handle)
            assert isinstance(error, UnsupportedError)
            assert "allgather 'x': rank 2 called join()" in str(error)
        assert not joining.poll()


def test_join_twice_at_once_is_an_error():
    with Job(2) as job:
        joining = job.progress[0].join()
        with pytest.raises(ArgumentError, match="twice"):
            job.progress[0].join()
        job.progress[1].join()
        assert joining.wait(SECONDS) in (0, 1)


# Leaving


@pytest.mark.parametrize("leaver", [0, 1])
def test_who_waits_for_a_rank_that_leaves_gets_an_error(leaver):
    with Job(3, [(0, 2), (1, 2)]) as job:
        others = [rank for rank in range(3) if rank != leaver]
        waiting = [start(job, rank, "x") for rank in others]
        own = start(job, leaver, "mine")
        job.progress[leaver].close()
        for handle in waiting:
            error = error_of(handle)
            assert isinstance(error, PeerError)
            assert f"allreduce 'x': rank {leaver} called shutdown()" in str(error)
        assert isinstance(error_of(own), NotInitializedError)
        with pytest.raises(NotInitializedError):
            start(job, leaver, "y")
        with pytest.raises(PeerError, match=rf"rank {leaver} (has )?called shutdown\(\)"):
            start(job, others[0], "y").wait(SECONDS)
        with pytest.raises(PeerError, match=rf"join: rank {leaver} called shutdown\(\)"):
            job.progress[others[0]].join().wait(SECONDS)


def test_process_sets_without_the_rank_that_left_go_on():
    with Job(3, [(0, 2)]) as job:
        job.progress[1].close()
        for _ in range(3):
            handles = [start(job, rank, "x", number=1) for rank in (2, 0)]
            assert [value_of(handle) for handle in handles] == [2, 2]


def test_nothing_goes_on_without_rank_0():
    """It is the one who decides."""
    with Job(3, [(1, 2)]) as job:
        handle = start(job, 1, "x", number=1)
        job.progress[0].close()
        assert isinstance(error_of(handle), PeerError)
        with pytest.raises(PeerError, match=r"rank 0 (has )?called shutdown\(\)"):
            start(job, 2, "x", number=1).wait(SECONDS)


def test_a_rank_in_join_is_told_when_another_leaves():
    with Job(2) as job:
        joining = job.progress[0].join()
        job.progress[1].close()
        assert isinstance(error_of(joining), PeerError)


@pytest.mark.parametrize("connect", [None, pipe_mail, message_mail])
def test_nothing_begins_with_a_rank_that_is_about_to_leave(connect, monkeypatch):
    """Scripts that forget to wait for their last operation: the others must not hang in it."""
    monkeypatch.setattr("hvdkit.transport.mail.SECONDS_TO_DELIVER", 0.01)
    rng = random.Random(1)
    for turn in range(60):
        job = Job(3, [(0, 1), (1, 2)], connect=connect)
        ended = []

        def body(rank, job=job, ended=ended, turn=turn):
            handles = []
            for number in job.members:
                with suppress(PeerError, KeyError):  # another has left, or this rank is not in it
                    handles.append(start(job, rank, "x", number=number))
            time.sleep(rng.random() * (turn % 3) * 3e-4)
            job.progress[rank].close()
            for handle in handles:
                with suppress(PeerError, NotInitializedError):
                    handle.wait(SECONDS)
                ended.append(handle.poll())

        job.on_ranks(body)
        assert all(ended)
        for box in job.boxes:
            box.close()


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_rank_that_has_left_hears_that_others_leave_whom_a_call_of_its_own_waits_for(leaver):
    """A bucket of gradients is on its way there; the others stop before that step.

    It ends when they say how many calls they have made, although for them it has left already.
    """
    job = Job(3)
    lane, group = job.at(leaver).lane, job.at(leaver).group
    handle = lane.submit(lambda: group.agree(Call("bucket", None)))
    while not group.operations:
        time.sleep(0.001)
    for lane in job.lanes:
        lane.stop()
    closing = [threading.Thread(target=progress.close) for progress in job.progress]
    closing[leaver].start()
    others = [rank for rank in range(3) if rank != leaver]
    deadline = time.monotonic() + SECONDS
    while not all(leaver in job.progress[rank].gone for rank in others):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert not handle.poll()
    for rank in others:
        closing[rank].start()
    error = error_of(handle)
    assert isinstance(error, PeerError)
    assert "bucket: rank" in str(error)
    for thread in closing:
        thread.join(SECONDS)
        assert not thread.is_alive()
    job.close()


def test_close_runs_what_was_decided():
    with Job(2) as job:
        handles = [[start(job, rank, f"{i}") for i in range(20)] for rank in range(2)]
        assert value_of(handles[0][0]) == 1
        job.close()
        for handle in itertools.chain(*handles):
            assert handle.poll()


def test_after_close():
    job = Job(2)
    job.close()
    with pytest.raises(NotInitializedError):
        start(job, 0, "x")
    with pytest.raises(NotInitializedError):
        job.progress[0].join()
    with pytest.raises(UnsupportedError):
        job.at(0).allreduce_async([(np.zeros(2, "M8[s]"),) * 2], name="x", op=Sum)


def test_a_rank_does_not_wait_for_ever_to_be_let_go(monkeypatch):
    """Rank 0 may be dead."""
    monkeypatch.setattr("hvdkit.engine.progress.SECONDS_TO_LEAVE", 0.05)
    job = Job(2)
    handle = start(job, 1, "x")
    monkeypatch.setattr(job.boxes[1], "send", lambda *_: None)
    began = time.monotonic()
    job.progress[1].close()
    assert time.monotonic() - began < SECONDS / 2
    assert isinstance(error_of(handle), NotInitializedError)
    job.progress[0].close()


@pytest.mark.parametrize("where", [0, 1])
def test_a_progress_thread_that_fails_leaves_nobody_waiting(where, caplog):
    with Job(3) as job:
        handles = [start(job, rank, "x") for rank in range(3) if rank != 2]
        joining = job.progress[2].join() if where == 1 else None
        for handle in handles:
            if joining is not None:
                assert value_of(handle) == 1
        waiting = [start(job, rank, "y") for rank in range(2) if rank != where]
        broken = start(job, where, "z")
        job.boxes[where].failing = MemoryError("no more")
        job.boxes[where].wake()
        for handle in [broken, *waiting, *([] if joining is None else [joining])]:
            assert isinstance(error_of(handle), HorovodInternalError)
        assert "MemoryError('no more')" in str(error_of(broken))
        assert isinstance(error_of(broken).__cause__, MemoryError)
        with pytest.raises(HorovodInternalError, match="no more"):
            start(job, where, "later")
        assert "progress thread failed" in caplog.text


def test_when_one_rank_fails_those_in_the_same_collective_end():
    """Rank 1's thread fails in the middle of a collective that rank 0 is in."""

    class Broken(BaseException):
        pass

    with Job(2) as job:

        def work(group):
            group.transport.allgather_object(None)
            if group.rank == 1:
                job.boxes[1].failing = Broken()
                return None
            return group.transport.allgather_object(None)

        handles = [job.at(rank).start("custom", [], work, name="x") for rank in range(2)]
        handles[1].wait(SECONDS)
        error_of(handles[0])
