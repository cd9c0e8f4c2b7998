"""A launcher that started N processes, each of which MPI believes to be alone."""

import pytest

from hvdkit.errors import LauncherError
from hvdkit.transport.launcher import check_world

LIBRARY = "Example MPI 5.0\nmore about it"

ALL = [
    ("OMPI_COMM_WORLD_SIZE", "mpirun"),
    ("PMI_SIZE", "mpiexec"),
    ("HVDKIT_SIZE", "hvdrun --tcp"),
    ("HOROVOD_SIZE", "horovodrun in Gloo mode"),
    ("SLURM_STEP_NUM_TASKS", "srun"),
    ("SLURM_NTASKS", "Slurm"),
    ("WORLD_SIZE", "torchrun"),
]


@pytest.mark.parametrize(("name", "who"), ALL)
def test_each_variable_that_says_more_is_an_error_that_says_what_to_do(name, who):
    with pytest.raises(LauncherError) as error:
        check_world({name: "4"}, 1, LIBRARY)
    message = str(error.value)
    assert f"{name}=4 says that" in message
    assert who in message
    assert "started 4 processes, but MPI (Example MPI 5.0) sees a world of one" in message
    assert "4 unsynchronised copies" in message
    assert "python -m hvdkit doctor" in message
    assert "HVDKIT_ALLOW_SINGLETON=1" in message


@pytest.mark.parametrize(("name", "_who"), ALL)
def test_a_world_of_more_than_one_is_never_refused(name, _who):
    """Whatever is left in the environment: one node of a larger job, an old export."""
    check_world({name: "8"}, 2, LIBRARY)


@pytest.mark.parametrize(("name", "_who"), ALL)
@pytest.mark.parametrize("value", ["1", "0", "", "many", "-4", "4x"])
def test_what_does_not_say_more_is_fine(name, _who, value):
    check_world({name: value}, 1, LIBRARY)


def test_a_plain_process_is_fine():
    check_world({}, 1, LIBRARY)


@pytest.mark.parametrize("launcher", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpirun_of_one_inside_a_slurm_job_is_what_was_asked_for(launcher):
    slurm = {"SLURM_NTASKS": "64", "SLURM_STEP_NUM_TASKS": "64", "WORLD_SIZE": "64"}
    check_world({launcher: "1", **slurm}, 1, LIBRARY)
    with pytest.raises(LauncherError, match=f"{launcher}=64"):
        check_world({launcher: "64", **slurm}, 1, LIBRARY)


def test_one_process_on_each_of_four_nodes_is_four_processes():
    """MPICH's mpiexec -n 4 -ppn 1: one process is local, PMI_SIZE counts them all."""
    with pytest.raises(LauncherError, match="PMI_SIZE=4"):
        check_world({"PMI_SIZE": "4", "MPI_LOCALNRANKS": "1"}, 1, LIBRARY)


def test_the_launcher_that_started_the_process_is_named_first():
    with pytest.raises(LauncherError, match="OMPI_COMM_WORLD_SIZE=2"):
        check_world({"SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "2"}, 1, LIBRARY)


@pytest.mark.parametrize(
    ("given", "library", "mismatch", "flag"),
    [
        (
            {},
            "Open MPI v5.0.8",
            "Slurm gave the process no PMI; this MPI library asks for PMIx. ",
            "srun --mpi=pmix (",
        ),
        (
            {"PMI_RANK": "0"},
            "Open MPI v5.0.8",
            "Slurm gave the process PMI-2; this MPI library asks for PMIx. ",
            "srun --mpi=pmix (",
        ),
        (
            {"PMIX_RANK": "0"},
            "MPICH Version: 4.3",
            "Slurm gave the process PMIx; this MPI library asks for PMI-2 (or PMIx, ",
            "srun --mpi=pmi2 (",
        ),
        ({}, "", "unsynchronised copies.\nStart it", "srun --mpi=pmix or pmi2 ("),
    ],
)
def test_where_slurm_and_mpi_do_not_fit_the_mismatch_is_named(given, library, mismatch, flag):
    slurm = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
    with pytest.raises(LauncherError) as error:
        check_world(slurm | given, 1, library)
    message = str(error.value)
    assert mismatch in message
    assert f"Start it with {flag}srun --mpi=list says what this Slurm has)" in message
    assert "HVDKIT_TRANSPORT=tcp" in message


def test_what_torchruns_variables_lack_is_named():
    with pytest.raises(LauncherError, match="or set RANK and MASTER_PORT as well"):
        check_world({"WORLD_SIZE": "4", "MASTER_ADDR": "node1"}, 1, LIBRARY)
