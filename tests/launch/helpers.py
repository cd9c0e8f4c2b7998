"""Jobs that end in every way a job can end, and the shared memory they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from launching import Outcome, end_group, mpirun

REPOSITORY = Path(__file__).resolve().parents[2]

#: Names that a launcher of this process itself may have set, and that would tell another story.
_LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "SLURM_", "HYDRA_", "HOROVOD_", "HVDKIT_", "MPI_")


def plain_environment(**more: str) -> dict[str, str]:
    """Return the environment without a trace of any launcher, in which this source is imported.

    This Python is the first in PATH, as where its environment is active; and nothing is tuned.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHERS) and name != "WORLD_SIZE"
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    usual = {"PYTHONPATH": str(REPOSITORY), "PATH": path, "HVDKIT_TUNING_FILE": "off"}
    return kept | usual | more


def python(*arguments: str, timeout: float = 60.0, **environment: str) -> Outcome:
    """Run Python with `arguments` in one process, started by no launcher."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=plain_environment(**environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def under_mpirun(
    ranks: int, *arguments: str, timeout: float = 90.0, cwd: Path = REPOSITORY, **environment: str
) -> Outcome:
    """Run Python with `arguments` on `ranks` processes."""
    command = [*mpirun(ranks), sys.executable, *arguments]
    job = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        stdout, stderr = job.communicate(timeout=timeout)
    finally:
        end_group(job)
    return Outcome(job.returncode, stdout, stderr)


def wait_for(condition, seconds: float, what: str) -> None:
    """Return when `condition` holds; fail when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Return whether process `pid` is there and not merely waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
