"""The engine: one operation at a time, in order, and no handle is ever left waiting."""

import threading
import time
import weakref
from functools import partial

import pytest

from hvdkit.engine.progress import Engine, Handle
from hvdkit.errors import NotInitializedError

SECONDS = 10


@pytest.fixture
def engine():
    engine = Engine(threaded=True)
    yield engine
    engine.close()


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


def test_results(engine):
    handles = [engine.submit(lambda i=i: i * i) for i in range(50)]
    assert [handle.wait(SECONDS) for handle in handles] == [i * i for i in range(50)]
    assert all(handle.poll() for handle in handles)


def test_operations_run_one_at_a_time_in_the_order_of_submission(engine):
    log, running = [], []

    def work(i):
        running.append(i)
        assert len(running) == 1
        time.sleep(0.0005)
        log.append(i)
        running.remove(i)

    handles = [engine.submit(lambda i=i: work(i)) for i in range(40)]
    for handle in handles:
        handle.wait(SECONDS)
    assert log == list(range(40))


def test_submitting_returns_at_once_and_work_is_done_elsewhere(engine):
    gate = Gate()
    handle = engine.submit(gate)
    assert gate.begun.wait(SECONDS)
    assert not handle.poll()
    gate.open.set()
    assert handle.wait(SECONDS) == "gate"
    assert engine.submit(threading.get_ident).wait(SECONDS) != threading.get_ident()


def test_a_synchronous_call_on_an_idle_engine_runs_here(engine):
    assert engine.call(threading.get_ident) == threading.get_ident()
    engine.submit(int).wait(SECONDS)
    while engine._busy.locked():  # the progress thread lets go just after the handle is done
        time.sleep(0.001)
    assert engine.call(threading.get_ident) == threading.get_ident()
    assert engine.call(divmod, 17, 5) == (3, 2)
    assert engine.call(dict, a=1) == {"a": 1}


def test_a_synchronous_call_starts_no_thread(engine):
    before = threading.active_count()
    engine.call(int)
    assert threading.active_count() == before


def test_a_synchronous_call_does_not_overtake(engine):
    log = []
    gate = Gate(log)
    engine.submit(gate)
    engine.submit(lambda: log.append("second"))
    threading.Timer(0.05, gate.open.set).start()
    engine.call(log.append, "third")
    assert log == ["gate", "second", "third"]


def test_a_synchronous_call_never_overtakes_whatever_the_moment(engine):
    for turn in range(300):
        log = []
        engine.submit(lambda log=log: log.append("first"))
        if turn % 3 == 0:
            time.sleep(0.0002)
        engine.call(log.append, "second")
        assert log == ["first", "second"]


def test_an_operation_waits_for_a_synchronous_call_on_another_thread(engine):
    log = []
    gate = Gate(log, "call")
    caller = threading.Thread(target=engine.call, args=(gate,))
    caller.start()
    assert gate.begun.wait(SECONDS)
    handle = engine.submit(lambda: log.append("submitted"))
    with pytest.raises(TimeoutError):
        handle.wait(0.05)
    gate.open.set()
    handle.wait(SECONDS)
    caller.join(SECONDS)
    assert log == ["call", "submitted"]


def fail():
    raise KeyError("the work's own error")


def test_an_error_is_raised_where_the_handle_is_waited_for_and_the_engine_goes_on(engine):
    failing = engine.submit(fail)
    after = engine.submit(lambda: "still here")
    with pytest.raises(KeyError, match="the work's own error"):
        failing.wait(SECONDS)
    assert failing.poll()
    with pytest.raises(KeyError):
        failing.wait(SECONDS)
    assert after.wait(SECONDS) == "still here"


def test_an_error_of_a_synchronous_call_is_raised_and_frees_the_engine(engine):
    with pytest.raises(KeyError):
        engine.call(fail)
    assert engine.call(threading.get_ident) == threading.get_ident()


def test_a_timeout_says_how_long_and_the_operation_goes_on(engine):
    gate = Gate()
    handle = engine.submit(gate)
    with pytest.raises(TimeoutError, match=r"within 0\.02 s"):
        handle.wait(0.02)
    gate.open.set()
    assert handle.wait(SECONDS) == "gate"


def test_close_finishes_what_is_in_flight_and_cancels_what_is_queued():
    engine = Engine(threaded=True)
    gate = Gate()
    running = engine.submit(gate)
    assert gate.begun.wait(SECONDS)
    done = []
    queued = [engine.submit(lambda: done.append(1)) for _ in range(3)]
    closing = threading.Thread(target=engine.close)
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
    engine = Engine(threaded=True)
    engine.submit(int).wait(SECONDS)
    assert threading.active_count() == before + 1
    engine.close()
    assert threading.active_count() == before
    engine.close()


def test_close_of_an_engine_that_never_ran():
    Engine(threaded=True).close()
    Engine(threaded=False).close()


@pytest.mark.parametrize("threaded", [True, False])
def test_submit_after_close_is_an_error(threaded):
    """The communicator is gone by then."""
    engine = Engine(threaded=threaded)
    engine.close()
    with pytest.raises(NotInitializedError, match="shut down"):
        engine.submit(int)


@pytest.mark.parametrize("threaded", [True, False])
def test_a_synchronous_call_after_close_is_an_error(threaded):
    engine = Engine(threaded=threaded)
    engine.close()
    with pytest.raises(NotInitializedError, match="shut down"):
        engine.call(int)


def test_without_threads_an_operation_is_complete_when_submit_returns():
    engine = Engine(threaded=False)
    before = threading.active_count()
    handle = engine.submit(threading.get_ident)
    assert handle.poll()
    assert handle.wait() == threading.get_ident()
    failing = engine.submit(fail)
    assert failing.poll()
    with pytest.raises(KeyError):
        failing.wait()
    assert engine.call(threading.get_ident) == threading.get_ident()
    assert threading.active_count() == before
    engine.close()


def test_a_handle_lets_go_of_its_work():
    """It may hold a bucket of gradients."""

    class Buffer:
        pass

    buffer = Buffer()
    gone = weakref.ref(buffer)
    handle = Handle(partial(id, buffer))
    del buffer
    assert gone() is not None
    handle.run()
    assert gone() is None
