"""Which errors are another rank's fault, and what is put back when a job is over."""

import builtins
import pickle
import sys
import threading
from types import SimpleNamespace

import pytest

from hvdkit.endings import LastWords, status_of, suffered_from
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


@pytest.mark.parametrize(
    ("code", "status"), [(None, 0), (0, 0), (3, 3), (-1, 255), (256, 0), (True, 1), ("text", 1)]
)
def test_the_status_of_an_exit(code, status):
    assert status_of(code) == status


@pytest.fixture
def words(job):
    words = LastWords(job)
    words.install()
    yield words
    words.remove()


def test_an_exit_that_somebody_catches_ends_nothing(job, words):
    for leave in (sys.exit, builtins.exit, builtins.quit):
        with pytest.raises(SystemExit) as caught:
            leave(3)
        assert caught.value.code == 3
        assert type(pickle.loads(pickle.dumps(caught.value))) is SystemExit
    words.at_exit()
    assert job.codes == []


def test_another_threads_exit_is_what_it_was(job, words):
    seen = []

    def leave():
        try:
            sys.exit(3)
        except SystemExit as exc:
            seen.append(type(exc))

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    words.at_exit()
    assert (seen, job.codes) == ([SystemExit], [])


def test_the_ways_out_are_put_back(job, monkeypatch):
    before = sys.exit, builtins.exit, builtins.quit
    words = LastWords(job)
    words.install()
    assert sys.exit is not before[0]
    words.remove()
    assert (sys.exit, builtins.exit, builtins.quit) == before
    words.install()
    monkeypatch.setattr(sys, "exit", print)
    words.remove()
    assert sys.exit is print


def end(words, code, cause=None):
    """Let the interpreter end by SystemExit(code), as far as `words` can tell."""
    error = SystemExit(code)
    error.__context__ = cause
    words._note(error)
    words.at_exit()


def test_what_is_said_of_an_exit(job, words, capsys):
    end(words, 0)
    assert (job.codes, capsys.readouterr().err) == ([], "")
    end(words, 3)
    assert capsys.readouterr().err == "hvdkit: rank 1 of 3 exits with status 3; ending the job\n"
    end(words, 4, PeerError("rank 2 died"))
    assert capsys.readouterr().err == (
        "hvdkit: rank 1 of 3 cannot go on: rank 2 died; ending the job\n"
    )
    assert job.codes == [3, 4]
