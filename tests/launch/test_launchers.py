"""The same script under launchers of plain processes: real ones, and what others would set."""

import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import tcp_jobs
from launching import Outcome, end_group, mpirun

from hvdkit.transport.stores import RendezvousServer

from .helpers import plain_environment, python

#: Asserts what every launcher must bring about, on ranks of which `HOSTS` share the work in turn.
SCRIPT = """
import os, sys
import numpy as np
import hvdkit as hvd
hvd.init()
me, size = hvd.rank(), hvd.size()
assert (me, size) == (int(os.environ[RANK]), 3), (me, size)
hosts = int(os.environ.get("TEST_HOSTS", 1))
where = (hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size())
among = [rank for rank in range(size) if rank % hosts == me % hosts]
across = [rank for rank in range(size) if rank // hosts == me // hosts]
assert where == (among.index(me), len(among), across.index(me), len(across)), where
for elements in (1, 70_000):
    total = hvd.allreduce(np.full(elements, me + 1.0), op=hvd.Sum)
    assert (total == 6).all()
from hvdkit.api import communicator
named = [(np.full(9, me), np.empty(9, int)) for _ in range(20)]
handles = [
    communicator().allreduce_async([pair], name=f"x{i}", op=hvd.Sum, result=None)
    for i, pair in enumerate(named)
]
for handle, (_, result) in zip(handles, named):
    handle.wait()
    assert (result == 3).all()
pair = hvd.add_process_set([0, 2])
if pair.included():
    assert hvd.allgather(np.array([me]), process_set=pair).tolist() == [0, 2]
try:
    hvd.allreduce(np.ones(3), algorithm="mpi")
except hvd.UnsupportedError as exc:
    assert "MPI processes" in str(exc)
else:
    raise SystemExit("no error")
assert "mpi4py.MPI" not in sys.modules, "MPI was started"
hvd.shutdown()
hvd.init()
assert hvd.broadcast_object({"from": me}, 1) == {"from": 1}
print("[done]")
"""

FAILING = """
import hvdkit as hvd, numpy as np
hvd.init()
if hvd.rank() == 1:
    raise ValueError("the cause of it all")
hvd.allreduce(np.ones(100))
hvd.barrier()
"""

by_name = pytest.mark.skipif(
    not tcp_jobs.can_name_hosts(), reason="this user may not give processes a host name"
)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def by_hand(ranks):
    told = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [told | {"RANK": str(rank)} for rank in range(ranks)]


def by_srun(ranks):
    """What srun --mpi=none sets, for ranks that are to connect by themselves."""
    told = {
        "HVDKIT_TRANSPORT": "tcp",
        "HVDKIT_RENDEZVOUS_PORT": free_port(),
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(ranks),
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_NODELIST": "localhost",
    }
    return [told | {"SLURM_PROCID": str(rank)} for rank in range(ranks)]


def assert_all_done(outcomes):
    assert [outcome.status for outcome in outcomes] == [0] * len(outcomes), outcomes
    assert all("[done]" in outcome.stdout for outcome in outcomes)
    assert not any(outcome.stderr for outcome in outcomes), outcomes


@pytest.mark.parametrize("told", [by_hand, by_srun])
def test_a_launcher_that_holds_no_store(told):
    rank = "RANK" if told is by_hand else "SLURM_PROCID"
    assert_all_done(tcp_jobs.run_ranks(f"RANK = {rank!r}\n{SCRIPT}", told(3)))


def test_horovodrun_in_gloo_mode_as_it_tells_its_processes():
    with RendezvousServer(None, "127.0.0.1") as server:
        told = tcp_jobs.horovodrun_variables(server, 3)
        assert_all_done(tcp_jobs.run_ranks(f"RANK = 'HOROVOD_RANK'\n{SCRIPT}", told))


@pytest.mark.parametrize(
    "hosts", [1, pytest.param(2, marks=by_name), pytest.param(3, marks=by_name)]
)
@pytest.mark.parametrize("shm", ["1", "0"])
def test_hvdrun_over_tcp(hosts, shm):
    script = f"RANK = 'HVDKIT_RANK'\n{SCRIPT}"
    environment = {"TEST_HOSTS": str(hosts), "HVDKIT_SHM": shm}
    assert_all_done(tcp_jobs.run(script, 3, hosts=hosts, environment=environment))


@pytest.mark.parametrize("hosts", [1, pytest.param(2, marks=by_name)])
def test_a_rank_that_raises_ends_all(hosts):
    began = time.monotonic()
    outcomes = tcp_jobs.run(FAILING, 3, hosts=hosts)
    assert time.monotonic() - began < 45
    assert [outcome.status for outcome in outcomes] == [1, 1, 1], outcomes
    assert "ValueError: the cause of it all" in outcomes[1].stderr
    assert "rank 1 of 3 raised ValueError; ending the job" in outcomes[1].stderr
    for other in (outcomes[0], outcomes[2]):
        assert "Traceback" not in other.stderr, other.stderr
        assert "cannot go on" in other.stderr


@pytest.mark.parametrize("hosts", [1, pytest.param(2, marks=by_name)])
def test_a_rank_that_is_killed_ends_all(hosts):
    outcomes = tcp_jobs.run(
        """
        import os, signal
        import hvdkit as hvd, numpy as np
        hvd.init()
        hvd.barrier()
        if hvd.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        x = np.ones(3)
        hvd.api.communicator().allreduce_async([(x, x)], name="x", op=hvd.Sum, result=x).wait()
        """,
        3,
        hosts=hosts,
    )
    assert [outcome.status for outcome in outcomes] == [1, -signal.SIGKILL, 1], outcomes
    for other in (outcomes[0], outcomes[2]):
        assert "Traceback" not in other.stderr, other.stderr
        assert "rank 1" in other.stderr


def test_a_rank_that_never_comes():
    with RendezvousServer(None, "127.0.0.1") as server:
        told = tcp_jobs.horovodrun_variables(server, 2)[:1]
        began = time.monotonic()
        (outcome,) = tcp_jobs.run_ranks(
            "import hvdkit as hvd; hvd.init()", [told[0] | {"HVDKIT_START_TIMEOUT": "2"}]
        )
    assert time.monotonic() - began < 45
    assert outcome.status == 1
    assert "LauncherError" in outcome.stderr
    assert "rank 1" in outcome.stderr
    assert "HVDKIT_START_TIMEOUT" in outcome.stderr


def test_another_secret_does_not_join():
    secret = secrets.token_bytes(32)
    with RendezvousServer(secret, "127.0.0.1") as server:
        told = tcp_jobs.hvdrun_variables(server, 2, secret)
        told[1]["HVDKIT_SECRET"] = secrets.token_hex(32)
        told = [one | {"HVDKIT_START_TIMEOUT": "3"} for one in told]
        outcomes = tcp_jobs.run_ranks("import hvdkit as hvd; hvd.init()", told)
    assert [outcome.status for outcome in outcomes] == [1, 1]
    assert "it answers 403" in outcomes[1].stderr
    assert not any(one["HVDKIT_SECRET"] in outcomes[0].stderr for one in told)


WITHOUT_MPI4PY = "import sys; sys.modules['mpi4py'] = None\n"

#: What mpi4py does where it finds no library.
WITHOUT_LIBRARY = """
import importlib.abc, sys

class NoLibrary(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "mpi4py.MPI":
            raise RuntimeError("cannot load MPI library")

sys.meta_path.insert(0, NoLibrary())
"""


@pytest.mark.parametrize("without", [WITHOUT_MPI4PY, WITHOUT_LIBRARY], ids=["mpi4py", "library"])
def test_no_mpi_is_needed(without):
    assert_all_done(tcp_jobs.run(f"{without}RANK = 'HVDKIT_RANK'\n{SCRIPT}", 3))
    script = """
import numpy as np, hvdkit as hvd
hvd.init()
assert hvd.allreduce(np.ones(3), op=hvd.Sum).tolist() == [1, 1, 1]
print(hvd.size(), hvd.mpi_enabled(), hvd.mpi_threads_supported())
"""
    alone = python("-c", without + script)
    assert (alone.status, alone.stdout) == (0, "1 False True\n"), alone.stderr


def test_the_doctor_says_how_a_rank_joins():
    told = {"HVDKIT_RENDEZVOUS_ADDR": "127.0.0.1", "HVDKIT_RENDEZVOUS_PORT": "9"}
    outcome = python("-m", "hvdkit", "doctor", **told, HVDKIT_RANK="1", HVDKIT_SIZE="2")
    assert outcome.status == 0, outcome.stderr
    assert "over TCP, meets the others at 127.0.0.1 port 9: hvdrun --tcp started" in outcome.stdout


# Real ones


def under(command, script, tmp_path, *, timeout=120.0, **environment):
    """Run `script` (Python source) as a file, which `command` starts."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    job = subprocess.Popen(
        [*command, str(path)],
        env=tcp_jobs.plain(plain_environment()) | environment,
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


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
torchrun = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch, and so torchrun, is not installed"
)


@torchrun
@pytest.mark.parametrize("how", [["--standalone"], ["--master-port", ""]], ids=["c10d", "static"])
def test_torchrun(how, tmp_path):
    how = [word or free_port() for word in how]
    outcome = under(
        [*TORCHRUN, *how, "--nproc-per-node", "3"], f"RANK = 'RANK'\n{SCRIPT}", tmp_path
    )
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("[done]") == 3


@torchrun
def test_torchrun_beside_torch_distributed(tmp_path):
    """Both meet in the agent's store, under keys of their own."""
    script = f"""
RANK = "RANK"
from torch import distributed as dist
dist.init_process_group("gloo")
{SCRIPT}
dist.barrier()
dist.destroy_process_group()
"""
    outcome = under([*TORCHRUN, "--standalone", "--nproc-per-node", "3"], script, tmp_path)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("[done]") == 3


@torchrun
def test_torchrun_with_a_rank_that_raises(tmp_path):
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "3"]
    outcome = under(command, FAILING, tmp_path, timeout=90.0)
    assert outcome.status != 0
    assert "ValueError: the cause of it all" in outcome.stderr
    ours, _, torchs = outcome.stderr.partition("ending the job")
    assert "rank 1 of 3 raised ValueError" in ours
    assert "Root Cause (first observed failure)" in torchs


@torchrun
def test_torchrun_under_mpirun(tmp_path):
    """mpirun's variables are there as well, but it is torchrun that started the ranks."""
    command = [*mpirun(1), *TORCHRUN, "--standalone", "--nproc-per-node", "3"]
    outcome = under(command, f"RANK = 'RANK'\n{SCRIPT}", tmp_path, **os.environ)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("[done]") == 3


def test_mpirun_with_variables_set_for_torch(tmp_path):
    """As scripts do that use torch.distributed as well: MPI knows better."""
    script = """
        import os
        os.environ["RANK"] = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
        os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
        import hvdkit as hvd
        hvd.init()
        print(f"[{hvd.size()} {hvd.api.context().kind}]")
    """
    outcome = under([*mpirun(2), sys.executable], script, tmp_path, **os.environ)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("[2 mpi]") == 2


#: horovodrun refuses --gloo where no extension for a framework is built with it, which hvdkit does
#: not need; all else of it is Python.
HOROVODRUN = """
from horovod.runner import launch
if __name__ == "__main__":
    launch.gloo_built = lambda verbose=False: True
    launch.run_commandline()
"""


@pytest.fixture
def horovodrun(tmp_path):
    """The command of Horovod's own launcher, in Gloo mode."""
    if importlib.util.find_spec("horovod") is None:
        pytest.skip("horovod's launcher is not installed")
    missing = [name for name in ("yaml", "psutil") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"horovodrun needs {' and '.join(missing)}")
    place = tmp_path / "horovodrun.py"
    place.write_text(HOROVODRUN)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return [sys.executable, str(place), "--gloo", "-np", "3", sys.executable], path


def test_horovodrun(horovodrun, tmp_path):
    command, path = horovodrun
    script = f"RANK = 'HOROVOD_RANK'\n{SCRIPT}"
    outcome = under(command, script, tmp_path, PYTHONPATH=path)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("[done]") == 3


def test_horovodrun_with_a_rank_that_raises(horovodrun, tmp_path):
    command, path = horovodrun
    outcome = under(command, FAILING, tmp_path, PYTHONPATH=path)
    assert outcome.status != 0
    assert "ValueError: the cause of it all" in outcome.stderr
    assert outcome.stderr.index("the cause of it all") < outcome.stderr.index("ending the job")
