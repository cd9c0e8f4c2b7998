"""Handles: complete once, for whoever waits, asks or wants to be called."""

import gc
import threading
import time
import weakref

import pytest

from hvdkit.engine.handles import Handle

SECONDS = 10


def test_a_result():
    handle = Handle("allreduce 'x'")
    assert handle.title == "allreduce 'x'"
    assert not handle.poll()
    handle.complete(42)
    assert handle.poll()
    assert handle.wait() == handle.wait(0) == 42


@pytest.mark.parametrize("nothing", [None, 0, [], False])
def test_a_result_may_be_nothing(nothing):
    handle = Handle()
    handle.complete(nothing)
    assert handle.wait() is nothing


def test_an_error_is_raised_each_time():
    handle = Handle()
    handle.fail(KeyError("its own"))
    assert handle.poll()
    for _ in range(3):
        with pytest.raises(KeyError, match="its own"):
            handle.wait()


def test_run_completes_with_what_the_work_returns_or_raises():
    handle = Handle()
    handle.run(lambda: 7)
    assert handle.wait() == 7
    failing = Handle()
    failing.run(lambda: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        failing.wait()


def test_even_what_ends_a_thread_is_the_waiters():
    """Else it would wait for ever."""

    def leave():
        raise SystemExit(3)

    handle = Handle()
    handle.run(leave)
    with pytest.raises(SystemExit):
        handle.wait()


@pytest.mark.parametrize("timeout", [0.02, 0, -1])
def test_a_timeout_names_the_operation_which_goes_on(timeout):
    handle = Handle("broadcast 'y'")
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"broadcast 'y' did not complete within"):
        handle.wait(timeout)
    assert time.monotonic() - began < SECONDS / 2
    assert handle.waiters == 0
    handle.complete("late")
    assert handle.wait(timeout) == "late"


@pytest.mark.parametrize("timeout", [1e12, float("inf")])
def test_a_timeout_longer_than_a_lock_can_wait(timeout):
    handle = Handle()
    timer = threading.Timer(0.02, handle.complete, (3,))
    timer.start()
    assert handle.wait(timeout) == 3
    timer.join()


def test_several_threads_wait():
    handle, found = Handle(), []
    threads = [
        threading.Thread(target=lambda: found.append(handle.wait()), daemon=True) for _ in "abcd"
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + SECONDS
    while handle.waiters < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert handle.waiters == 4
    handle.complete("x")
    for thread in threads:
        thread.join(SECONDS)
    assert found == ["x"] * 4
    assert handle.waiters == 0


def test_who_waits_for_some_time_only_is_not_counted():
    """For it comes back by itself, whatever the other ranks do."""
    handle = Handle()
    handle.hurry = lambda: counted.append(handle.waiters)
    counted = []
    with pytest.raises(TimeoutError):
        handle.wait(0)
    assert counted == [0]


def test_whoever_begins_to_wait_makes_haste():
    handle, calls = Handle(), []
    handle.hurry = lambda: calls.append(handle.poll())
    with pytest.raises(TimeoutError):
        handle.wait(0)
    assert calls == [False]
    handle.complete(1)
    handle.wait()
    assert calls == [False], "there is nothing to hasten any more"


def test_who_waits_for_a_handle_and_completes_it_on_another_thread_at_whatever_moment():
    for turn in range(300):
        handle = Handle()
        thread = threading.Thread(target=handle.complete, args=(turn,))
        thread.start()
        assert handle.wait(SECONDS) == turn
        thread.join()


# Callbacks


def test_callbacks_come_in_order_on_the_thread_that_completes():
    handle, calls = Handle(), []
    for name in "abc":
        handle.when_done(lambda h, name=name: calls.append((name, h.poll(), threading.get_ident())))
    assert calls == []
    thread = threading.Thread(target=handle.complete, args=(1,))
    thread.start()
    thread.join()
    assert calls == [(name, True, thread.ident) for name in "abc"]


def test_a_callback_that_comes_too_late_is_called_at_once():
    handle, calls = Handle(), []
    handle.fail(KeyError())
    handle.when_done(calls.append)
    assert calls == [handle]


def test_each_callback_is_called_once_whatever_the_moment():
    """It is registered while another thread completes the handle, and both see it there."""
    for turn in range(300):
        handle, calls = Handle(), []
        thread = threading.Thread(target=handle.complete, args=(turn,))
        thread.start()
        for number in range(5):
            handle.when_done(lambda _, n=number, calls=calls: calls.append(n))
        thread.join()
        assert sorted(calls) == [0, 1, 2, 3, 4]


def test_a_callback_that_fails_is_logged_and_keeps_neither_the_others_nor_the_result(caplog):
    handle, calls = Handle("allreduce 'x'"), []
    handle.when_done(lambda _: {}["missing"])
    handle.when_done(calls.append)
    handle.complete(5)
    assert handle.wait() == 5
    assert calls == [handle]
    assert "a callback of allreduce 'x' failed" in caplog.text
    assert "KeyError: 'missing'" in caplog.text


def test_a_callback_may_register_another():
    handle, calls = Handle(), []
    handle.when_done(lambda h: h.when_done(calls.append))
    handle.complete(1)
    assert calls == [handle]


def test_a_handle_that_is_done_keeps_no_callback_alive():
    class Buffer:
        def __call__(self, handle):
            pass

    handle, buffer = Handle(), Buffer()
    gone = weakref.ref(buffer)
    handle.when_done(buffer)
    del buffer
    assert gone() is not None
    handle.complete(1)
    gc.collect()
    assert gone() is None
