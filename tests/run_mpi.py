"""Run the MPI tests under mpirun, at several numbers of ranks, each under a timeout.

    python tests/run_mpi.py [--ranks 1 2 3 4 5] [--timeout 600] [pytest's arguments]

Each number of ranks runs with the native module, one and three also without it, over messages;
TensorFlow's tests, which take long, on up to four ranks and with it.  One rank's failure ends the
others at once, and shows which rank failed and why.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from launching import end_group, mpirun

TESTS = Path(__file__).parent / "mpi"

#: Numbers of ranks at which numpy does the native module's work as well.
WITHOUT_NATIVE = (1, 3)

#: TensorFlow's tests, and the most ranks that they run on.
TENSORFLOW = ("test_tensorflow*.py", "test_keras*.py")
TENSORFLOW_RANKS = 4


def run(ranks: int, *, native: bool, timeout: float, arguments: list[str]) -> bool:
    """Run the suite once; return whether it passed."""
    title = f"{ranks} rank{'s' * (ranks > 1)}, {'with' if native else 'without'} the native module"
    print(f"\n=== {title}", flush=True)
    command = [*mpirun(ranks), sys.executable, "-m", "pytest", str(TESTS), *arguments]
    if ranks > TENSORFLOW_RANKS or not native:
        command += [f"--ignore-glob={TESTS / pattern}" for pattern in TENSORFLOW]
    environment = os.environ | {"HVDKIT_NATIVE": str(int(native))}
    began = time.monotonic()
    job = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = job.wait(timeout)
    except subprocess.TimeoutExpired:
        print(f"=== {title}: not finished within {timeout:.0f} s", flush=True)
        return False
    finally:
        end_group(job)
    verdict = "passed" if status == 0 else f"FAILED (exit status {status})"
    print(f"=== {title}: {verdict} in {time.monotonic() - began:.0f} s", flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--timeout", type=float, default=600.0)
    args, arguments = parser.parse_known_args()
    runs = [(ranks, True) for ranks in args.ranks]
    runs += [(ranks, False) for ranks in args.ranks if ranks in WITHOUT_NATIVE]
    failed = [
        f"{ranks} ({'native' if native else 'numpy'})"
        for ranks, native in runs
        if not run(ranks, native=native, timeout=args.timeout, arguments=arguments)
    ]
    print(f"\nfailed at: {', '.join(failed)}" if failed else "\nall MPI tests passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
