"""A pipeline schedule's table as SVG."""

from __future__ import annotations

import colorsys
import xml.etree.ElementTree as ET

from hvdkit.parallel.pipeline.draw import Drawing, number
from hvdkit.parallel.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
)
from hvdkit.parallel.pipeline.simulate import Slot

# Pixels of the SVG: the margin left of time 0, the height of a row and of a line of text.
_LEFT, _ROW, _LINE, _TOP, _MIN_WIDTH = 70, 34, 20, 76, 700

# Hue and saturation of each kind; chunks differ in lightness.
_HUES: dict[type[Instruction], tuple[float, float]] = {
    Forward: (0.60, 0.62),
    Backward: (0.40, 0.45),
    BackwardInput: (0.49, 0.55),
    BackwardWeight: (0.09, 0.75),
}

_MEANINGS: dict[type[Instruction], str] = {
    Forward: "forward",
    Backward: "backward",
    BackwardInput: "gradient of the input",
    BackwardWeight: "gradient of the weights",
}


def draw_svg(drawing: Drawing) -> str:
    """Return the table as one self-contained SVG: a row a rank, time across."""
    scale = _scale(drawing)
    right = _LEFT + drawing.columns(drawing.timeline.makespan) * scale
    bottom = _TOP + _ROW * drawing.ranks
    width, height = max(_MIN_WIDTH, right + 20), bottom + _LINE * (len(drawing.totals) + 4)
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
    _time_axis(svg, drawing, scale)
    for rank, slots in enumerate(drawing.timeline.rows):
        top = _TOP + _ROW * rank
        _text(svg, (16, top + _ROW // 2 + 4), f"rank {rank}", {"fill": "#555555"})
        _rectangle(svg, (_LEFT, top + 2, right - _LEFT, _ROW - 4), "#eceef1")
        for slot in slots:
            _box(svg, drawing, slot, (scale, top + 2))
    _key(svg, drawing, bottom)
    for line, total in enumerate(drawing.totals, start=3):
        _text(svg, (20, bottom + _LINE * line), total, {})
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


def _scale(drawing: Drawing) -> int:
    """Return the fewest pixels a unit with which every microbatch's number fits into its box."""

    def needed(slot: Slot) -> int:
        pixels = 8 * len(str(slot.instruction.microbatch)) + 12
        return -(-pixels // drawing.columns(slot.end - slot.start))

    return max(needed(slot) for row in drawing.timeline.rows for slot in row)


def _time_axis(svg: ET.Element, drawing: Drawing, scale: int) -> None:
    step = -(-60 // scale)
    for column in range(0, drawing.columns(drawing.timeline.makespan) + 1, step):
        x = _LEFT + column * scale
        style = {"text-anchor": "middle", "fill": "#555555", "font-size": "11"}
        _text(svg, (x, _TOP - 12), number(column * drawing.unit), style)
        _rectangle(svg, (x, _TOP - 8, 1, 8), "#9aa0a6")


def _box(svg: ET.Element, drawing: Drawing, slot: Slot, at: tuple[int, int]) -> None:
    """Draw one instruction; its name and times show where a pointer rests on it."""
    scale, top = at
    start, end = drawing.columns(slot.start), drawing.columns(slot.end)
    chunk = slot.instruction.stage // drawing.ranks
    fill, ink = _colours(type(slot.instruction), chunk)
    group = ET.SubElement(svg, "g", {"class": type(slot.instruction).__name__})
    tip = f"{slot.instruction}, {number(slot.start)} to {number(slot.end)}"
    ET.SubElement(group, "title").text = tip
    x = _LEFT + start * scale
    _rectangle(group, (x, top, (end - start) * scale - 1, _ROW - 4), fill)
    middle = (x + (end - start) * scale // 2, top + _ROW // 2 + 2)
    _text(group, middle, str(slot.instruction.microbatch), {"text-anchor": "middle", "fill": ink})


def _colours(kind: type[Instruction], chunk: int) -> tuple[str, str]:
    """Return the colour of a box and of the number in it; later chunks are lighter."""
    hue, saturation = _HUES[kind]
    lightness = 0.86 - 0.44 * 0.62**chunk
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
    fill = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
    return fill, "#ffffff" if chunk == 0 else "#1f2328"


def _key(svg: ET.Element, drawing: Drawing, bottom: int) -> None:
    """Draw the legend in one line: each kind, with a shade a chunk."""
    instructions = [slot.instruction for row in drawing.timeline.rows for slot in row]
    kinds = {type(instruction) for instruction in instructions}
    chunks = 1 + max(instruction.stage for instruction in instructions) // drawing.ranks
    x = 20
    for kind, meaning in _MEANINGS.items():
        if kind not in kinds:
            continue
        group = ET.SubElement(svg, "g", {"class": "key"})
        for chunk in range(chunks):
            _rectangle(group, (x, bottom + 22, 14, 14), _colours(kind, chunk)[0])
            x += 14
        text = meaning if chunks == 1 else f"{meaning}, chunk 0 to {chunks - 1}"
        _text(group, (x + 6, bottom + 33), text, {})
        x += 30 + 7 * len(text)


def _text(parent: ET.Element, at: tuple[int, int], text: str, style: dict[str, str]) -> None:
    ET.SubElement(parent, "text", {"x": str(at[0]), "y": str(at[1]), **style}).text = text


def _rectangle(parent: ET.Element, box: tuple[int, int, int, int], fill: str) -> None:
    keys = ("x", "y", "width", "height")
    sides = {key: str(value) for key, value in zip(keys, box, strict=True)}
    ET.SubElement(parent, "rect", {**sides, "fill": fill})
