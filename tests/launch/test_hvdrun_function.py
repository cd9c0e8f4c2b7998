"""`run` over TCP: plain processes in the place of mpirun's."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import pytest
from launching import end_group

import hvdkit as hvd
from hvdkit.launch import JobError, run

from .helpers import REPOSITORY, is_running, plain_environment, wait_for

SECONDS = 30


@pytest.fixture(autouse=True)
def directories(tmp_path, monkeypatch):
    """The folder in which jobs have their directories; after each test it must be empty."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    wait_for(lambda: list(folder.iterdir()) == [], SECONDS, "the jobs' directories go")


# What the ranks do


def mean(x, *, plus):
    hvd.init()
    print(f"rank {hvd.rank()} of {hvd.size()}")
    return hvd.rank(), hvd.allreduce(x * hvd.rank()) + plus


def surroundings():
    return os.environ["HVDKIT_RANK"], os.environ["MARK"], "mpi4py.MPI" in sys.modules


def end_on_rank_1(folder, how):
    hvd.init()
    (folder / f"pid{hvd.rank()}").write_text(str(os.getpid()))
    hvd.barrier()
    if hvd.rank() == 1:
        how()
    time.sleep(600)


def raise_an_error():
    raise ZeroDivisionError("the loss of rank 1")


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def exit_at_once():
    os._exit(4)


def inner(value):
    hvd.init()
    return value, hvd.rank(), hvd.size()


def outer(**how):
    hvd.init()
    return run(inner, (hvd.rank(),), np=2, **how) if hvd.rank() == 1 else hvd.size()


def assert_ended(folder):
    __tracebackhide__ = True
    pids = [int(note.read_text()) for note in folder.glob("pid*")]
    assert len(pids) == 3
    wait_for(lambda: not any(map(is_running, pids)), SECONDS, "the ranks end")


@pytest.mark.parametrize("name", ["use_tcp", "use_gloo"])
def test_results_in_rank_order(name, capfd):
    results = run(mean, (np.arange(3.0),), {"plus": 1}, np=3, **{name: True})
    assert [rank for rank, _ in results] == [0, 1, 2]
    for _, result in results:
        np.testing.assert_array_equal(result, np.arange(3.0) + 1)
    shown = capfd.readouterr().out
    assert sorted(shown.splitlines()) == [f"rank {rank} of 3" for rank in range(3)]


def test_the_callers_surroundings_and_hosts():
    results = run(surroundings, np=2, use_tcp=True, env={"MARK": "x"}, hosts="localhost:2")
    assert [result[:2] for result in results] == [("0", "x"), ("1", "x")]


@pytest.mark.parametrize("inside", [{"use_tcp": True}, {}])
def test_a_job_within_a_job(inside):
    assert run(outer, kwargs=inside, np=2, use_tcp=True) == [2, [(1, 0, 2), (1, 1, 2)]]


@pytest.mark.parametrize(
    ("how", "what", "said"),
    [
        (
            raise_an_error,
            "rank 1 of 3 raised ZeroDivisionError: the loss of rank 1\n",
            "ended with status 1",
        ),
        (be_killed, "rank 1 of 3 was killed by signal 9 (SIGKILL)", "was killed by signal 9"),
        (exit_at_once, "rank 1 of 3 ended with status 4 before its", "ended with status 4\n"),
    ],
)
def test_a_rank_that_fails_is_named_and_ends_the_others(tmp_path, capfd, how, what, said):
    """hvdrun says the same of its end as the error does."""
    began = time.monotonic()
    with pytest.raises(JobError) as error:
        run(end_on_rank_1, (tmp_path, how), np=3, use_tcp=True)
    assert time.monotonic() - began < SECONDS
    assert error.value.rank == 1
    assert str(error.value).startswith(what)
    stderr = capfd.readouterr().err
    assert re.search(rf"^hvdrun: rank 1 of 3 on \S+ {said}", stderr, re.MULTILINE), stderr
    assert stderr.count("hvdrun:") == 1
    assert_ended(tmp_path)


@pytest.fixture
def rsh(monkeypatch, tmp_path):
    """Hosts n1, n2, ... are this one, and there are no others."""
    agent = tmp_path / "agent"
    agent.write_text(
        '#!/bin/sh\ncase $1 in n*) shift; exec sh -c "$*";; esac\n'
        "echo no route to $1 >&2; exit 255\n"
    )
    agent.chmod(0o755)
    monkeypatch.setenv("HVDKIT_RSH", str(agent))


@pytest.mark.usefixtures("rsh")
def test_a_host_that_cannot_be_reached(capfd):
    with pytest.raises(hvd.LauncherError, match="hvdrun ended with status 2 before all 2 ranks"):
        run(surroundings, np=2, use_tcp=True, hosts="localhost:1,far:1")
    assert "far: cannot be reached (no route to far)" in capfd.readouterr().err


@pytest.mark.usefixtures("rsh")
def test_over_mpi_hosts_are_checked_before_mpirun_is_started(monkeypatch, capfd):
    with pytest.raises(hvd.LauncherError) as error:
        run(surroundings, np=3, use_mpi=True, hosts="localhost:1,far:1,n1:1")
    assert str(error.value) == (
        "nothing was started, because these hosts cannot take part:\n"
        "  far: cannot be reached (no route to far)"
    )
    monkeypatch.setattr("hvdkit.launch.guard.__file__", "/nowhere/guard.py")
    with pytest.raises(hvd.LauncherError, match=r"n1: there is no file '/nowhere/guard.py'"):
        run(surroundings, np=2, use_mpi=True, hosts="localhost:1,n1:1")
    assert capfd.readouterr().err == ""


def test_a_launcher_that_is_killed_takes_its_ranks_along(tmp_path, directories):
    source = f"""
        import tempfile
        from pathlib import Path
        from launch.test_hvdrun_function import end_on_rank_1, time, run
        tempfile.tempdir = {str(directories)!r}
        run(end_on_rank_1, (Path({str(tmp_path)!r}), time.tzset), np=3, use_tcp=True)
    """
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    launcher = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)],
        env=plain_environment(PYTHONPATH=path),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(list(tmp_path.glob("pid*"))) == 3, SECONDS, "the ranks start")
        launcher.kill()
        launcher.wait()
    finally:
        end_group(launcher)
    assert_ended(tmp_path)


def test_where_no_mpirun_fits_ranks_speak_tcp(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}")
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    env = {"MARK": "x", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    results = run(surroundings, np=2, executable=str(script), env=env)
    assert [result[0] for result in results] == ["0", "1"]


def test_mpi_and_tcp_exclude_each_other():
    with pytest.raises(hvd.ArgumentError, match="exclude each other"):
        run(surroundings, use_tcp=True, use_mpi=True)
