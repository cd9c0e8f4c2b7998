"""Run the MPI tests under mpirun, at several numbers of ranks, each under a timeout.

    python tests/run_mpi.py [--ranks 1 2 3 4 5] [--timeout 600] [pytest's arguments]

Each number of ranks runs with the native module, one and three also without it, over messages.
TensorFlow's tests, which take long, have a job of their own, on up to four ranks and with it.
One rank's failure ends the others at once, and shows which rank failed and why.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from launching import end_group, mpirun

TESTS = Path(__file__).parent / "mpi"

#: Numbers of ranks at which numpy does the native module's work as well.
WITHOUT_NATIVE = (1, 3)

#: With which pytest ends if there are no tests.
NOTHING_SELECTED = 5

#: TensorFlow's tests, and the most ranks that they run on.
TENSORFLOW = ("test_tensorflow*.py", "test_keras*.py")
TENSORFLOW_RANKS = 4


@dataclass(frozen=True)
class Run:
    """A job, in which every rank runs the same tests."""

    ranks: int
    native: bool
    tensorflow: bool

    def __str__(self) -> str:
        title = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        title += f", {'with' if self.native else 'without'} the native module"
        return title + ", TensorFlow" * self.tensorflow

    def tests(self) -> list[str]:
        """Return what pytest is to run, and what to leave out."""
        if self.tensorflow:
            return sorted(str(path) for pattern in TENSORFLOW for path in TESTS.glob(pattern))
        return [str(TESTS), *(f"--ignore-glob={TESTS / pattern}" for pattern in TENSORFLOW)]


def runs(ranks: list[int]) -> list[Run]:
    """Return what is to be run."""
    found = []
    for number in ranks:
        found.append(Run(number, native=True, tensorflow=False))
        if number <= TENSORFLOW_RANKS:
            found.append(Run(number, native=True, tensorflow=True))
    return found + [
        Run(number, native=False, tensorflow=False) for number in ranks if number in WITHOUT_NATIVE
    ]


def passes(run: Run, *, timeout: float, arguments: list[str]) -> bool:
    """Run a job; return whether it passed."""
    print(f"\n=== {run}", flush=True)
    command = [*mpirun(run.ranks), sys.executable, "-m", "pytest", *run.tests(), *arguments]
    environment = os.environ | {"HVDKIT_NATIVE": str(int(run.native))}
    began = time.monotonic()
    job = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = job.wait(timeout)
    except subprocess.TimeoutExpired:
        print(f"=== {run}: not finished within {timeout:.0f} s", flush=True)
        return False
    finally:
        end_group(job)
    if arguments and status == NOTHING_SELECTED:
        status = 0  # what the arguments select is in other jobs
    verdict = "passed" if status == 0 else f"FAILED (exit status {status})"
    print(f"=== {run}: {verdict} in {time.monotonic() - began:.0f} s", flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--timeout", type=float, default=600.0)
    args, arguments = parser.parse_known_args()
    failed = [
        str(run)
        for run in runs(args.ranks)
        if not passes(run, timeout=args.timeout, arguments=arguments)
    ]
    print("\nfailed: " + "; ".join(failed) if failed else "\nall MPI tests passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
