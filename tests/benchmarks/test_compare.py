"""Noise is no regression; a slow-down is; and the exit status says so."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from compare import changes, figures_of
from figures import SIZES, made_run
from records import PEER, save

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compare.py"


def marked(old, new, verdict="slower"):
    found = changes(figures_of([old]), figures_of([new]))
    return {(c.new.name, c.new.nbytes) for c in found if c.verdict == verdict}


def test_the_same_machine_twice_has_no_regression():
    """In 50 pairs of runs, with 10 figures each, at most what one in twenty allows."""
    pairs = [(made_run(2 * n), made_run(2 * n + 1)) for n in range(50)]
    assert sum(bool(marked(*pair) or marked(*pair, "faster")) for pair in pairs) <= 5


def test_runs_that_drift_have_no_regression():
    """Each figure 10 % up or down from run to run, peers and roofs as well: no reason to worry."""
    pairs = [(made_run(2 * n, drift=0.1), made_run(2 * n + 1, drift=0.1)) for n in range(50)]
    assert sum(bool(marked(*pair)) for pair in pairs) <= 7


def test_a_machine_that_is_slower_as_a_whole_is_no_regression():
    assert not marked(made_run(1), made_run(2, scale=1.5))


def test_without_a_peer_the_roofs_show_that_the_machine_is_slower():
    peers = ("MPI library", "gloo")
    assert not marked(made_run(1, without=peers), made_run(2, without=peers, scale=1.5))


def test_with_nothing_beside_it_a_slower_machine_cannot_be_told_from_a_regression():
    others = ("MPI library", "gloo", "memory roof")
    old, new = made_run(1, without=others), made_run(2, without=others, scale=1.5)
    assert marked(old, new) == {(name, n) for name in ("shm", "ring") for n in SIZES}


@pytest.mark.parametrize("seed", range(10))
def test_a_slow_down_is_marked_where_it_is(seed):
    slow = {("shm", 65536): 1.3}
    found = marked(made_run(2 * seed, drift=0.01), made_run(2 * seed + 1, drift=0.01, slower=slow))
    assert found == {("shm", 65536)}


def test_what_became_faster_is_said_as_well():
    assert marked(made_run(1), made_run(2, slower={"shm": 0.5}), "faster") == {
        ("shm", nbytes) for nbytes in SIZES
    }


def test_a_difference_below_the_least_factor_counts_for_nothing():
    old, new = made_run(1, turns=500), made_run(2, turns=500, slower={"shm": 1.02})
    assert not marked(old, new)


def test_with_too_few_turns_nothing_can_be_told():
    old, new = made_run(1, turns=5), made_run(2, turns=5, slower={"shm": 3.0})
    assert not marked(old, new)
    assert len(marked(old, new, "too few turns")) == 10


def test_peers_are_not_ours_to_regress():
    slow = {"MPI library": 2.0, "gloo": 3.0}
    old, new = made_run(1), made_run(2, slower=slow)
    assert all(change.new.kind != PEER for change in changes(figures_of([old]), figures_of([new])))


def compare(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_exit_status_is_the_verdict(tmp_path):
    folders = {name: tmp_path / name for name in ("old", "same", "slow", "wrong")}
    runs = {"old": made_run(1), "same": made_run(2), "slow": made_run(3, slower={"ring": 1.6})}
    first, *rest = made_run(4).results
    runs["wrong"] = replace(runs["same"], results=(replace(first, wrong=3), *rest))
    for name, run in runs.items():
        save(run, folders[name] / "allreduce.json")
    same = compare(folders["old"], folders["same"])
    assert same.returncode == 0, same.stdout
    assert "10 figures: 0 slower, 0 faster, 10 same" in same.stdout
    slow = compare(folders["old"], folders["slow"] / "allreduce.json")
    assert slow.returncode == 1
    assert slow.stdout.count("**regression**") == 5
    assert "allreduce: allreduce, ring, 16 MiB, 2 ranks, Open MPI 5" in slow.stdout
    wrong = compare(folders["old"], folders["wrong"])
    assert wrong.returncode == 1
    assert "wrong result" in wrong.stdout
    missing = compare(folders["old"], tmp_path / "none")
    assert missing.returncode == 2
    assert "cannot read" in missing.stderr


def test_it_says_in_what_the_settings_differ(tmp_path):
    old, new = made_run(1), replace(made_run(2), machine={"processor": "another"})
    save(old, tmp_path / "old.json")
    save(new, tmp_path / "new.json")
    said = compare(tmp_path / "old.json", tmp_path / "new.json").stdout
    assert "machine differ: processor: made up -> another" in said
