"""Who started this process, and so how it joins: decided from the environment alone."""

import socket
import sys
import threading
from itertools import repeat
from types import SimpleNamespace

import pytest

from hvdkit.config import Config
from hvdkit.errors import ConfigError, LauncherError
from hvdkit.transport import membership, opening
from hvdkit.transport.launcher import innermost, mpi_start
from hvdkit.transport.meetings import Meeting, agent_meetings, slurm_meeting
from hvdkit.transport.opening import find_way, open_world
from hvdkit.transport.slurm import expand_hosts
from hvdkit.transport.stores import HTTPStore, RendezvousServer

SECRET = "ab" * 32

HVDRUN = {
    "HVDKIT_RANK": "1",
    "HVDKIT_SIZE": "4",
    "HVDKIT_RENDEZVOUS_ADDR": "10.0.0.1,192.168.7.1",
    "HVDKIT_RENDEZVOUS_PORT": "4000",
    "HVDKIT_SECRET": SECRET,
}
#: As gloo_run.py of Horovod 0.28 sets them.
HOROVODRUN = {
    "HOROVOD_HOSTNAME": "localhost",
    "HOROVOD_RANK": "2",
    "HOROVOD_SIZE": "4",
    "HOROVOD_LOCAL_RANK": "0",
    "HOROVOD_LOCAL_SIZE": "2",
    "HOROVOD_CROSS_RANK": "1",
    "HOROVOD_CROSS_SIZE": "2",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.2",
    "HOROVOD_GLOO_RENDEZVOUS_PORT": "4001",
    "HOROVOD_CONTROLLER": "gloo",
    "HOROVOD_CPU_OPERATIONS": "gloo",
    "HOROVOD_GLOO_IFACE": "eth0",
    "NCCL_SOCKET_IFNAME": "eth0",
}
BY_HAND = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "4002"}
TORCHRUN = BY_HAND | {
    "LOCAL_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "0"}
MPICH = {"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "4"}
INTEL_MPI = MPICH | {"I_MPI_HYDRA_SERVER_PORT": "1"}


@pytest.fixture(autouse=True)
def no_ancestors(monkeypatch):
    """What the suite itself was started by is another matter."""
    monkeypatch.setattr("hvdkit.transport.launcher._ancestors", lambda: iter(()))


def way(*environs, comm=None, **config):
    return find_way(
        comm, Config(**config), {k: v for environ in environs for k, v in environ.items()}
    )


@pytest.mark.parametrize(
    ("environ", "meeting"),
    [
        (
            HVDRUN,
            Meeting("hvdrun --tcp", "HVDKIT_RANK", 1, 4, "10.0.0.1,192.168.7.1", 4000, "http"),
        ),
        (
            HOROVODRUN,
            Meeting("horovodrun in Gloo mode", "HOROVOD_RANK", 2, 4, "10.0.0.2", 4001, "http"),
        ),
        (TORCHRUN, Meeting("torchrun", "RANK", 3, 4, "node1", 4002, "torch", "none.2")),
        (
            BY_HAND,
            Meeting(
                "whoever set RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
                "RANK",
                3,
                4,
                "node1",
                4002,
                "own",
            ),
        ),
    ],
    ids=["hvdrun", "horovodrun", "torchrun", "by hand"],
)
def test_ranks_that_connect_by_themselves(environ, meeting):
    found = way(environ)
    assert (found.kind, found.meeting) == ("tcp", meeting)
    assert f"{meeting.launcher} started this process as rank {meeting.rank}" in found.why
    told = way(environ, transport="tcp")
    assert (told.kind, told.meeting) == ("tcp", meeting)
    assert "HVDKIT_TRANSPORT=tcp" in told.why


@pytest.mark.parametrize(
    ("environ", "who"),
    [
        (OPEN_MPI, "Open MPI's mpirun"),
        (MPICH, "MPICH's or Intel MPI's mpiexec"),
        (INTEL_MPI, "Intel MPI's mpiexec"),
        (SRUN | {"PMI_RANK": "0", "PMI_SIZE": "4", "PMI_FD": "9"}, "srun --mpi=pmi2"),
        (SRUN | {"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.1.0"}, "srun --mpi=pmix"),
        ({"PALS_RANKID": "0"}, "a launcher of MPI processes"),
    ],
)
def test_ranks_that_mpi_knows(environ, who):
    assert way(environ).kind == "mpi"
    assert who in way(environ).why
    assert way(environ, SRUN, HOROVODRUN).kind == "mpi", "MPI's launcher says more than one"


def test_a_communicator_and_the_user_decide():
    for environ in ({}, HVDRUN, TORCHRUN, OPEN_MPI):
        assert way(environ, comm=object()).kind == "mpi"
        assert way(environ, transport="mpi").kind == "mpi"


def test_nobody():
    assert way({"PATH": "/bin"}).kind == "alone"
    assert way({"WORLD_SIZE": "4"}).kind == "alone", "open_world() then asks MPI, and refuses"
    assert way(BY_HAND | {"WORLD_SIZE": "1", "RANK": "0"}).kind == "alone"
    assert way({}, transport="tcp").meeting.size == 1


def test_a_singleton_that_is_meant():
    for environ in (HOROVODRUN, TORCHRUN, BY_HAND):
        assert way(environ, allow_singleton=True).kind == "alone"


def test_the_launcher_that_was_started_last_counts():
    """torchrun in a shell of srun's or under mpirun, and the other way round."""
    outside = OPEN_MPI | SRUN
    both = outside | TORCHRUN
    agent, mpi = agent_meetings(both)[0], mpi_start(both)

    def started_by(*ancestors):
        return innermost([mpi, agent], both, lambda: iter(ancestors))

    assert started_by(outside, outside, {}) is agent
    assert started_by(TORCHRUN, {}) is mpi
    assert started_by() is mpi
    assert started_by({}) is mpi
    assert started_by(both, outside, {}) is agent, "through a shell"
    assert started_by(outside | TORCHRUN | {"RANK": "7"}, {}) is agent, "of another torchrun"


def test_one_process_of_mpis_in_which_another_launcher_starts_ranks():
    """srun --pty bash, or mpirun -n 1, and in it torchrun, on a host that tells no ancestors."""
    one = {"PMI_RANK": "0", "PMI_SIZE": "1"}
    assert way(one, TORCHRUN).meeting.launcher == "torchrun"
    assert way(one, HOROVODRUN).meeting.launcher == "horovodrun in Gloo mode"
    assert way(one, BY_HAND).kind == "mpi"
    assert way(one, BY_HAND).otherwise is None, "one process is what was asked for"


def test_variables_set_by_hand_are_for_when_mpi_knows_of_no_other():
    found = way(OPEN_MPI, BY_HAND)
    assert found.kind == "mpi"
    assert found.otherwise.mark == "RANK"


def test_hvdruns_variables_win():
    assert way(HVDRUN, OPEN_MPI, HOROVODRUN, TORCHRUN).meeting.launcher == "hvdrun --tcp"


def test_tcp_under_srun_meets_on_the_first_host_of_the_step():
    assert way(SRUN).kind == "alone", "MPI is asked first, and the mismatch named"
    meeting = way(SRUN, transport="tcp").meeting
    assert (meeting.rank, meeting.size, meeting.address, meeting.store) == (2, 4, "gpu07", "own")
    assert 10_000 <= meeting.port < 32_000
    assert meeting.port == slurm_meeting(SRUN | {"SLURM_PROCID": "3"}).port
    assert meeting.port != slurm_meeting(SRUN | {"SLURM_STEP_ID": "1"}).port
    assert slurm_meeting(SRUN | {"HVDKIT_RENDEZVOUS_PORT": "999"}).port == 999
    with pytest.raises(LauncherError, match=r"SLURM_STEP_NODELIST: 'a\[' is no list of hosts"):
        slurm_meeting(SRUN | {"SLURM_STEP_NODELIST": "a["})


def test_tcp_under_mpirun_has_no_place_to_meet_at():
    with pytest.raises(LauncherError, match="hvdrun --tcp, torchrun, horovodrun in Gloo mode"):
        way(OPEN_MPI, transport="tcp")


def test_tcp_in_a_batch_script_is_not_a_world_of_one():
    with pytest.raises(LauncherError, match="SLURM_NTASKS=4 says that"):
        way({"SLURM_NTASKS": "4"}, transport="tcp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"HVDKIT_RENDEZVOUS_PORT": ""}, "HVDKIT_RENDEZVOUS_PORT is not set"),
        ({"HVDKIT_RENDEZVOUS_PORT": "http"}, "HVDKIT_RENDEZVOUS_PORT='http': expected a whole"),
        ({"HVDKIT_RENDEZVOUS_PORT": "70000"}, "ports 1 to 65535"),
        ({"HVDKIT_RANK": "4"}, "HVDKIT_RANK=4, HVDKIT_SIZE=4"),
        ({"HVDKIT_RANK": "-1"}, "HVDKIT_RANK='-1'"),
        ({"HVDKIT_SIZE": ""}, "hvdrun --tcp started this process, but HVDKIT_SIZE is not set"),
    ],
)
def test_variables_that_make_no_sense(change, message):
    with pytest.raises(LauncherError, match=message):
        way(HVDRUN | change)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("a,b.example.org,c-3", ["a", "b.example.org", "c-3"]),
        ("node[01-03,7],gpu5", ["node01", "node02", "node03", "node7", "gpu5"]),
        ("r[1-2]n[8-10]-ib", [f"r{r}n{n}-ib" for r in (1, 2) for n in (8, 9, 10)]),
        ("node[098-101]", ["node098", "node099", "node100", "node101"]),
    ],
)
def test_slurms_lists_of_hosts(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", ",", "node[", "node]1", "node[1-]", "node[a-b]", "node[]"])
def test_what_is_no_list_of_hosts(text):
    with pytest.raises(ValueError):
        expand_hosts(text)


# Joining, with a transport that only notes what it was given


@pytest.fixture
def connected(monkeypatch):
    """What was connected, in place of the TCP transport."""
    calls = []

    def connect(me, **options):
        calls.append(SimpleNamespace(me=me, **options))
        return SimpleNamespace(rank=me.rank, size=me.size)

    tcp = SimpleNamespace(
        Membership=lambda rank, size, store, secret: SimpleNamespace(
            rank=rank, size=size, store=store, secret=secret
        ),
        connect=connect,
    )
    monkeypatch.setitem(sys.modules, "hvdkit.transport.tcp", tcp)
    monkeypatch.setattr("hvdkit.transport.tcp", tcp, raising=False)
    monkeypatch.setattr(opening, "load_mpi", lambda: pytest.fail("MPI was started"))
    return calls


@pytest.fixture
def no_mpi(monkeypatch):
    def missing():
        raise LauncherError("MPI cannot be loaded: there is none")

    monkeypatch.setattr(opening, "load_mpi", missing)


def world(size):
    """An MPI that sees `size` ranks."""
    return SimpleNamespace(
        world_size=lambda: size,
        library_version=lambda: "Open MPI v5.0.8",
        threads_level=lambda: "multiple",
        MPITransport=SimpleNamespace(over=lambda comm: SimpleNamespace(size=size, comm=comm)),
    )


def serving(port):
    return {"HVDKIT_RENDEZVOUS_ADDR": "127.0.0.1", "HVDKIT_RENDEZVOUS_PORT": str(port)}


def test_joining_over_tcp_starts_no_mpi(connected, tmp_path):
    config = Config(
        tcp_interfaces=("eth7",), start_timeout=20.0, peer_timeout=7.0, shm_dir=tmp_path
    )
    with RendezvousServer(bytes.fromhex(SECRET), "127.0.0.1") as server:
        opened = open_world(None, config, HVDRUN | serving(server.port))
        (call,) = connected
        call.me.store.put("key", b"through hvdrun's server")
        assert call.me.store.get("key", 5.0) == b"through hvdrun's server"
    assert (opened.kind, opened.threaded, opened.transport.size) == ("tcp", True, 4)
    assert opened.description.startswith("over TCP: hvdrun --tcp started this process as rank 1")
    assert (call.me.rank, call.me.size, call.me.secret) == (1, 4, bytes.fromhex(SECRET))
    assert (call.interfaces, call.start_timeout, call.peer_timeout) == (("eth7",), 20.0, 7.0)
    assert call.node[0] == socket.gethostname()
    assert call.node[2] == tmp_path.stat().st_dev


def join_all(environs, **config):
    """Join as several ranks at once, each on a thread; return what each was given."""
    opened, threads = [], []
    for environ in environs:
        threads.append(
            threading.Thread(
                target=lambda e=environ: opened.append(open_world(None, Config(**config), e))
            )
        )
        threads[-1].start()
    for thread in threads:
        thread.join(30.0)
    assert len(opened) == len(environs)


def test_horovodruns_ranks_share_a_secret_that_rank_0_makes(connected, monkeypatch):
    turns = [turn for turn in range(3) for _ in range(4)]  # the ranks are threads, and count as one
    monkeypatch.setattr(opening, "_joined", iter(turns))
    with RendezvousServer(None, "127.0.0.1") as server:
        environs = [
            HOROVODRUN
            | {
                "HOROVOD_RANK": str(rank),
                "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
                "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server.port),
            }
            for rank in range(4)
        ]
        join_all(environs, start_timeout=20.0)
        assert len({call.me.secret for call in connected}) == 1
        assert len(connected[0].me.secret) == 32
        join_all(environs, start_timeout=20.0)
        join_all([environ | {"HVDKIT_SECRET": SECRET} for environ in environs], start_timeout=20.0)
    assert {call.me.secret for call in connected[8:]} == {bytes.fromhex(SECRET)}


def test_set_by_hand_rank_0_holds_the_store(connected, monkeypatch):
    monkeypatch.setattr(membership, "_held", {})
    monkeypatch.setattr(opening, "_joined", repeat(0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environs = [
        BY_HAND | {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(4)
    ]
    try:
        join_all(environs[::-1], start_timeout=20.0)
        assert {call.me.rank for call in connected} == {0, 1, 2, 3}
        assert len({call.me.secret for call in connected}) == 1
        assert list(membership._held) == [port]
        HTTPStore("127.0.0.1", port, "x").put("still", b"there")
    finally:
        for server in membership._held.values():
            server.stop()


@pytest.mark.usefixtures("connected")
def test_a_port_that_is_taken_says_what_to_set(monkeypatch):
    monkeypatch.setattr(membership, "_held", {})
    with RendezvousServer() as taken, pytest.raises(LauncherError) as error:
        environ = BY_HAND | {"RANK": "0", "MASTER_PORT": str(taken.port)}
        open_world(None, Config(), environ)
    assert f"port {taken.port}" in str(error.value)
    assert "set HVDKIT_RENDEZVOUS_PORT to a free port" in str(error.value)


def test_ranks_that_do_not_meet_in_time(connected):
    with RendezvousServer(None, "127.0.0.1") as server, pytest.raises(LauncherError) as error:
        environ = HVDRUN | serving(server.port) | {"HVDKIT_SECRET": ""}
        open_world(None, Config(start_timeout=0.2), environ)
    message = str(error.value)
    assert f"rank 1 of 4 on {socket.gethostname()}, started by hvdrun --tcp, cannot join" in message
    assert "HVDKIT_START_TIMEOUT" in message
    assert not connected


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize("text", ["secret", "abc", "ab" * 15])
def test_a_secret_that_is_none_is_not_shown(text):
    with pytest.raises(ConfigError, match="HVDKIT_SECRET: expected 32 hexadecimal") as error:
        open_world(None, Config(), HVDRUN | {"HVDKIT_SECRET": text})
    assert repr(text) not in str(error.value)


def test_every_join_has_keys_of_its_own(connected):
    with RendezvousServer(bytes.fromhex(SECRET), "127.0.0.1") as server:
        for turn in range(2):
            open_world(None, Config(), HVDRUN | serving(server.port))
            store = connected[turn].me.store
            with pytest.raises(TimeoutError):
                store.get("address", 0.0)
            store.put("address", b"here")


@pytest.mark.usefixtures("connected", "no_mpi")
def test_alone_without_mpi():
    opened = open_world(None, Config(), {})
    assert (opened.kind, opened.transport.size) == ("alone", 1)
    with pytest.raises(LauncherError, match="without MPI there is a world of one in each"):
        open_world(None, Config(), SRUN)
    with pytest.raises(LauncherError, match="MPI cannot be loaded"):
        open_world(None, Config(), OPEN_MPI)


def test_mpi_joins_its_own(monkeypatch):
    monkeypatch.setattr(opening, "load_mpi", lambda: world(4))
    opened = open_world(None, Config(), OPEN_MPI)
    assert (opened.kind, opened.threaded, opened.transport.size) == ("mpi", True, 4)
    assert opened.description == (
        "over MPI (Open MPI v5.0.8): Open MPI's mpirun started this process (OMPI_COMM_WORLD_RANK)"
    )
    assert open_world("comm", Config(), HVDRUN).transport.comm == "comm"
    unknown = open_world(None, Config(), {"SOME_LAUNCHERS_RANK": "1"})
    assert (unknown.kind, unknown.transport.size) == ("mpi", 4), "MPI may know better"


def test_singletons_are_refused(monkeypatch):
    monkeypatch.setattr(opening, "load_mpi", lambda: world(1))
    for environ in (OPEN_MPI, SRUN, {"HOROVOD_SIZE": "4"}):
        for comm in (None, "MPI's world, of one"):
            with pytest.raises(LauncherError, match="sees a world of one in each"):
                open_world(comm, Config(), environ)
        assert open_world(None, Config(allow_singleton=True), environ).transport.size == 1


@pytest.mark.usefixtures("connected")
def test_singletons_with_a_place_to_meet_at_connect(monkeypatch):
    """srun whose PMI this MPI does not speak, in a script that sets RANK and so on."""
    monkeypatch.setattr(opening, "load_mpi", lambda: world(1))
    environ = SRUN | {"PMIX_RANK": "3"} | BY_HAND | {"HVDKIT_SECRET": SECRET}
    assert open_world(None, Config(), environ).kind == "tcp"
    monkeypatch.setattr(opening, "load_mpi", lambda: world(4))
    assert open_world(None, Config(), environ).kind == "mpi"
