"""The MPI tests' own runner: one rank's failure ends the others and shows which rank and why."""

import shutil
import subprocess
import sys

import pytest

from .helpers import REPOSITORY, under_mpirun

TESTS = REPOSITORY / "tests"


@pytest.fixture
def suite(tmp_path):
    """A copy of the MPI tests' conftest, beside which a test can be written."""

    def write(source):
        shutil.copy(TESTS / "mpi/conftest.py", tmp_path)
        (tmp_path / "test_it.py").write_text("import numpy as np\nimport hvdkit as hvd\n" + source)
        return tmp_path

    return write


def run_suite(folder, ranks=2):
    return under_mpirun(
        ranks, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), cwd=folder
    )


def test_a_failure_on_one_rank_ends_the_others_and_says_which(suite):
    folder = suite(
        "def test_of_rank_1():\n"
        "    if hvd.rank() == 1:\n"
        "        assert sum([2, 2]) == 5, 'rank 1 cannot add'\n"
        "    hvd.allreduce(np.ones(100_000))\n"
    )
    outcome = run_suite(folder)
    assert outcome.status != 0
    shown = outcome.stdout + outcome.stderr
    assert "*** rank 1 of 2 failed: test_it.py::test_of_rank_1" in shown
    assert "rank 1 cannot add" in shown
    assert "rank 0 of 2 failed" not in shown


def test_a_fixture_that_fails(suite):
    folder = suite(
        "import pytest\n"
        "@pytest.fixture\n"
        "def broken():\n"
        "    if hvd.rank() == 1: raise LookupError('the fixture of rank 1')\n"
        "def test_it(broken):\n"
        "    hvd.barrier()\n"
    )
    outcome = run_suite(folder)
    assert outcome.status != 0
    assert "*** rank 1 of 2 failed" in outcome.stdout + outcome.stderr
    assert "the fixture of rank 1" in outcome.stdout + outcome.stderr


def test_a_module_that_cannot_be_imported_on_one_rank(suite):
    folder = suite(
        "if hvd.rank() == 1:\n    raise LookupError('the import of rank 1')\n"
        "def test_it():\n    hvd.barrier()\n"
    )
    outcome = run_suite(folder)
    assert outcome.status != 0
    assert "*** rank 1 of 2 failed" in outcome.stdout + outcome.stderr
    assert "the import of rank 1" in outcome.stdout + outcome.stderr


def test_success_is_status_0_and_is_reported_once(suite):
    outcome = run_suite(suite("def test_it():\n    hvd.barrier()\n"))
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("1 passed") == 1


@pytest.mark.parametrize(("timeout", "status"), [("60", 0), ("0.2", 1)])
def test_the_script_at_a_number_of_ranks(timeout, status):
    """With the native module and without, under a timeout that ends what does not end itself."""
    script = str(TESTS / "run_mpi.py")
    selected = ["-k", "test_init_again", f"--ignore={TESTS / 'mpi/test_torch.py'}"]
    done = subprocess.run(
        [sys.executable, script, "--ranks", "1", "--timeout", timeout, *selected],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    if status == 0:
        assert "=== 1 rank, with the native module: passed" in done.stdout
        assert "=== 1 rank, without the native module: passed" in done.stdout
        assert done.stdout.endswith("all MPI tests passed\n")
    else:
        assert done.stdout.count("not finished within") == 3
        assert done.stdout.endswith(
            "failed: 1 rank, with the native module; 1 rank, with the native module, TensorFlow; "
            "1 rank, without the native module\n"
        )
