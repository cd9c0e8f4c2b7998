"""make's variables reach the benchmarks."""

import argparse
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

GIVEN = ("SIZES=4 1KiB", "ALGORITHMS=ring tree", "PEERS=mpi", "DTYPE=int8", "TURNS=5")
PASSED = "--sizes 4 1KiB --algorithms ring tree --peers mpi --dtype int8 --turns 5"

SCRIPTS = {
    "allreduce": "allreduce",
    "collectives": "collectives",
    "dtypes": "dtypes",
    "step": "step",
    "bucketing": "bucketing",
    "compression": "compressing",
    "torch": "torch_training",
    "tensorflow": "tensorflow_training",
    "pipeline": "pipeline",
}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def would_run(*arguments):
    """Return what make would run for `arguments`, each command in one line of single spaces."""
    command = ["make", "--no-print-directory", "-n", *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    joined = done.stdout.replace("\\\n", " ")
    return [" ".join(line.split()) for line in joined.splitlines()]


@pytest.mark.parametrize(("name", "script"), SCRIPTS.items())
def test_variables_are_passed_on(name, script):
    lines = would_run(f"bench-{name}", "RANKS=3 5", *GIVEN)
    (line,) = [line for line in lines if "mpirun" in line]
    for ranks in (3, 5):
        assert f"mpirun -n {ranks} " in line
    assert line.count(f"benchmarks/{script}.py --out results/{name}.json {PASSED}") == 2
    assert f"targets.py results {name}" in line


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_variables_nothing_is_passed_on(name):
    (line,) = [line for line in would_run(f"bench-{name}") if "mpirun" in line]
    assert not any(option in line for option in ("--sizes", "--peers", "--turns", "--short"))


def test_hosts_have_ranks_of_their_own():
    lines = would_run("bench-hosts", "RANKS=2", *GIVEN)
    (line,) = [line for line in lines if "hosts.py" in line]
    assert f"hosts.py --out results/hosts.json {PASSED}" in line
    assert any("RANKS" in line and "echo" in line for line in lines)


def test_links_and_layouts_have_spaces_in_their_names():
    given = ("LINKS=1 Gbit/s; unlimited + 1 ms", "LAYOUTS=2 x 2;3x1", "TRANSPORTS=mpi tcp")
    (line,) = [line for line in would_run("bench-hosts", *given) if "hosts.py" in line]
    words = shlex.split(line)
    for option, values in (
        ("--links", ["1 Gbit/s; unlimited + 1 ms", "--layouts"]),
        ("--layouts", ["2 x 2;3x1", "--transports"]),
        ("--transports", ["mpi", "tcp", "&&"]),
    ):
        at = words.index(option) + 1
        assert words[at : at + len(values)] == values


def test_links_and_layouts_are_taken_or_those_there_are_are_named():
    pytest.importorskip("tqdm")
    hosts = pytest.importorskip("hosts")
    links = hosts.names_of(hosts.LINKS)
    assert links("1 Gbit/s; unlimited+1ms") == ["1 Gbit/s", "unlimited + 1 ms"]
    assert hosts.names_of(hosts.LAYOUTS)("3x1") == ["3 x 1"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"no '2Gbit/s'; there are 100 Mbit/s; 1 "):
        links("2 Gbit/s")


def test_help_names_the_variables():
    done = subprocess.run(
        ["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in ("MPI", "RANKS", "SIZES", "LINKS", "LAYOUTS", "TRANSPORTS"):
        assert f"{name}=" in done.stdout


def test_bench_is_all_of_them_and_short():
    lines = would_run("bench")
    for name, script in {**SCRIPTS, "hosts": "hosts"}.items():
        found = [line for line in lines if f"{script}.py --out results/{name}.json" in line]
        assert found, name
        assert all("--short" in line for line in found)
    assert any("report.py results" in line for line in lines)
