"""However a rank ends, the job ends, soon, and leaves nothing behind."""

import os
import re
import signal
import time

import pytest
from launching import end_group, run, start

from .helpers import is_running, wait_for

SECONDS = 30

WAITING = """
    import os, time
    from pathlib import Path
    import numpy as np
    import hvdkit as hvd
    hvd.init()
    x = hvd.empty(70_000)
    hvd.allreduce_(x)
    note = Path(os.environ["NOTES"]) / f"rank{hvd.rank()}"
    note.with_suffix(".new").write_text(str(os.getpid()))
    note.with_suffix(".new").rename(note)
    while True:
        if hvd.rank() == 1:
            time.sleep(600)
        hvd.allreduce_(x)
"""


@pytest.fixture
def job(tmp_path, shm_dir):
    """Start `WAITING` on three ranks: rank 1 sleeps, the others wait for it in an all-reduce.

    Yields a function that returns the job and its ranks' process ids.
    """
    jobs = []

    def begin(**environment):
        jobs.append(start(WAITING, 3, environment={"NOTES": str(tmp_path)} | environment))
        notes = [tmp_path / f"rank{rank}" for rank in range(3)]
        wait_for(
            lambda: all(note.exists() for note in notes) or jobs[0].poll() is not None,
            SECONDS,
            "the ranks start",
        )
        assert jobs[0].poll() is None, jobs[0].stderr.read()
        time.sleep(0.3)  # for the others to be in the all-reduce
        assert list(shm_dir.iterdir()) == [], "the arena has a name"
        return jobs[0], [int(note.read_text()) for note in notes]

    yield begin
    for each in jobs:
        end_group(each)


def assert_all_gone(job, pids, shm_dir):
    __tracebackhide__ = True
    job.communicate(timeout=SECONDS)
    assert job.returncode != 0
    wait_for(lambda: not any(map(is_running, pids)), SECONDS, "the ranks end")
    assert list(shm_dir.iterdir()) == []


@pytest.mark.parametrize("shm", ["1", "0"])
def test_an_uncaught_exception_on_one_rank_ends_the_job(shm):
    outcome = run(
        """
        import numpy as np
        import hvdkit as hvd
        hvd.init()
        hvd.allreduce(np.ones(10))
        if hvd.rank() == 1:
            raise ZeroDivisionError("the loss of rank 1")
        hvd.allreduce(np.ones(100_000))
        print("went on")
        """,
        3,
        timeout=SECONDS,
        environment={"HVDKIT_SHM": shm},
    )
    assert outcome.status != 0
    assert "went on" not in outcome.stdout
    assert "Traceback" in outcome.stderr
    assert "ZeroDivisionError: the loss of rank 1" in outcome.stderr
    assert "hvdkit: rank 1 of 3 raised ZeroDivisionError; ending the job" in outcome.stderr


EXITING = """
    import os, sys, threading, time
    import numpy as np
    import hvdkit as hvd
    hvd.init()
    hvd.allreduce(np.ones(10))
    if hvd.rank() == 1:
        exec(os.environ["ENDING"])
    elif "WAIT" in os.environ:
        time.sleep(600)
    print("went on")
"""


@pytest.mark.parametrize(
    ("ending", "status"), [("sys.exit(3)", 3), ("exit(4)", 4), ("sys.exit('no data')", 1)]
)
def test_an_exit_with_another_status_than_0_ends_the_job(ending, status):
    """MPI_Finalize waits for the other ranks: for ever, if these hang."""
    began = time.monotonic()
    outcome = run(EXITING, 3, timeout=SECONDS, environment={"ENDING": ending, "WAIT": "1"})
    assert time.monotonic() - began < SECONDS
    assert outcome.status == status, outcome.stderr
    assert "went on" not in outcome.stdout
    line = f"hvdkit: rank 1 of 3 exits with status {status}; ending the job"
    assert line in outcome.stderr
    assert ("no data" in outcome.stderr) == (status == 1)


@pytest.mark.parametrize(
    "ending",
    [
        "sys.exit(0)",
        "sys.exit()",
        "try: sys.exit(3)\nexcept SystemExit as exc: assert exc.code == 3",
        "thread = threading.Thread(target=sys.exit, args=(3,)); thread.start(); thread.join()",
        "try: sys.exit(3)\nexcept SystemExit: sys.exit(0)",
        "hvd.shutdown(); assert 'hvdkit' not in sys.exit.__module__",
    ],
)
def test_other_exits_end_nothing(ending):
    # The others leave as soon: an MPI that is shut down waits for them.
    outcome = run(EXITING, 3, timeout=SECONDS, environment={"ENDING": ending})
    assert outcome.status == 0, outcome.stderr
    assert "ending the job" not in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_kill_9_of_one_rank(job, shm_dir):
    running, pids = job()
    os.kill(pids[1], signal.SIGKILL)
    assert_all_gone(running, pids, shm_dir)


def test_kill_9_of_one_rank_that_waits(job, shm_dir):
    running, pids = job()
    os.kill(pids[0], signal.SIGKILL)
    assert_all_gone(running, pids, shm_dir)


def test_kill_9_of_all_ranks(job, shm_dir):
    running, pids = job()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert_all_gone(running, pids, shm_dir)


def test_kill_9_of_everything(job, shm_dir):
    """The launcher too, so that nobody can tidy up."""
    running, pids = job()
    for pid in [*pids, running.pid]:
        os.kill(pid, signal.SIGKILL)
    assert_all_gone(running, pids, shm_dir)


@pytest.mark.parametrize("shm", ["1", "0"])
def test_control_c(job, shm_dir, shm):
    running, pids = job(HVDKIT_SHM=shm)
    os.kill(running.pid, signal.SIGINT)
    assert_all_gone(running, pids, shm_dir)


def test_a_job_that_ends_well_leaves_nothing(shm_dir):
    outcome = run(
        """
        import numpy as np
        import hvdkit as hvd
        hvd.init()
        x = hvd.empty(1000)
        x[:] = 1
        print(f"[{hvd.rank()}: {hvd.allreduce_(x, op=hvd.Sum).sum():g}]")
        """,
        2,
        timeout=SECONDS,
    )
    assert outcome.status == 0, outcome.stderr
    assert sorted(re.findall(r"\[.*?\]", outcome.stdout)) == ["[0: 2000]", "[1: 2000]"]
    assert list(shm_dir.iterdir()) == []
