"""How a rank waits: look, then offer the core to others, then sleep a little."""

import itertools

import pytest

from hvdkit.errors import StallError
from hvdkit.transport import base
from hvdkit.transport.base import Backoff


@pytest.fixture
def events(monkeypatch):
    """What a pause does, in order: "yield", or the seconds slept."""
    seen = []
    monkeypatch.setattr(base.os, "sched_yield", lambda: seen.append("yield"))
    monkeypatch.setattr(base.time, "sleep", seen.append)
    return seen


def pause(backoff, times):
    for _ in range(times):
        backoff.pause()


def test_at_first_it_only_looks(events):
    backoff = Backoff(50)
    pause(backoff, 50)
    assert events == []
    backoff.pause()
    assert events == ["yield"]


def test_then_it_yields_and_now_and_then_lets_go_of_the_interpreter(events):
    pause(Backoff(0), Backoff.YIELDS)
    assert events.count("yield") == Backoff.YIELDS
    assert events.count(0) == Backoff.YIELDS // 8


def test_then_it_sleeps_longer_and_longer_up_to_a_bound(events):
    backoff = Backoff(3)
    pause(backoff, 3 + Backoff.YIELDS)
    del events[:]
    pause(backoff, 40)
    assert "yield" not in events
    assert 0 < events[0] <= 100e-6
    assert all(a < b for a, b in itertools.pairwise(events) if b < events[-1])
    assert events[-1] == events[-2] == Backoff.LONGEST_SLEEP
    assert max(events) <= 1e-3


def test_it_starts_afresh_after_something_has_happened(events):
    backoff = Backoff(2)
    pause(backoff, 500)
    backoff.reset()
    del events[:]
    pause(backoff, 2)
    assert events == []
    pause(backoff, Backoff.YIELDS + 1)
    assert 0 < events[-1] <= 100e-6


class Request:
    def __init__(self, looks):
        self.looks = looks

    def Test(self):  # noqa: N802
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("looks", [0, 1, 7, 300])
def test_wait_looks_until_the_request_is_complete(events, looks):
    request = Request(looks)
    backoff = Backoff(5)
    pause(backoff, 1000)
    del events[:]
    backoff.wait(request)
    assert request.looks == -1
    assert bool(events) == (looks > 5)


@pytest.mark.usefixtures("events")
def test_a_message_that_is_given_up_keeps_its_memory():
    """It may yet come, and be written to where nobody looks any more."""
    backoff, request = Backoff(0), Message(3)
    backoff.wait(request)
    assert backoff.abandoned == []
    backoff.stop = StallError("enough")
    request = Message(10**9)
    with pytest.raises(StallError, match="enough"):
        backoff.wait(request)
    assert backoff.abandoned == [request]


class Message:
    """A message that has come after some looks."""

    def __init__(self, looks):
        self.looks = looks

    def Test(self):  # noqa: N802
        self.looks -= 1
        return self.looks < 0
