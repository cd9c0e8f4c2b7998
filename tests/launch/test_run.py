"""`run`: results, errors and ends of ranks that a process starts for one call."""

import atexit
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from launching import end_group

import hvdkit as hvd
from hvdkit.launch import JobError, run
from hvdkit.launch.guard import folder_name
from hvdkit.launch.mpirun import find_mpirun, identify

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


@pytest.fixture
def without_cloudpickle(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)


def hydra():
    """Return whether mpirun is MPICH's, which tells of a mere status to no other host."""
    return identify(find_mpirun()).open_mpi is None


def assert_ended(folder):
    __tracebackhide__ = True
    pids = [int(note.read_text()) for note in folder.glob("pid*")]
    assert pids
    wait_for(lambda: not any(map(is_running, pids)), SECONDS, "the ranks end")


# What the ranks do


def mean(x, *, plus):
    hvd.init()
    print(f"[rank {hvd.rank()} of {hvd.size()}]")
    return hvd.rank(), hvd.allreduce(x * hvd.rank()) + plus


def surroundings():
    return os.getpid(), os.environ["MARK"], str(Path.cwd()), sys.argv


def write_and_fail():
    hvd.init()
    print(f"said by {hvd.rank()}")
    print(f"warned by {hvd.rank()}", file=sys.stderr)
    if hvd.rank() == 1:
        raise LookupError("in a file")
    hvd.barrier()


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
    os._exit(0)


def exit_with_a_status():
    os._exit(4)


def exit_after_the_result():
    atexit.register(os._exit, 3)
    return 5


def inner(value):
    hvd.init()
    return value, hvd.rank(), hvd.size()


def outer():
    hvd.init()
    return run(inner, (hvd.rank(),), np=2) if hvd.rank() == 1 else hvd.size()


# Results


def test_results_in_rank_order(capfd):
    results = run(mean, (np.arange(3.0),), {"plus": 1}, np=3)
    assert [rank for rank, _ in results] == [0, 1, 2]
    for _, result in results:
        np.testing.assert_array_equal(result, np.arange(3.0) + 1)
    shown = capfd.readouterr().out
    assert sorted(re.findall(r"\[.*?\]", shown)) == [f"[rank {r} of 3]" for r in range(3)]


def test_a_function_without_init_in_the_callers_surroundings():
    results = run(surroundings, num_proc=2, env={"MARK": "here"}, hosts="localhost:2")
    assert len({pid for pid, *_ in results} | {os.getpid()}) == 3
    for _, *rest in results:
        assert rest == ["here", str(Path.cwd()), sys.argv]


def test_a_job_within_a_job():
    assert run(outer, np=2) == [2, [(1, 0, 2), (1, 1, 2)]]


@pytest.mark.usefixtures("without_cloudpickle")
@pytest.mark.parametrize("function", [lambda: 1, type("Local", (), {})])
def test_without_cloudpickle_a_lambda_is_an_error_that_says_what_to_install(function):
    with pytest.raises(hvd.UnsupportedError, match="cannot send") as error:
        run(function, np=2)
    assert "pip install 'hvdkit[run]'" in str(error.value)
    assert "at the top of a module" in str(error.value)


SCRIPT = """
    import sys
    sys.modules["cloudpickle"] = None
    from hvdkit.launch import run

    class Answer:
        def __init__(self, value): self.value = value

    def function(x):
        return Answer(x + 1)
"""


def run_script(tmp_path, source):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT) + textwrap.dedent(source))
    return subprocess.run(
        [sys.executable, str(script)],
        env=plain_environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_script_without_cloudpickle(tmp_path):
    call = "if __name__ == '__main__': print([type(r) is Answer and r.value for r in "
    done = run_script(tmp_path, call + "run(function, (4,), np=2)])")
    assert (done.returncode, done.stdout) == (0, "[5, 5]\n"), done.stderr


def test_a_script_without_cloudpickle_and_without_a_guard_does_not_start_itself(tmp_path):
    done = run_script(tmp_path, "run(function, (4,), np=1)")
    assert done.returncode == 1
    assert "put the call under  if __name__ == '__main__':" in done.stderr


# Ends


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (raise_an_error, "rank 1 of 3 raised ZeroDivisionError: the loss of rank 1\n"),
        (be_killed, "rank 1 of 3 was killed by signal 9 (SIGKILL)"),
        (exit_at_once, "rank 1 of 3 ended with status 0 before its function returned"),
        (exit_with_a_status, "rank 1 of 3 ended with status 4 before its function returned"),
    ],
)
def test_a_rank_that_fails_is_named_and_ends_the_others(tmp_path, capfd, how, what):
    began = time.monotonic()
    with pytest.raises(JobError) as error:
        run(end_on_rank_1, (tmp_path, how), np=3)
    assert time.monotonic() - began < SECONDS
    assert error.value.rank == 1
    assert isinstance(error.value, hvd.HvdkitError)
    message = str(error.value)
    assert message.startswith(what)
    if how is raise_an_error:
        assert "in raise_an_error" in message
        assert message.index("Traceback") == len(what) + 1
        assert "worker.py" not in message
    if how is not be_killed and not hydra():
        assert "signal 9" not in capfd.readouterr().err
    assert_ended(tmp_path)


def test_output_files(tmp_path, capfd):
    with pytest.raises(JobError, match="LookupError: in a file"):
        run(write_and_fail, np=2, output_filename=tmp_path / "out/of")
    for rank in range(2):
        folder = tmp_path / f"out/of/rank.{rank}"
        assert (folder / "stdout").read_text() == f"said by {rank}\n"
        assert f"warned by {rank}\n" in (folder / "stderr").read_text()
    assert "LookupError: in a file" in (tmp_path / "out/of/rank.1/stderr").read_text()
    shown = "".join(capfd.readouterr())
    assert "said by" not in shown
    assert "warned by" not in shown


def test_output_folders_sort_by_rank():
    """Horovod's own padding fails at 1 rank, and at 11 gives rank 10 as many digits as rank 9."""
    assert [folder_name(0, 1), folder_name(9, 10)] == ["rank.0", "rank.9"]
    assert [folder_name(9, 11), folder_name(10, 11)] == ["rank.09", "rank.10"]
    assert folder_name(7, 101) == "rank.007"


def test_a_rank_that_fails_after_its_function_has_returned():
    with pytest.warns(UserWarning, match="after its function had returned"):
        assert run(exit_after_the_result, np=2) == [5, 5]


def test_timeout(tmp_path):
    with pytest.raises(JobError, match="had not ended after timeout=3 s") as error:
        run(end_on_rank_1, (tmp_path, time.tzset), np=2, timeout=3)
    assert error.value.rank is None
    assert_ended(tmp_path)


def test_start_timeout():
    with pytest.raises(hvd.LauncherError, match=r"not all ranks had started after 0\.1 s"):
        run(surroundings, np=2, start_timeout=0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_ended_takes_its_ranks_along(tmp_path, directories, number):
    """SIGKILL leaves it no time to tidy up: the ranks' guards do."""
    source = f"""
        import signal, tempfile
        from pathlib import Path
        from launch.test_run import end_on_rank_1, time, run
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tempfile.tempdir = {str(directories)!r}
        run(end_on_rank_1, (Path({str(tmp_path)!r}), time.tzset), np=2)
    """
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    launcher = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)],
        env=plain_environment(PYTHONPATH=path),
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(list(tmp_path.glob("pid*"))) == 2, SECONDS, "the ranks start")
        launcher.send_signal(number)
        stderr = launcher.communicate(timeout=SECONDS)[1]
    finally:
        end_group(launcher)
    assert launcher.returncode == -number
    assert (b"KeyboardInterrupt" in stderr) == (number == signal.SIGINT)
    assert_ended(tmp_path)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"min_np": 2}, hvd.UnsupportedError, "elastic jobs are not supported"),
        ({"host_discovery_script": "x"}, hvd.UnsupportedError, "elastic jobs are not supported"),
        ({"use_gloo": True, "use_mpi": True}, hvd.ArgumentError, "exclude each other"),
        ({"use_tcp": True, "mpi_args": "-v"}, hvd.ArgumentError, "exclude each other"),
        ({"nump": 2}, TypeError, "unexpected keyword argument 'nump'"),
        ({"np": 0}, hvd.ArgumentError, "^np must be a whole number, 1 or more, not 0"),
        ({"np": 2.0}, hvd.ArgumentError, "a whole number"),
        ({"np": 2, "num_proc": 3}, hvd.ArgumentError, "give one"),
        ({"hosts": "a:1", "hostfile": "b"}, hvd.ArgumentError, "give one"),
        ({"np": 3, "hosts": "a:1,b:1"}, hvd.ArgumentError, "the hosts have 2 slots in all"),
    ],
)
def test_arguments_that_are_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        run(surroundings, **arguments)


def test_what_is_no_function():
    with pytest.raises(hvd.ArgumentError, match=r"func must be a function .* not 3"):
        run(3, np=2)


def test_a_start_timeout_that_does_not_parse(monkeypatch):
    monkeypatch.setenv("HOROVOD_START_TIMEOUT", "soon")
    with pytest.raises(hvd.ConfigError, match="HOROVOD_START_TIMEOUT='soon'"):
        run(surroundings)


def test_no_mpirun(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(hvd.LauncherError, match="there is no mpirun"):
        run(surroundings, executable=str(tmp_path / "python"), use_mpi=True, disable_cache=True)
