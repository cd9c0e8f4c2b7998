"""The pictures, as text and as SVG, and the command that prints them."""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from hvdkit.cli import draw as command
from hvdkit.errors import ArgumentError
from hvdkit.schedules.draw import MAX_RANKS, chunk_label, draw_svg, draw_text
from hvdkit.schedules.hierarchical import hierarchical
from hvdkit.schedules.registry import Algorithm, get
from hvdkit.schedules.verify import verify

from .cases import EVERY, identify

SVG = "{http://www.w3.org/2000/svg}"


def groups(svg: str, name: str) -> list[ET.Element]:
    return [group for group in ET.fromstring(svg).iter(f"{SVG}g") if group.get("class") == name]


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["draw", *words])


def test_the_text_of_a_ring_of_two() -> None:
    assert draw_text(get("allreduce", "ring"), 2) == "\n".join(
        [
            "allreduce, ring [Patarasuk & Yuan 2009]: 2 ranks, 2 chunks",
            "",
            "step   from 0    from 1",
            "1      0→1 c0+   1→0 c1+",
            "2      0→1 c1=   1→0 c0=",
            "",
            "0→1 c2+: rank 0 sends chunk 2 to rank 1, which reduces it into its own; "
            "c2=: stores it",
            "steps: 2 (formula 2, lower bound 1)",
            "bytes sent by the busiest rank: n (formula n, lower bound n)",
        ]
    )


def test_a_silent_rank_leaves_its_column_empty() -> None:
    assert "step   from 0    from 1    from 2\n1      0→1 c0=\n2      0→1 c1=   1→2 c0=\n" in (
        draw_text(get("broadcast", "chain"), 3, segments=2)
    )


def test_messages_follow_one_another_where_the_columns_do_not_fit() -> None:
    text = draw_text(get("barrier", "dissemination"), 5, width=40)
    assert (
        "\nstep   messages\n1      0→1 c0+   1→2 c0+   2→3 c0+\n       3→4 c0+   4→0 c0+\n" in text
    )


@pytest.mark.parametrize("size", [1, 2, 5, 16, MAX_RANKS])
@pytest.mark.parametrize("algorithm", EVERY, ids=identify)
def test_text_shows_every_message_within_the_width(algorithm: Algorithm, size: int) -> None:
    chunks = algorithm.chunks(size, 2)
    segments = 2 if algorithm.pipelined else None
    _, table, _ = draw_text(algorithm, size, segments=segments).split("\n\n")
    report = verify(algorithm.steps, size, chunks, algorithm.collective)
    assert table.count("→") == report.messages
    assert max(map(len, table.splitlines())) <= 96


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("algorithm", EVERY, ids=identify)
def test_svg_has_an_arrow_and_a_label_for_every_message(algorithm: Algorithm, size: int) -> None:
    svg = draw_svg(algorithm, size, segments=2 if algorithm.pipelined else None)
    report = verify(algorithm.steps, size, algorithm.chunks(size, 2), algorithm.collective)
    assert len(groups(svg, "message")) == report.messages
    assert len(groups(svg, "label")) == report.messages


def test_svg_draws_reduce_and_store_differently() -> None:
    arrows = groups(draw_svg(get("allreduce", "ring"), 3), "message")
    dashed = ["stroke-dasharray" in line.attrib for g in arrows for line in g.iter(f"{SVG}line")]
    assert dashed == [False] * 6 + [True] * 6


def test_svg_colours_tell_chunks_apart() -> None:
    arrows = groups(draw_svg(get("allgather", "ring"), 16), "message")
    colour_of = {}
    for group in arrows:
        title, line = group.find(f"{SVG}title"), group.find(f"{SVG}line")
        assert title is not None and title.text is not None and line is not None
        colour_of[title.text.split()[1]] = line.get("stroke")
    assert len(colour_of) == 16
    assert len(set(colour_of.values())) == 16


def test_svg_needs_nothing_from_outside() -> None:
    svg = draw_svg(get("allreduce", "tree"), 4)
    assert "href" not in svg
    assert "url(" not in svg


def test_chunk_labels() -> None:
    assert chunk_label((2,)) == "c2"
    assert chunk_label((0, 1, 2)) == "c0-2"
    assert chunk_label((6, 7, 0)) == "c6-7,0"


@pytest.mark.parametrize("ranks", [-1, 0, MAX_RANKS + 1])
def test_ranks_out_of_range(ranks: int) -> None:
    with pytest.raises(ArgumentError, match=f"cannot draw {ranks} ranks; choose 1 to {MAX_RANKS}"):
        draw_text(get("allreduce", "ring"), ranks)


def test_segments_out_of_place_and_out_of_range() -> None:
    with pytest.raises(ArgumentError, match="ring is not pipelined"):
        draw_text(get("allreduce", "ring"), 4, segments=2)
    with pytest.raises(ArgumentError, match="cannot draw 0 segments"):
        draw_svg(get("broadcast", "chain"), 4, segments=0)
    with pytest.raises(ArgumentError, match="cannot draw 1001 segments; choose 1 to 1000"):
        draw_text(get("broadcast", "chain"), 4, segments=1001)


def test_command_prints_the_diagram(capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments("ring", "--ranks", "3")
    assert args.run(args) == 0
    assert capsys.readouterr().out == draw_text(get("allreduce", "ring"), 3) + "\n"


def test_command_writes_the_svg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "chain.svg"
    args = arguments("chain", "--segments", "2", "--out", str(out))
    assert args.run(args) == 0
    assert out.read_text(encoding="utf-8") == draw_svg(get("broadcast", "chain"), 4, segments=2)
    assert capsys.readouterr().out.endswith(f"wrote {out}\n")


def test_command_says_where_it_cannot_write(tmp_path: Path) -> None:
    args = arguments("ring", "--out", str(tmp_path / "missing" / "ring.svg"))
    with pytest.raises(ArgumentError, match=r"cannot write .*ring\.svg: No such file or directory"):
        args.run(args)


def test_command_finds_an_algorithm_by_its_name_alone() -> None:
    assert command.find("ring", None).collective == "allreduce"
    assert command.find("bruck", None).collective == "allgather"
    assert command.find("ring", "reducescatter").collective == "reducescatter"


def test_command_draws_the_hierarchical_all_reduce(capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments("hierarchical", "--ranks", "6", "--ranks-per-node", "3")
    assert args.run(args) == 0
    assert capsys.readouterr().out == draw_text(hierarchical(3), 6) + "\n"
    args = arguments("hierarchical", "--ranks", "5")
    assert args.run(args) == 0
    shown = capsys.readouterr().out
    assert "steps: 6 (no formula, lower bound 3)" in shown, "the last node is not full"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("ring", "--ranks-per-node", "2"), "ring knows no nodes: leave --ranks-per-node out"),
        (("hierarchical", "--ranks-per-node", "0"), "a node has at least one rank, not 0"),
        (("1f1b", "--ranks-per-node", "2"), "1f1b is a pipeline schedule: leave --ranks-per-node"),
        (("hierarchical", "--collective", "allgather"), "the known ones are ring, bruck"),
    ],
)
def test_command_says_who_knows_of_nodes(given: tuple[str, ...], said: str) -> None:
    args = arguments(*given)
    with pytest.raises(ArgumentError, match=said):
        args.run(args)


def test_command_answers_wrong_names_with_the_known_ones() -> None:
    with pytest.raises(
        ArgumentError, match="unknown algorithm 'rign'; the known ones are\n"
    ) as exc:
        command.find("rign", None)
    assert "  broadcast: binomial, chain\n" in str(exc.value)
    with pytest.raises(ArgumentError, match="'tree' for allgather; the known ones are ring, bruck"):
        command.find("tree", "allgather")
    with pytest.raises(ArgumentError, match="unknown collective 'reduce'"):
        command.find("ring", "reduce")
