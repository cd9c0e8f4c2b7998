"""Under srun and sbatch of a real Slurm, which the tests start: ranks, failures, mismatches."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from launching import PERMISSIVE, mpirun

from .helpers import REPOSITORY, plain_environment, wait_for
from .own_slurm import OwnSlurm, missing_programs
from .scenarios import ENDS

#: How MPICH says that it could not start.  Under srun --mpi=pmi2 it cannot now and then ("Message
#: truncated", "invalid bandwidth") where there are more processes than cores: another attempt then.
MPICH_DID_NOT_START = "Fatal error in internal_Init_thread"
ATTEMPTS = 4

RANKS = """
import numpy as np
import hvdkit as hvd

hvd.init()
places = hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank()
assert (hvd.allreduce(np.ones(100_000), op=hvd.Sum) == hvd.size()).all()
print(f"{places}", flush=True)
"""


@pytest.fixture(scope="module")
def slurm():
    """A Slurm with one node of 4 CPUs."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)")
    with OwnSlurm() as started:
        yield started


@pytest.fixture(scope="module")
def open_mpi():
    """Whether mpi4py loads Open MPI, and not MPICH or one made of it."""
    asked = subprocess.run(
        [sys.executable, "-m", "mpi4py", "--mpi-lib-version"],
        env=plain_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        pytest.skip(f"there is no MPI: {asked.stderr}")
    return "Open MPI" in asked.stdout


@pytest.fixture
def plugin(slurm, open_mpi):
    """The MPI plugin of srun that fits; Slurm may have it without the library that it needs."""
    name = "pmix" if open_mpi else "pmi2"
    tried = slurm.run("srun", "-n", "1", f"--mpi={name}", "true")
    if tried.status != 0:
        pytest.skip(f"this Slurm has no working --mpi={name}: {tried.stderr.splitlines()[0]}")
    return name


def srun(slurm, plugin, script, *arguments, ranks=2, **more):
    """Run `script` (Python source) by srun."""
    for _ in range(ATTEMPTS):
        outcome = slurm.run(
            *("srun", "-n", str(ranks), f"--mpi={plugin}", "--kill-on-bad-exit=1"),
            *(sys.executable, "-c", script, *arguments),
            environment=plain_environment() | PERMISSIVE | more,
        )
        if MPICH_DID_NOT_START not in outcome.stderr:
            break
    return outcome


def sbatch(slurm, *command, **more):
    """Run a batch job to its end; return its status and what it wrote."""
    for _ in range(ATTEMPTS):
        status, output = sbatch_once(slurm, command, more)
        if MPICH_DID_NOT_START not in output:
            break
    return status, output


def sbatch_once(slurm, command, more):
    output = slurm.directory / "output"
    submitted = slurm.run(
        *("sbatch", "--parsable", f"--output={output}", *map(str, command)),
        environment=plain_environment() | PERMISSIVE | {"PYTHON": sys.executable} | more,
    )
    assert submitted.status == 0, submitted.stderr
    shown = {}

    def has_ended():  # sbatch --wait would look seldom
        job = slurm.run("scontrol", "--oneliner", "show", "job", submitted.stdout.strip()).stdout
        shown.update(re.findall(r"(JobState|ExitCode)=(\S+)", job))
        return shown["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")

    wait_for(has_ended, 150, "the batch job")
    return int(shown["ExitCode"].split(":")[0]), output.read_text()


def assert_all_ranks_are_there(text, ranks):
    places = re.findall(r"\((\d), (\d), (\d), (\d), (\d)\)", text)
    wanted = [(str(n), str(ranks), str(n), str(ranks), "0") for n in range(ranks)]
    assert sorted(places) == wanted, text


def test_ranks_over_mpi(slurm, plugin):
    outcome = srun(slurm, plugin, RANKS, ranks=3)
    assert outcome.status == 0, outcome.stderr
    assert_all_ranks_are_there(outcome.stdout, 3)


@pytest.mark.parametrize("shared", ["1", "0"])
def test_ranks_over_tcp(slurm, shared):
    outcome = srun(slurm, "none", RANKS, ranks=3, HVDKIT_TRANSPORT="tcp", HVDKIT_SHM=shared)
    assert outcome.status == 0, outcome.stderr
    assert_all_ranks_are_there(outcome.stdout, 3)


def test_mpirun_in_an_allocation(slurm):
    script = slurm.directory / "ranks.py"
    script.write_text(RANKS)
    command = " ".join([*mpirun(2), sys.executable, str(script)])
    status, output = sbatch(slurm, "--ntasks=2", f"--wrap={command}")
    assert status == 0, output
    assert_all_ranks_are_there(output, 2)


def test_a_rank_that_raises(slurm, plugin):
    outcome = srun(slurm, plugin, ENDS, "raises")
    assert outcome.status != 0
    assert "LookupError: rank 1 finds nothing" in outcome.stderr
    assert "hvdkit: rank 1 of 2 raised LookupError; ending the job" in outcome.stderr


@pytest.mark.parametrize("how", ["raises", "is_killed"])
def test_a_rank_that_fails_over_tcp(slurm, how):
    outcome = srun(slurm, "none", ENDS, how, HVDKIT_TRANSPORT="tcp")
    assert outcome.status != 0
    assert "hvdkit: rank 0 of 2 cannot go on" in outcome.stderr


def test_a_rank_that_is_killed(slurm, plugin):
    assert srun(slurm, plugin, ENDS, "is_killed").status != 0


@pytest.mark.parametrize(("plugin", "given"), [("none", "no PMI"), ("pmi2", "PMI-2")])
def test_an_srun_that_does_not_fit(slurm, open_mpi, plugin, given):
    if plugin == "pmi2" and not open_mpi:
        pytest.skip("MPICH speaks PMI-2")
    outcome = srun(slurm, plugin, RANKS)
    assert outcome.status != 0
    assert outcome.stdout == ""
    assert "they would train 2 unsynchronised copies" in outcome.stderr
    assert f"Slurm gave the process {given}; this MPI library asks for " in outcome.stderr
    assert f"srun --mpi={'pmix' if open_mpi else 'pmi2'}" in outcome.stderr


def test_the_batch_script(slurm, plugin):
    for needed in ("torch", "sklearn", "tqdm"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    script = REPOSITORY / "deploy/train.sbatch"
    status, output = sbatch(slurm, script, REPOSITORY / "examples/torch_digits.py", "--epochs", "1")
    assert status == 0, output
    assert f"2 ranks on {os.uname().nodename.split('.')[0]}, srun --mpi={plugin}" in output
    assert "0: all 2 ranks hold bitwise identical weights" in output


@pytest.mark.usefixtures("plugin")
def test_the_batch_script_fails_where_the_training_does(slurm):
    script = slurm.directory / "fails.py"
    script.write_text(ENDS)
    status, output = sbatch(slurm, REPOSITORY / "deploy/train.sbatch", script, "raises")
    assert status != 0
    assert "1: LookupError: rank 1 finds nothing" in output


def test_the_batch_script_over_tcp(slurm):
    script = slurm.directory / "ranks.py"
    script.write_text(RANKS)
    command = ("--ntasks-per-node=3", REPOSITORY / "deploy/train.sbatch", script)
    status, output = sbatch(slurm, *command, HVDKIT_TRANSPORT="tcp")
    assert status == 0, output
    assert "srun --mpi=none" in output
    assert_all_ranks_are_there(output, 3)


def test_the_batch_script_wants_to_know_what_to_run(slurm):
    status, output = sbatch(slurm, REPOSITORY / "deploy/train.sbatch")
    assert (status, output) == (
        2,
        "usage: sbatch [options] deploy/train.sbatch SCRIPT [ARGUMENTS]\n",
    )
