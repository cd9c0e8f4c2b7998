"""``hvdkit simulate`` on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from core.tunings import tuning

from hvdkit.cli import main
from hvdkit.cli.units import format_seconds, format_size, parse_rate, parse_seconds, parse_size
from hvdkit.schedules.machine import Level
from hvdkit.tuning.file import save
from hvdkit.tuning.record import USUAL_LEVELS

SMALL = ("simulate", "allreduce", "--ranks", "8", "--ranks-per-node", "2", "--bytes", "1MB")
TRAINING = ("simulate", "training", "--layers", "1M,2M,3M", "--flops", "1T")


def test_every_algorithm_with_what_bounds_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--topology", "fat-tree", "--radix", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "allreduce among 8 ranks on 4 nodes of 2 (fat-tree, block)"
    assert {line.split()[0] for line in lines[4:]} == {
        "ring",
        "tree",
        "double_tree",
        "recursive_doubling",
        "halving_doubling",
        "all_pairs",
        "hierarchical",
        "hierarchical/tree",
        "hierarchical/double_tree",
        "hierarchical/recursive_doubling",
        "hierarchical/halving_doubling",
        "hierarchical/all_pairs",
    }
    assert all("NICs" in line or "leaf uplinks" in line for line in lines[4:])


def test_several_sizes_and_where_another_algorithm_is_best(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--bytes", "64MiB,1KiB,4", "--algorithm", "ring,recursive_doubling"]
    assert main([*SMALL[:-2], *words]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "best:",
        "  4 B to 1 KiB: recursive_doubling",
        "  64 MiB: ring",
    ]


def test_options_are_in_the_units_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--latency 3us --bandwidth 8Gbit/s --reduction 2GB/s --topology crossbar --json"
    words += " --algorithm ring"
    assert main([*SMALL[:4], "--ranks-per-node", "1", "--bytes", "1MB", *words.split()]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    expected = 7 * (2 * 3e-6 + 1e6 / 8 * (2 * 1e-9 + 0.5e-9))
    assert record["seconds"] == pytest.approx(expected)
    assert record["bound_by"] == "links between nodes"
    assert record["messages"] == 2 * 7 * 8


def test_other_collectives(capsys: pytest.CaptureFixture[str]) -> None:
    for collective in ("allgather", "reducescatter", "broadcast", "alltoall"):
        assert main(["simulate", collective, *SMALL[2:]]) == 0
    assert main(["simulate", "barrier", "--ranks", "8"]) == 0
    assert "dissemination" in capsys.readouterr().out


def test_a_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAINING, "--data", "4", "--pipeline", "2", "--microbatches", "4"]) == 0
    text = capsys.readouterr().out
    assert "6 million parameters in 3 layers; 8 ranks: data 4, pipeline 2, tensor 1" in text
    assert "bound by exposed gradients" in text
    assert main([*TRAINING, "--data", "4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert sum(record["parts"].values()) == pytest.approx(record["seconds"])
    assert record["parts"]["compute"] == pytest.approx(6 * 6e6 / 1e12)


def test_layers_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "layers.txt"
    text.write_text("# a model\nfc1 1M 1ms 3ms 8MB\n\nfc2 2M 2ms\nnorm 0 -  # nothing\n")
    objects = tmp_path / "layers.json"
    objects.write_text(
        '[{"name": "fc1", "parameters": 1e6, "forward": 1e-3, "backward": "3ms"},'
        ' {"parameters": "2M", "forward": "2ms"}]'
    )
    for path in (text, objects):
        words = ["simulate", "training", "--layers", str(path), "--flops", "1T", "--json"]
        assert main(words) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["seconds"] == pytest.approx(1e-3 + 3e-3 + 2e-3 + 4e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SMALL, "--algorithm", "rings"], "unknown algorithm 'rings' for allreduce; here are"),
        ([*SMALL, "--topology", "torus", "--torus", "3x3"], "a torus of 3x3 has 9 nodes, not 4"),
        ([*SMALL, "--topology", "torus", "--torus", "axb"], "--torus axb: give the nodes"),
        ([*SMALL, "--torus", "2x2"], "--torus is for --topology torus, not nic"),
        ([*SMALL, "--radix", "8"], "--radix is for --topology fat-tree, not nic"),
        ([*SMALL, "--straggler", "8:2"], "straggler 8 is not among the ranks 0 to 7"),
        ([*SMALL[:-4], "--ranks", "0", *SMALL[-2:]], "there must be at least one"),
        (TRAINING[:-2], "how long layer 'layer 0' computes is not known"),
        ([*TRAINING[:3], "no.json"], "cannot read the layers in no.json"),
        ([*TRAINING, "--pipeline", "4"], "3 layers cannot be split into 4 stages"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("hvdkit: ")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "words", [("--jitter", "x"), ("--straggler", "1"), ("--latency", "2 miles"), ("--seed", "a")]
)
def test_what_does_not_parse_is_status_2(words: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, *words])
    assert ended.value.code == 2


def test_units() -> None:
    assert parse_seconds("2us") == parse_seconds("0.002 ms") == 2e-6
    assert parse_size("100MB") == 1e8
    assert parse_size("64KiB") == 65536
    assert parse_rate("100Gbit/s") == parse_rate("12.5 GB/s") == 12.5e9
    assert format_size(65536) == "64 KiB"
    assert format_size(1e8) == "100 MB"
    assert format_seconds(1.5e-3) == "1.50 ms"


def test_what_was_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The links cost what the file says, unless an option says otherwise."""
    level = Level(alpha=1e-3, beta=1e-9, gamma=0.0)
    levels = replace(USUAL_LEVELS, within=level, across=level)
    path = tmp_path / "tuning.json"
    save(path, tuning([2], levels=levels), ())
    words = ["simulate", "allreduce", "--ranks", "2", "--bytes", "1000", "--algorithm", "ring"]
    assert main([*words, "--json", "--tuning", str(path)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["seconds"] == pytest.approx(2 * (1e-3 + 500e-9))
    assert main([*words, "--json", "--tuning", str(path), "--within-latency", "2ms"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["seconds"] == pytest.approx(2 * (2e-3 + 500e-9))
    assert main([*words, "--tuning", str(tmp_path / "missing.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
