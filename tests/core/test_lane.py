"""A lane: one operation at a time, in order, and no handle is ever left waiting."""

import threading
import time
import weakref
from functools import partial

import pytest

from hvdkit.engine.lane import Lane
from hvdkit.errors import NotInitializedError

SECONDS = 10


@pytest.fixture
def lane():
    lane = Lane(threaded=True)
    yield lane
    lane.close()


class Gate:
    """Work that does not end before it is let go."""

    def __init__(self, log=None, name="gate"):
        self.begun, self.open = threading.Event(), threading.Event()
        self.log, self.name = log, name

    def __call__(self):
        self.begun.set()
        assert self.open.wait(SECONDS)
        if self.log is not None:
            self.log.append(self.name)
        return self.name


def test_results(lane):
    handles = [lane.submit(lambda i=i: i * i) for i in range(50)]
    assert [handle.wait(SECONDS) for handle in handles] == [i * i for i in range(50)]
    assert all(handle.poll() for handle in handles)


def test_operations_run_one_at_a_time_in_the_order_of_submission(lane):
    log, running = [], []

    def work(i):
        running.append(i)
        assert len(running) == 1
        time.sleep(0.0005)
        log.append(i)
        running.remove(i)

    handles = [lane.submit(lambda i=i: work(i)) for i in range(40)]
    for handle in handles:
        handle.wait(SECONDS)
    assert log == list(range(40))


def test_submitting_returns_at_once_and_work_is_done_elsewhere(lane):
    gate = Gate()
    handle = lane.submit(gate)
    assert gate.begun.wait(SECONDS)
    assert not handle.poll()
    gate.open.set()
    assert handle.wait(SECONDS) == "gate"
    assert lane.submit(threading.get_ident).wait(SECONDS) != threading.get_ident()


def test_a_synchronous_call_on_an_idle_lane_runs_here(lane):
    assert lane.call(threading.get_ident) == threading.get_ident()
    lane.submit(int).wait(SECONDS)
    while lane.busy():  # the lane's thread lets go just after the handle is done
        time.sleep(0.001)
    assert lane.call(threading.get_ident) == threading.get_ident()
    assert lane.call(divmod, 17, 5) == (3, 2)
    assert lane.call(dict, a=1) == {"a": 1}


def test_a_synchronous_call_starts_no_thread(lane):
    before = threading.active_count()
    lane.call(int)
    assert threading.active_count() == before


def test_a_synchronous_call_does_not_overtake(lane):
    log = []
    gate = Gate(log)
    lane.submit(gate)
    lane.submit(lambda: log.append("second"))
    threading.Timer(0.05, gate.open.set).start()
    lane.call(log.append, "third")
    assert log == ["gate", "second", "third"]


def test_a_synchronous_call_never_overtakes_whatever_the_moment(lane):
    for turn in range(300):
        log = []
        lane.submit(lambda log=log: log.append("first"))
        if turn % 3 == 0:
            time.sleep(0.0002)
        lane.call(log.append, "second")
        assert log == ["first", "second"]


def test_an_operation_waits_for_a_synchronous_call_on_another_thread(lane):
    log = []
    gate = Gate(log, "call")
    caller = threading.Thread(target=lane.call, args=(gate,))
    caller.start()
    assert gate.begun.wait(SECONDS)
    handle = lane.submit(lambda: log.append("submitted"))
    with pytest.raises(TimeoutError):
        handle.wait(0.05)
    gate.open.set()
    handle.wait(SECONDS)
    caller.join(SECONDS)
    assert log == ["call", "submitted"]


def fail():
    raise KeyError("the work's own error")


def test_an_error_is_raised_where_the_handle_is_waited_for_and_the_lane_goes_on(lane):
    failing = lane.submit(fail)
    after = lane.submit(lambda: "still here")
    with pytest.raises(KeyError, match="the work's own error"):
        failing.wait(SECONDS)
    assert failing.poll()
    with pytest.raises(KeyError):
        failing.wait(SECONDS)
    assert after.wait(SECONDS) == "still here"


def test_an_error_of_a_synchronous_call_is_raised_and_frees_the_lane(lane):
    with pytest.raises(KeyError):
        lane.call(fail)
    assert lane.call(threading.get_ident) == threading.get_ident()


def test_a_timeout_says_how_long_and_the_operation_goes_on(lane):
    gate = Gate()
    handle = lane.submit(gate)
    with pytest.raises(TimeoutError, match=r"within 0\.02 s"):
        handle.wait(0.02)
    gate.open.set()
    assert handle.wait(SECONDS) == "gate"


def test_close_finishes_what_is_in_flight_and_cancels_what_is_queued():
    lane = Lane(threaded=True)
    gate = Gate()
    running = lane.submit(gate)
    assert gate.begun.wait(SECONDS)
    done = []
    queued = [lane.submit(lambda: done.append(1)) for _ in range(3)]
    closing = threading.Thread(target=lane.close)
    closing.start()
    for handle in queued:
        with pytest.raises(NotInitializedError, match="shut down before the operation began"):
            handle.wait(SECONDS)
    assert closing.is_alive(), "it waits for what is in flight"
    gate.open.set()
    closing.join(SECONDS)
    assert not closing.is_alive()
    assert running.wait(SECONDS) == "gate"
    assert done == []


def test_close_ends_the_thread_and_may_come_again():
    before = threading.active_count()
    lane = Lane(threaded=True)
    lane.submit(int).wait(SECONDS)
    assert threading.active_count() == before + 1
    lane.close()
    assert threading.active_count() == before
    lane.close()


def test_close_of_a_lane_that_never_ran():
    Lane(threaded=True).close()
    Lane(threaded=False).close()


@pytest.mark.parametrize("threaded", [True, False])
def test_submit_after_close_is_an_error(threaded):
    """The communicator is gone by then."""
    lane = Lane(threaded=threaded)
    lane.close()
    with pytest.raises(NotInitializedError, match="shut down"):
        lane.submit(int)


@pytest.mark.parametrize("threaded", [True, False])
def test_a_synchronous_call_after_close_is_an_error(threaded):
    lane = Lane(threaded=threaded)
    lane.close()
    with pytest.raises(NotInitializedError, match="shut down"):
        lane.call(int)


def test_without_threads_an_operation_is_complete_when_submit_returns():
    lane = Lane(threaded=False)
    before = threading.active_count()
    handle = lane.submit(threading.get_ident)
    assert handle.poll()
    assert handle.wait() == threading.get_ident()
    failing = lane.submit(fail)
    assert failing.poll()
    with pytest.raises(KeyError):
        failing.wait()
    assert lane.call(threading.get_ident) == threading.get_ident()
    assert threading.active_count() == before
    lane.close()


def test_a_lane_that_sleeps_lets_go_of_its_work(lane):
    """It may hold a bucket of gradients."""

    class Buffer:
        pass

    buffer = Buffer()
    gone = weakref.ref(buffer)
    handle = lane.submit(partial(id, buffer))
    del buffer
    handle.wait(SECONDS)
    deadline = time.monotonic() + SECONDS
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert gone() is None


def test_a_lane_that_is_taken_keeps_others_out(lane):
    """The short way of a synchronous call: `take(False)`, then `leave`."""
    assert lane.free
    assert lane.take(False)
    assert lane.busy()
    log = []
    handle = lane.submit(lambda: log.append("submitted"))
    assert not lane.free
    time.sleep(0.01)
    assert log == []
    lane.leave()
    handle.wait(SECONDS)
    assert log == ["submitted"]


def test_a_callback_that_fails_does_not_end_the_lane(lane, caplog):
    gate = Gate()
    handle = lane.submit(gate)
    handle.when_done(lambda _: fail())
    gate.open.set()
    assert handle.wait(SECONDS) == "gate"
    assert lane.submit(lambda: "still here").wait(SECONDS) == "still here"
    assert "the work's own error" in caplog.text
