"""Open MPI and MPICH as distributions package them: their mpirun, and mpi4py's wheel over them.

OPENMPI_MPIRUN and MPICH_MPIRUN name mpiruns that are elsewhere than in PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import PERMISSIVE, Outcome, end_group

from .helpers import REPOSITORY, plain_environment
from .scenarios import ENDS

#: The library that mpi4py's wheel looks for, and what Debian calls it.
LIBRARIES = {
    "openmpi": ("libmpi.so.40", "libmpi.so.40"),
    "mpich": ("libmpi.so.12", "libmpich.so.12"),
}
VERSIONS = {"openmpi": "Open MPI v", "mpich": "MPICH Version:"}

#: Prints the path of a library that the loader finds.
WHERE = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])
print(next(line.split()[-1] for line in open("/proc/self/maps") if "/" + sys.argv[1] in line))
"""

COLLECTIVES = """
import numpy as np
import hvdkit as hvd

hvd.init()
rank, size = hvd.rank(), hvd.size()
assert (hvd.local_rank(), hvd.local_size()) == (rank, size)
assert (hvd.cross_rank(), hvd.cross_size()) == (0, 1)
total = size * (size + 1) // 2
for count in (0, 1, 1000, 300_000):
    for dtype in ("f4", "f2", "i8"):
        for algorithm in ("auto", "ring", "tree", "halving_doubling", "mpi"):
            x = np.full(count, rank + 1, dtype)
            assert (hvd.allreduce(x, op=hvd.Sum, algorithm=algorithm) == total).all()
    assert (hvd.broadcast(np.full(count, rank), 1) == 1).all()
assert hvd.allgather(np.full((rank + 1, 2), rank)).shape == (total, 2)
assert (hvd.reducescatter(np.ones((4 * size, 3)), op=hvd.Sum) == np.full((4, 3), size)).all()
assert (hvd.alltoall(np.arange(size)) == rank).all()
assert hvd.broadcast_object({"from": rank}, 1) == {"from": 1}
hvd.barrier()
print(f"[rank {rank} of {size}]")
"""

RUN = """
import os
import hvdkit

def sizes(base):
    import hvdkit as hvd
    hvd.init()
    return base + hvd.rank(), hvd.size()

def fails():
    import hvdkit as hvd
    hvd.init()
    if hvd.rank() == 1:
        raise LookupError("rank 1 finds nothing")
    hvd.barrier()

def is_killed():
    import hvdkit as hvd
    hvd.init()
    if hvd.rank() == 1:
        os.kill(os.getpid(), 9)
    hvd.barrier()

if __name__ == "__main__":
    print(hvdkit.run(sizes, (10,), np=3))
    for function in (fails, is_killed):
        try:
            hvdkit.run(function, np=2)
        except hvdkit.HvdkitError as error:
            print(f"{type(error).__name__} of rank {error.rank}: {error}")
"""


@dataclass(frozen=True)
class SystemMPI:
    """An MPI of this system, with a Python that has no other."""

    mpirun: Path
    python: Path
    environment: dict[str, str]

    def run(self, *command: str, timeout: float = 90.0, **more: str) -> Outcome:
        """Run `command` to its end; `TimeoutExpired` fails the test."""
        job = subprocess.Popen(
            command,
            env=self.environment | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            stdout, stderr = job.communicate(timeout=timeout)
        finally:
            end_group(job)
        return Outcome(job.returncode, stdout, stderr)

    def ranks(self, count: int, script: str, *arguments: str, **more: str) -> Outcome:
        """Run `script` (Python source) on `count` ranks."""
        python = (str(self.python), "-c", script, *arguments)
        return self.run(str(self.mpirun), "-n", str(count), *python, **more)


@pytest.fixture(scope="module", params=["openmpi", "mpich"])
def system(request, tmp_path_factory):
    """Each MPI that is installed, in an environment with the packages of this one but no MPI."""
    name = request.param
    found = os.environ.get(f"{name.upper()}_MPIRUN") or shutil.which(f"mpirun.{name}")
    if found is None:
        pytest.skip(f"there is no mpirun.{name}, which Debian's packages have")
    folder = tmp_path_factory.mktemp(name)
    venv.create(folder, symlinks=True)
    mpirun = folder / "bin/mpirun"
    mpirun.write_text(f'#!/bin/sh\nexec {found} "$@"\n')
    mpirun.chmod(0o755)
    python = folder / "bin/python"
    environment = plain_environment() | PERMISSIVE | {"OMPI_MCA_rmaps_base_oversubscribe": "1"}
    # Debian's PMIx fails now and then with its default, ds12.
    environment["PMIX_MCA_gds"] = "hash"
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), sysconfig.get_path("purelib")])
    environment |= library_settings(name, folder / "lib")
    made = SystemMPI(mpirun, python, environment)
    version = made.run(
        str(python), "-c", "from mpi4py import MPI; print(MPI.Get_library_version())"
    )
    if VERSIONS[name] not in version.stdout:
        pytest.skip(f"this mpi4py does not load it: {version.stdout or version.stderr}")
    return made


def library_settings(name: str, links: Path) -> dict[str, str]:
    """Return what lets mpi4py find the library, by its own name or by a link in `links`."""
    wanted, real = LIBRARIES[name]
    # In a process of its own, lest this one meet two libraries of one name.
    asked = subprocess.run(
        [sys.executable, "-c", WHERE, real], capture_output=True, text=True, check=False
    )
    if asked.returncode != 0:
        pytest.skip(f"its library is not found: {asked.stderr.strip().splitlines()[-1]}")
    if wanted == real:
        return {"MPI4PY_LIBMPI": wanted}
    (links / wanted).symlink_to(asked.stdout.strip())
    others = os.environ.get("LD_LIBRARY_PATH", "")
    path = f"{links}{os.pathsep}{others}".rstrip(os.pathsep)
    return {"MPI4PY_LIBMPI": wanted, "LD_LIBRARY_PATH": path}


@pytest.mark.parametrize(("ranks", "shared"), [(2, "1"), (3, "0")])
def test_collectives(system, ranks, shared):
    """In shared memory, and by messages alone."""
    outcome = system.ranks(ranks, COLLECTIVES, HVDKIT_SHM=shared)
    assert outcome.status == 0, outcome.stderr
    for rank in range(ranks):
        assert f"[rank {rank} of {ranks}]" in outcome.stdout.replace("\n", "")


def test_a_rank_that_raises(system):
    outcome = system.ranks(2, ENDS, "raises")
    assert outcome.status != 0
    assert "LookupError: rank 1 finds nothing" in outcome.stderr
    assert "hvdkit: rank 1 of 2 raised LookupError; ending the job" in outcome.stderr


def test_a_rank_that_is_killed(system):
    outcome = system.ranks(2, ENDS, "is_killed")
    assert outcome.status != 0


def test_run(system, tmp_path):
    pytest.importorskip("cloudpickle")
    script = tmp_path / "script.py"
    script.write_text(RUN)
    outcome = system.run(str(system.python), str(script))
    assert outcome.status == 0, outcome.stderr
    assert "[(10, 3), (11, 3), (12, 3)]" in outcome.stdout
    assert "JobError of rank 1: rank 1 of 2 raised LookupError: rank 1 finds nothing" in (
        outcome.stdout
    )
    assert "JobError of rank 1: rank 1 of 2 was killed by signal 9 (SIGKILL)" in outcome.stdout


def test_doctor_names_both(system):
    outcome = system.run(str(system.python), "-m", "hvdkit", "doctor")
    assert outcome.status == 0, outcome.stdout
    assert f"mpirun         {system.mpirun}" in outcome.stdout
    assert any(version.split()[0] in outcome.stdout for version in VERSIONS.values())


def test_singletons_of_another_mpirun_are_refused(system, request):
    """What another MPI's launcher starts are N worlds of one."""
    foreign = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    if "openmpi" in request.node.name:
        foreign = {"PMI_SIZE": "2", "PMI_RANK": "0"}
    outcome = system.run(str(system.python), "-c", "import hvdkit; hvdkit.init()", **foreign)
    assert outcome.status != 0
    assert "they would train 2 unsynchronised copies" in outcome.stderr
