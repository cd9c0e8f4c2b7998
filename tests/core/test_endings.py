"""Which errors are another rank's fault, and what is put back when a job is over."""

import sys
from types import SimpleNamespace

import pytest

from hvdkit.endings import LastWords, suffered_from
from hvdkit.errors import MismatchError, PeerError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PeerError("local rank 1 died\nrestart the job"), "local rank 1 died"),
        (PeerError(""), "another rank has ended"),
        (
            RuntimeError("Graph execution error:\n\nhvdkit.errors.PeerError: rank 2 died\nmore"),
            "rank 2 died",
        ),
        (RuntimeError("PeerError"), None),
        (MismatchError("ranks disagree"), None),
        (ValueError(), None),
    ],
)
def test_whose_fault_an_error_is(error, line):
    assert suffered_from(error) == line


@pytest.fixture
def job(monkeypatch):
    """A context that notes with which code it was aborted."""
    codes = []
    monkeypatch.setattr("hvdkit.endings._SECONDS_TO_FORWARD", 0.0)
    topology = SimpleNamespace(rank=1, size=3)
    return SimpleNamespace(topology=topology, abort=codes.append, codes=codes)


def test_the_cause_is_shown_with_its_traceback(job, capsys):
    LastWords(job)(ValueError, ValueError("no data"), None)
    said = capsys.readouterr().err
    assert said.endswith(
        "ValueError: no data\nhvdkit: rank 1 of 3 raised ValueError; ending the job\n"
    )
    assert job.codes == [1]


def test_the_effect_is_one_line(job, capsys):
    LastWords(job)(PeerError, PeerError("rank 2 died\nrestart"), None)
    assert capsys.readouterr().err == (
        "hvdkit: rank 1 of 3 cannot go on: rank 2 died; ending the job\n"
    )
    assert job.codes == [1]


def test_what_was_there_before_is_put_back(job, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    words = LastWords(job)
    words.install()
    assert sys.excepthook is words
    words.remove()
    assert sys.excepthook is sys.__excepthook__
    words.install()
    monkeypatch.setattr(sys, "excepthook", print)
    words.remove()
    assert sys.excepthook is print
