"""The tables, as text and as SVG, and the command that prints them."""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ET
from fractions import Fraction
from pathlib import Path

import pytest

from hvdkit.cli import draw as command
from hvdkit.cli import main
from hvdkit.errors import ArgumentError
from hvdkit.parallel.pipeline.draw import draw_text, plan
from hvdkit.parallel.pipeline.instructions import Forward, Times
from hvdkit.parallel.pipeline.registry import PipelineSchedule, get
from hvdkit.parallel.pipeline.svg import draw_svg

from .pipelines import EVERY, chunk_counts, identify

SVG = "{http://www.w3.org/2000/svg}"


def boxes(svg: str, kind: str) -> list[ET.Element]:
    return [group for group in ET.fromstring(svg).iter(f"{SVG}g") if group.get("class") == kind]


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["draw", *words])


def test_the_text_of_1f1b_on_two_ranks() -> None:
    assert draw_text(plan(get("1f1b"), 2, 3)).splitlines() == [
        "1f1b [Narayanan et al. 2021]: 2 ranks, 3 microbatches",
        "",
        "time    0         5         10",
        "rank 0  0 1 · · b0─ 2 b1─ · b2─",
        "rank 1  · 0 b0─ 1 b1─ 2 b2─ · ·",
        "",
        "3: microbatch 3 forward, b3: backward, ·: idle",
        "bubble: 1/4 = 25.0% of the time (formula 1/4 = 25.0%)",
        "in flight at most, by rank: 2, 1 microbatches",
    ]


def test_the_text_of_zb_h1_on_two_ranks() -> None:
    text = draw_text(plan(get("zb-h1"), 2, 2))
    assert "\nrank 0  0  1  ·  b0 w0 b1 w1\nrank 1  ·  0  b0 1  b1 w0 w1\n" in text
    assert "\nof these with all activations: 2, 1; " in text


def test_chunks_are_ticked_and_memory_is_counted_in_stages() -> None:
    text = draw_text(plan(get("interleaved"), 1, 1, chunks=3))
    assert "\nrank 0  0   0'  0'' b0''─── b0'──── b0─────\n" in text
    assert "by rank: 3 stages' microbatches, a stage being 1/3 of a rank" in text


def test_durations_are_drawn_to_scale() -> None:
    times = Times(Fraction(1, 2), 1, Fraction(1, 2))
    text = draw_text(plan(get("1f1b"), 2, 1, times=times))
    assert "\nrank 0  0 · · · · b0───\n" in text
    assert "\ntime    0         2.5\n" in text


@pytest.mark.parametrize("sizes", [(1, 1), (2, 5), (5, 2), (4, 12), (8, 32)], ids=str)
@pytest.mark.parametrize("schedule", EVERY, ids=identify)
def test_text_shows_every_instruction_within_the_width(
    schedule: PipelineSchedule, sizes: tuple[int, int]
) -> None:
    ranks, microbatches = sizes
    for chunks in chunk_counts(schedule):
        lines = draw_text(plan(schedule, ranks, microbatches, chunks=chunks)).splitlines()
        rows = [line for line in lines if line.startswith(("rank", "time"))]
        assert max(map(len, rows)) <= 96
        joined = "".join(line.split("  ", 1)[1] + " " for line in rows if line.startswith("rank"))
        cells = joined.replace("·", " ").replace("─", " ").split()
        assert len(cells) == sum(map(len, schedule.plan(ranks, microbatches, chunks)))


@pytest.mark.parametrize("schedule", EVERY, ids=identify)
def test_svg_has_a_box_for_every_instruction(schedule: PipelineSchedule) -> None:
    chunks = 3 if schedule.chunked else 1
    svg = draw_svg(plan(schedule, 3, 4, chunks=chunks))
    every = [one for row in schedule.plan(3, 4, chunks) for one in row]
    for kind in {type(one) for one in every}:
        drawn = boxes(svg, kind.__name__)
        assert len(drawn) == sum(type(one) is kind for one in every)
        assert len({box.find(f"{SVG}rect").get("fill") for box in drawn}) == chunks
    assert f"bubble: {schedule.bubble(3, 4, chunks, Times())} = " in svg
    assert "in flight at most, by rank: " in svg


def test_svg_is_to_scale_and_says_what_is_in_a_box() -> None:
    svg = draw_svg(plan(get("gpipe"), 2, 2, times=Times(1, 1, 2)))
    width = {
        kind: {int(box.find(f"{SVG}rect").get("width")) + 1 for box in boxes(svg, kind)}
        for kind in ("Forward", "Backward")
    }
    (forward,), (backward,) = width["Forward"], width["Backward"]
    assert backward == 3 * forward
    titles = [box.findtext(f"{SVG}title") for box in boxes(svg, "Forward")]
    assert titles[0] == f"{Forward(0, 0)}, 0 to 1"


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "1f1b.svg"
    words = ["1f1b", "--stages", "4", "--microbatches", "8", "--out", str(out)]
    assert command.run(arguments(*words)) == 0
    printed = capsys.readouterr().out
    assert printed == draw_text(plan(get("1f1b"), 4, 8)) + f"\nwrote {out}\n"
    assert out.read_text(encoding="utf-8") == draw_svg(plan(get("1f1b"), 4, 8))


def test_the_command_takes_chunks_and_durations(capsys: pytest.CaptureFixture[str]) -> None:
    command.run(arguments("interleaved", "--chunks", "3", "--backward-weight", "0.5"))
    times = Times(1, 1, Fraction(1, 2))
    drawn = draw_text(plan(get("interleaved"), 4, 8, chunks=3, times=times))
    assert capsys.readouterr().out == drawn + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("1f1b --ranks 4", "1f1b is a pipeline schedule: leave --ranks out"),
        ("ring --stages 4", "ring is a collective algorithm: leave --stages out"),
        ("ring --backward-input 2", "leave --backward-input out"),
        ("gpipe --collective allreduce", "leave --collective out"),
        ("gpipe --stages 0", "cannot draw 0 stages; choose 1 to 64"),
        ("gpipe --microbatches 999", "cannot draw 999 microbatches; choose 1 to 256"),
        ("interleaved --chunks 17", "cannot draw 17 chunks; choose 1 to 16"),
        ("1f1b --chunks 2", "1f1b has one chunk of layers a rank, not 2; choose interleaved"),
        ("1f1b --forward 1.0001", "choose fewer microbatches, or durations that are small"),
    ],
)
def test_what_cannot_be_drawn(words: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        command.run(arguments(*words.split()))


@pytest.mark.parametrize("text", ["0", "-1", "1/0", "x", "nan"])
def test_a_duration_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exc:
        main(["draw", "1f1b", f"--forward={text}"])
    assert exc.value.code == 2
    assert "argument --forward: " in capsys.readouterr().err.splitlines()[-1]


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"cannot write .*: No such file or directory"):
        command.run(arguments("gpipe", "--out", str(tmp_path / "none" / "x.svg")))


def test_the_help_names_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["draw", "--help"])
    printed = capsys.readouterr().out
    assert "  allreduce: ring, tree, " in printed
    assert "  pipeline: gpipe, 1f1b, interleaved, zb-h1\n" in printed
