"""Ranks on several hosts know where they are, and every collective is right between them."""

import re
import sys
from pathlib import Path

import pytest
from testbed.launchers import over_mpi, over_mpi_by_hvdrun, over_tcp, run_ranks, slots_of

from hvdkit import native

HERE = Path(__file__).parent
MPI_TESTS = HERE.parent / "mpi"

LAYOUTS = [
    "alpha:1,beta:1",
    "alpha:2,beta:2",
    "alpha:1,beta:2",
    "alpha:1,beta:1,gamma:1",
    "alpha:2,beta:1,gamma:1",
]
TRANSPORTS = {"mpi": over_mpi, "tcp": over_tcp}

transports = pytest.mark.parametrize("transport", TRANSPORTS)


def right_ranks(hosts, launcher, layout, **variables):
    """Run the job in which every collective is checked; return the algorithms of auto."""
    program = [sys.executable, str(HERE / "collectives_job.py"), layout]
    ended = run_ranks(hosts, launcher, layout, program, timeout=90, variables=variables)
    assert ended.status == 0, ended.stderr
    said = re.findall(r"\[rank (\d+) on (\w+) is right: (.*?)\]", ended.stdout)
    places = [host for host, count in slots_of(layout).items() for _ in range(count)]
    assert sorted(said) == [(str(r), place, said[0][2]) for r, place in enumerate(places)]
    assert hosts.sweep() == []
    return said[0][2].split()


@transports
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_collectives(hosts, transport, layout):
    picked = right_ranks(hosts, TRANSPORTS[transport], layout)
    several = any(count > 1 for count in slots_of(layout).values())
    assert ("hierarchical" in picked) == (several and native.why_unavailable() is None)


@transports
def test_without_shared_memory(hosts, transport):
    """Also on one host, ranks then send each other messages."""
    picked = right_ranks(hosts, TRANSPORTS[transport], "alpha:2,beta:1", HVDKIT_SHM="0")
    assert "shm" not in picked


def test_hvdrun_over_mpi(hosts):
    right_ranks(hosts, over_mpi_by_hvdrun, "alpha:2,beta:1")


@transports
@pytest.mark.parametrize("module", ["test_collectives.py", "test_random.py"])
def test_the_suites_of_one_host(hosts, transport, module):
    """The property tests of the collectives, and the engine's random orders."""
    program = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(MPI_TESTS / module)]
    layout = "alpha:2,beta:1"
    ended = run_ranks(hosts, TRANSPORTS[transport], layout, program, timeout=150)
    assert ended.status == 0, ended.stdout + ended.stderr
    assert re.search(r"\d+ passed", ended.stdout), ended.stdout
