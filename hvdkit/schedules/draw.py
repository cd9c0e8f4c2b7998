"""Space-time diagrams of a schedule, from the very run that proves it."""

from __future__ import annotations

import colorsys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from fractions import Fraction

from hvdkit.errors import ArgumentError
from hvdkit.schedules.cost import Cost, lower_bound
from hvdkit.schedules.registry import Algorithm
from hvdkit.schedules.rendezvous import Message
from hvdkit.schedules.steps import contiguous_runs
from hvdkit.schedules.verify import trace

#: Beyond this many ranks nobody can read the picture, nor is the proof instantaneous.
MAX_RANKS = 64
MAX_SEGMENTS = 1000

#: Segments of a pipelined algorithm where the caller names none: enough to see the pipeline.
DEFAULT_SEGMENTS = 4

IN_PLACE_LEGEND = (
    "0→1 c2+: rank 0 sends chunk 2 to rank 1, which reduces it into its own; c2=: stores it"
)
ALLTOALL_LEGEND = (
    "0→1 c1=c0: rank 0 sends its input chunk 1 to rank 1, which stores it as output chunk 0"
)


@dataclass(frozen=True, slots=True)
class Drawing:
    """What both kinds of picture show.

    Args:
        title: collective, algorithm, ranks and chunks.
        size: number of ranks.
        rounds: the messages of each step of the critical path, in the order of their senders.
        legend: how to read a message.
        totals: lines that hold what was measured against the formula and the lower bound.
    """

    title: str
    size: int
    rounds: list[list[Message]]
    legend: str
    totals: list[str]


def plan(algorithm: Algorithm, size: int, segments: int | None = None) -> Drawing:
    """Run the schedule and return what is to be drawn.

    Raises:
        ArgumentError: the number of ranks or of segments makes no sense here.
        ScheduleError: the schedule is wrong.
    """
    if not 1 <= size <= MAX_RANKS:
        raise ArgumentError(f"cannot draw {size} ranks; choose 1 to {MAX_RANKS}")
    if segments is not None and not algorithm.pipelined:
        raise ArgumentError(f"{algorithm.name} is not pipelined: leave the segments out")
    segments = DEFAULT_SEGMENTS if segments is None else segments
    if not 1 <= segments <= MAX_SEGMENTS:
        raise ArgumentError(f"cannot draw {segments} segments; choose 1 to {MAX_SEGMENTS}")
    chunks = algorithm.chunks(size, segments)
    report, messages = trace(algorithm.steps, size, chunks, algorithm.collective)
    rounds: list[list[Message]] = [[] for _ in range(report.rounds)]
    for message in sorted(messages, key=lambda message: message.source):
        rounds[message.round - 1].append(message)
    measured = Cost(report.rounds, Fraction(report.max_chunks_sent, chunks))
    bound = lower_bound(algorithm.collective, size)
    steps, sent = _formulas(algorithm, size, chunks)
    return Drawing(
        title=(
            f"{algorithm.collective}, {algorithm.name} [{algorithm.source}]: "
            f"{_count(size, 'rank')}, {_count(chunks, 'chunk')}"
        ),
        size=size,
        rounds=rounds,
        legend=ALLTOALL_LEGEND if algorithm.collective == "alltoall" else IN_PLACE_LEGEND,
        totals=[
            f"steps: {measured.steps} ({steps}, lower bound {bound.steps})",
            f"bytes sent by the busiest rank: {_bytes(measured)} ({sent}, "
            f"lower bound {_bytes(bound)})",
        ],
    )


def _formulas(algorithm: Algorithm, size: int, chunks: int) -> tuple[str, str]:
    """Return the steps and the bytes by the formula, in words; there may be none for the size."""
    try:
        cost = algorithm.cost(size, chunks)
    except ArgumentError:
        return ("no formula",) * 2
    return f"formula {cost.steps}", f"formula {_bytes(cost)}"


def label(message: Message) -> str:
    """Return what a message carries, and what becomes of it: ``"c2+"`` or ``"c0-3="``."""
    sent, received = chunk_label(message.sent), chunk_label(message.received)
    if sent != received:  # input and output are separate buffers
        return f"{sent}={received}"
    return sent + ("+" if message.reduces else "=")


def chunk_label(chunks: tuple[int, ...]) -> str:
    """Return the chunks in short form: ``"c2"``, ``"c0-3"``, ``"c6-7,0"``."""
    runs = contiguous_runs(chunks)
    return "c" + ",".join(f"{a}" if a + 1 == b else f"{a}-{b - 1}" for a, b in runs)


def draw_text(
    algorithm: Algorithm, size: int, *, segments: int | None = None, width: int = 96
) -> str:
    """Return the diagram as text, a line a step, at most `width` columns wide.

    Each sender has a column of its own as long as they fit; else the messages of a step follow
    one another, over several lines.  Arguments and errors otherwise as for `plan`.
    """
    drawing = plan(algorithm, size, segments)
    cells = [[_sentence(message) for message in row] for row in drawing.rounds]
    column = max((len(cell) for row in cells for cell in row), default=0) + 3
    column = max(column, len(f"from {size - 1}") + 3)
    a_line = max(1, (width - len("step   ")) // column)
    lines = [drawing.title, ""]
    if drawing.rounds and size <= a_line:
        heads = "".join(f"{f'from {rank}':<{column}}" for rank in range(size))
        lines.append(f"step   {heads}".rstrip())
        for number, row in enumerate(drawing.rounds, start=1):
            by_sender = {m.source: cell for m, cell in zip(row, cells[number - 1], strict=True)}
            line = "".join(f"{by_sender.get(rank, ''):<{column}}" for rank in range(size))
            lines.append(f"{number:<7}{line}".rstrip())
    elif drawing.rounds:
        lines.append("step   messages")
        for number, row_cells in enumerate(cells, start=1):
            for first in range(0, len(row_cells), a_line):
                head = f"{number:<7}" if first == 0 else " " * 7
                part = "".join(f"{cell:<{column}}" for cell in row_cells[first : first + a_line])
                lines.append((head + part).rstrip())
    else:
        lines.append("one rank has nothing to send")
    return "\n".join([*lines, "", drawing.legend, *drawing.totals])


# Pixels of the SVG: the left margin, the distance of two ranks, the height of a step and of a line.
_LEFT, _GAP, _STEP, _LINE = 70, 120, 66, 20
_TOP, _MIN_WIDTH = 76, 700


def draw_svg(algorithm: Algorithm, size: int, *, segments: int | None = None) -> str:
    """Return the diagram as one self-contained SVG: ranks side by side, time downward.

    Arguments and errors as for `plan`.
    """
    drawing = plan(algorithm, size, segments)
    bottom = _TOP + _STEP * len(drawing.rounds)
    width = max(_MIN_WIDTH, _LEFT + _GAP * size)
    height = bottom + _LINE * (len(drawing.totals) + 3)
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width} {height}",
            "width": str(width),
            "height": str(height),
            "font-family": "Helvetica, Arial, sans-serif",
            "font-size": "12",
        },
    )
    ET.SubElement(svg, "title").text = drawing.title
    _rectangle(svg, (0, 0, width, height), "#ffffff")
    _text(svg, (20, 28), drawing.title, {"font-size": "16", "font-weight": "bold"})
    for number in range(len(drawing.rounds)):
        top = _TOP + _STEP * number
        if number % 2 == 0:
            _rectangle(svg, (0, top, width, _STEP), "#f4f5f7")
        _text(svg, (16, top + _STEP // 2 + 4), f"step {number + 1}", {"fill": "#555555"})
    for rank in range(size):
        x = _x(rank)
        _text(svg, (x, _TOP - 14), f"rank {rank}", {"text-anchor": "middle"})
        _line(svg, (x, _TOP - 6), (x, bottom + 6), {"stroke": "#9aa0a6", "stroke-width": "1.5"})
    for draw in (_message, _label):  # labels last, so that no arrow crosses them
        for number, row in enumerate(drawing.rounds):
            for message in row:
                draw(svg, message, _TOP + _STEP * number)
    _key(svg, bottom + 2 * _LINE)
    for number, line in enumerate(drawing.totals, start=3):
        _text(svg, (20, bottom + _LINE * number), line, {})
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


def _x(rank: int) -> int:
    return _LEFT + _GAP // 2 + _GAP * rank


def _colour(chunk: int) -> str:
    """Return a colour such that neighbouring chunks differ: hues a golden angle apart."""
    red, green, blue = colorsys.hls_to_rgb(0.6 + chunk * 0.381966 % 1.0, 0.40, 0.70)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _ends(message: Message, top: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (_x(message.source), top + 8), (_x(message.destination), top + _STEP - 8)


def _message(svg: ET.Element, message: Message, top: int) -> None:
    """Draw one message as an arrow through its step."""
    group = ET.SubElement(svg, "g", {"class": "message"})
    ET.SubElement(group, "title").text = _sentence(message)
    _arrow(group, *_ends(message, top), _colour(message.sent[0]), reduces=message.reduces)


def _label(svg: ET.Element, message: Message, top: int) -> None:
    """Write what the message carries on its arrow, near the sender, which has but one a step."""
    (x1, y1), (x2, y2) = _ends(message, top)
    x = x1 + (36 if x2 > x1 else -36)
    y = y1 + round((y2 - y1) * 36 / abs(x2 - x1))
    text = label(message)
    half = 4 + 7 * len(text) // 2
    group = ET.SubElement(svg, "g", {"class": "label"})
    _rectangle(group, (x - half, y - 8, 2 * half, 16), "#ffffff")
    style = {"fill": _colour(message.sent[0]), "text-anchor": "middle", "font-weight": "bold"}
    _text(group, (x, y + 4), text, style)


def _arrow(
    parent: ET.Element, start: tuple[int, int], end: tuple[int, int], colour: str, *, reduces: bool
) -> None:
    """Draw a solid arrow with a filled head (reduce), or a dashed one with an open head (store)."""
    style = {"stroke": colour, "stroke-width": "2"}
    _line(parent, start, end, style if reduces else {**style, "stroke-dasharray": "6 4"})
    across, down = end[0] - start[0], end[1] - start[1]
    length = (across**2 + down**2) ** 0.5
    across_1, down_1 = across / length, down / length
    corners = [
        (end[0] - 11 * across_1 - side * 5 * down_1, end[1] - 11 * down_1 + side * 5 * across_1)
        for side in (-1, 1)
    ]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (corners[0], end, corners[1]))
    head = {"points": points, "stroke": colour, "stroke-width": "1.5"}
    ET.SubElement(parent, "polygon", {**head, "fill": colour if reduces else "#ffffff"})


def _key(svg: ET.Element, y: int) -> None:
    """Draw the legend in one line."""
    for x, reduces, meaning in (
        (20, True, "+ the receiver reduces"),
        (230, False, "= the receiver stores"),
    ):
        group = ET.SubElement(svg, "g", {"class": "key"})
        _arrow(group, (x, y - 4), (x + 42, y - 4), "#555555", reduces=reduces)
        _text(group, (x + 50, y), meaning, {})
    _text(svg, (440, y), "colour: the first chunk in the message", {})


def _text(parent: ET.Element, at: tuple[int, int], text: str, style: dict[str, str]) -> None:
    ET.SubElement(parent, "text", {"x": str(at[0]), "y": str(at[1]), **style}).text = text


def _line(
    parent: ET.Element, start: tuple[int, int], end: tuple[int, int], style: dict[str, str]
) -> None:
    ends = {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1]}
    ET.SubElement(parent, "line", {**{key: str(value) for key, value in ends.items()}, **style})


def _rectangle(parent: ET.Element, box: tuple[int, int, int, int], fill: str) -> None:
    keys = ("x", "y", "width", "height")
    sides = {key: str(value) for key, value in zip(keys, box, strict=True)}
    ET.SubElement(parent, "rect", {**sides, "fill": fill})


def _sentence(message: Message) -> str:
    return f"{message.source}→{message.destination} {label(message)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _bytes(cost: Cost) -> str:
    fraction = cost.sent_fraction
    if fraction.denominator == 1:
        return {0: "0", 1: "n"}.get(fraction.numerator, f"{fraction.numerator}n")
    return f"{fraction.numerator if fraction.numerator != 1 else ''}n/{fraction.denominator}"
