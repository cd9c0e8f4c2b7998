"""The benchmark between hosts, where these have different numbers of ranks."""

import json
import sys
from pathlib import Path

import pytest
from testbed.launchers import over_mpi, run_ranks

LINKS = Path(__file__).parents[2] / "benchmarks" / "links.py"


@pytest.mark.parametrize("layout", ["alpha:2,beta:1", "alpha:1,beta:2"])
def test_hosts_with_different_numbers_of_ranks(hosts, tmp_path, layout):
    """Some of the roofs concern one rank of each host; the others wait for it."""
    path = tmp_path / "hosts.json"
    options = ["--sizes", "4", "512KiB", "--algorithms", "auto", "--turns", "2", "--out", str(path)]
    program = [sys.executable, str(LINKS), "uneven", "mpi", *options]
    ended = run_ranks(hosts, over_mpi, layout, program, timeout=90, variables={"HVDKIT_SPIN": "0"})
    assert ended.status == 0, ended.stderr
    (run,) = json.loads(path.read_text())["runs"]
    measured = {(result["name"], result["nbytes"]) for result in run["results"]}
    assert {"auto", "MPI library", "message roof"} == {name for name, size in measured if size == 4}
    assert {("auto", 524_288), ("memory roof", 524_288), ("message roof", 524_288)} <= measured
    assert not any(result["wrong"] for result in run["results"])
