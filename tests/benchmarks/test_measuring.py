"""Whole benchmarks on two ranks: results are checked, and options that mean nothing are named."""

from pathlib import Path

import pytest
from launching import run
from records import OURS, PEER, ROOF, load

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

#: Starts a benchmark as its command line would, with `sys.argv` as given.
START = """
import runpy, sys
sys.path.insert(0, {folder!r})
sys.argv = {arguments!r}
runpy.run_path({script!r}, run_name="__main__")
"""

PLANTED = """
import sys
sys.path.insert(0, {folder!r})
import allreduce, measuring
import numpy as np
import hvdkit as hvd
from measuring import Candidate

def off_by_one(nbytes):
    '''Prepare an all-reduce of which one rank gets one element wrong.'''
    x = np.empty(nbytes // 4, np.float32)

    def wrongly():
        hvd.allreduce_(x, op=hvd.Sum, algorithm="ring")
        if hvd.rank() == 1:
            x[x.size // 2] += 1

    return allreduce.prepared(x, wrongly)

hvd.init()
both = [allreduce.ours("ring"), Candidate("planted", off_by_one)]
measuring.report("allreduce", measuring.run("allreduce", [400], both, turns=3), None)
"""


ANEW = """
import sys, time
sys.path.insert(0, {folder!r})
import measuring
import numpy as np
import hvdkit as hvd
from measuring import Candidate

sent = []

def prepare(nbytes):
    x = np.zeros(nbytes // 4, np.float32)

    def anew():
        time.sleep(0.01)
        x[:] = len(sent)

    def call():
        sent.append(float(hvd.allgather(x)[0]))

    return call, lambda: 0, anew

hvd.init()
(found,) = measuring.measure("allgather", 400, [Candidate("anew", prepare)], turns=3)
assert sent == [float(n) for n in range(len(sent))] and len(sent) >= 6, sent
assert found.seconds < 0.005, found.seconds
"""


def run_benchmark(name, *options, ranks=2):
    arguments = [f"{name}.py", *map(str, options)]
    script = START.format(
        folder=str(BENCHMARKS), arguments=arguments, script=str(BENCHMARKS / f"{name}.py")
    )
    ended = run(script, ranks, timeout=120)
    assert ended.status == 0, ended.stdout + ended.stderr
    return ended


def test_a_planted_wrong_result_is_found():
    ended = run(PLANTED.format(folder=str(BENCHMARKS)), 2)
    assert ended.status == 1, ended.stdout + ended.stderr
    rows = {line.split()[0]: line.split()[-1] for line in ended.stdout.splitlines() if line.strip()}
    assert (rows["planted"], rows["ring"]) == ("1", "0")


def test_allreduce_takes_turns_with_peers_and_roofs(tmp_path):
    out = tmp_path / "allreduce.json"
    options = ["--sizes", "64KiB", "--algorithms", "ring", "shm", "--peers", "mpi", "--turns", "6"]
    run_benchmark("allreduce", *options, "--dtype", "int32", "float16", "--out", out)
    (saved,) = load(out)
    kinds = {(r.what, r.name): r.kind for r in saved.results}
    assert kinds["allreduce, int32", "ring"] == OURS
    assert kinds["allreduce, int32", "MPI library"] == PEER
    assert kinds["allreduce, float16", "memory roof"] == ROOF
    assert ("allreduce, float16", "MPI library") not in kinds
    assert all(len(r.samples) == 6 and r.wrong == 0 and r.nbytes == 65536 for r in saved.results)
    assert {"processor", "cores", "nodes"} <= saved.machine.keys()
    assert {"hvdkit", "MPI", "numpy"} <= saved.versions.keys()


@pytest.mark.parametrize("ranks", [1, 3])
def test_collectives_are_right_on_other_numbers_of_ranks(ranks, tmp_path):
    out = tmp_path / "collectives.json"
    options = ["--sizes", "4KiB", "100", "--turns", "3", "--algorithms", "auto", "ring"]
    run_benchmark("collectives", *options, "--out", out, ranks=ranks)
    (saved,) = load(out)
    names = {(r.what, r.name) for r in saved.results}
    assert {("allgather", "ring"), ("alltoall", "hvdkit"), ("broadcast", "MPI library")} <= names
    assert ("alltoall", "ring") not in names
    assert ("allgather", "message roof") in names or ranks == 1


def test_what_writes_the_input_anew_takes_no_time_of_the_call():
    ended = run(ANEW.format(folder=str(BENCHMARKS)), 2)
    assert ended.status == 0, ended.stdout + ended.stderr


def test_an_option_that_means_nothing_is_named():
    options = ["--sizes", "4", "--algorithms", "ring", "--parameters", "10000", "--turns", "3"]
    said = run_benchmark("step", *options).stdout
    assert said.count("mean nothing to this benchmark: --sizes, --algorithms") == 1


def test_buckets_know_the_best(tmp_path):
    out = tmp_path / "bucketing.json"
    options = ["--models", "ResNet-50", "--width", "0.05", "--sizes", "64KiB", "1MiB"]
    said = run_benchmark("bucketing", *options, "--turns", "6", "--peers", "mpi", "--out", out)
    assert "best bucket size" in said.stdout
    (saved,) = load(out)
    whole = {r.name: r.notes["buckets"] for r in saved.results if r.what == "step of a perceptron"}
    assert whole["64 KiB"] == 32 > whole["default"] > 1
    assert not any(r.wrong for r in saved.results)
    buckets = {r.name: r.notes["buckets"] for r in saved.results[: -len(whole)] if r.notes}
    assert buckets["one by one"] == 161 > buckets["64 KiB"] > buckets["1 MiB"] >= 1


def test_compression_shows_bytes_and_errors(tmp_path):
    out = tmp_path / "compression.json"
    run_benchmark("compressing", "--width", "0.05", "--turns", "3", "--out", out)
    (saved,) = load(out)
    for way in ("shm", "messages"):
        found = {r.name: r.notes for r in saved.results if r.what == f"compressed gradients, {way}"}
        exact, halved, eighth = (found[name] for name in ("none", "fp16", "int8"))
        assert exact["error"] < 1e-6 < halved["error"] < eighth["error"] < 0.05
        assert halved["MB sent"] == pytest.approx(exact["MB sent"] / 2, rel=0.01)
        assert eighth["MB sent"] < 0.3 * exact["MB sent"]
        for name in ("int8", "topk(0.01)", "powersgd(4)"):
            assert found[name]["error of 10"] < found[name]["error"], name
