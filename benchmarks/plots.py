"""The figures as plots: curves over the size, with bands, and bars where there is one size.

A plot is drawn in one of two styles: on white, for PNG files; or in the colour of the text around
it, on nothing, as SVG that is part of a page and readable on light and on dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from PIL import Image
from records import BUCKET, DEFAULT, OURS, PEER, ROOF, TUNED, Result
from tables import human_size, human_time, sizes_of

#: Stands for the colour of the text around, in SVG; no other element has it.
INK = "#010203"

#: Of a predicted curve: what a cost model or a simulation says, beside what was measured.
PREDICTED = "predicted"

LINES = {OURS: "-", PEER: "--", ROOF: "-", PREDICTED: ":"}

#: Draws into an empty figure.
Draw = Callable[[Figure], None]


@dataclass(frozen=True)
class Series:
    """A curve.

    Args:
        name: for the legend.
        x: bytes.
        y: seconds, or bytes a second.
        low, high: the band, of the same unit; empty for none.
        kind: OURS, PEER, ROOF or PREDICTED.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    kind: str = OURS


def times_of(results: Sequence[Result], x: Callable[[Result], float]) -> list[Series]:
    """Return a curve of seconds for each candidate, with the middle half of its turns as band."""
    found = []
    for name in dict.fromkeys(r.name for r in results):
        rows = sorted((r for r in results if r.name == name), key=x)
        columns = zip(*((x(r), r.seconds, r.low, r.high) for r in rows), strict=True)
        found.append(Series(name, *columns, kind=rows[0].kind))
    return found


def bandwidths_of(times: Sequence[Series], factor: float) -> list[Series]:
    """Return the bus bandwidths of curves of seconds over the message's bytes."""

    def inverted(bytes_: Sequence[float], seconds: Sequence[float]) -> list[float]:
        return [factor * n / s for n, s in zip(bytes_, seconds, strict=bool(seconds))]

    return [
        Series(s.name, s.x, inverted(s.x, s.y), inverted(s.x, s.high), inverted(s.x, s.low), s.kind)
        for s in times
    ]


def draw_curves(axes: Axes, series: Sequence[Series], *, unit: Callable[[float], str]) -> None:
    """Draw curves on logarithmic axes: ours, peers dashed, roofs in ink, predicted dotted.

    A predicted curve has the colour of the measured one of the same name.
    """
    names = [s.name for s in series if s.kind != ROOF]
    colours = {name: f"C{number % 10}" for number, name in enumerate(dict.fromkeys(names))}
    roofs = [s.name for s in series if s.kind == ROOF]
    for s in series:
        colour = colours.get(s.name, INK)
        style: object = LINES[s.kind]
        if s.kind == ROOF and roofs.index(s.name):
            style = (0, (6, 2))
        label = f"{s.name}, predicted" if s.kind == PREDICTED else s.name
        width = 2.2 if s.kind == ROOF else 1.5
        marker = "o" if s.kind in (OURS, PEER) else ""
        axes.plot(s.x, s.y, ls=style, color=colour, lw=width, marker=marker, ms=3, label=label)
        if len(s.low):
            axes.fill_between(s.x, s.low, s.high, color=colour, alpha=0.18, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({x for s in series for x in s.x})
    axes.set_xticks(sizes, [human_size(int(x)) for x in sizes], rotation=45, ha="right")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: unit(y)))
    bottom, top = axes.get_ylim()
    few = top < 20 * bottom  # so few powers of ten that what is between needs names as well
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: unit(y)) if few else NullFormatter())
    axes.grid(alpha=0.25)


def plain_time(seconds: float) -> str:
    """Return ``"100 us"``, for the ticks of an axis."""
    scale, unit = (
        (1e-6, "us") if seconds < 999e-6 else (1e-3, "ms") if seconds < 0.999 else (1, "s")
    )
    return f"{seconds / scale:g} {unit}"


def over_size(results: Sequence[Result], predicted: Sequence[Series] = ()) -> Draw:
    """Return a plot of time and bus bandwidth over the size.

    Args:
        results: of one measurement.
        predicted: curves of seconds over bytes, of kind PREDICTED, to be drawn beside.
    """
    times = [*times_of(results, lambda r: r.nbytes), *predicted]
    largest = max(results, key=lambda r: r.nbytes)

    def draw(figure: Figure) -> None:
        figure.set_size_inches(10.5, 4.4)
        left, right = figure.subplots(1, 2)
        draw_curves(left, times, unit=plain_time)
        left.set_ylabel("time")
        factor = 1.0 if largest.busbw is None else largest.busbw / largest.algbw
        draw_curves(right, bandwidths_of(times, factor), unit=lambda y: f"{y / 1e9:g}")
        right.set_ylabel("algbw, GB/s" if largest.busbw is None else "busbw, GB/s")
        figure.suptitle(title_of(largest))
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)

    return draw


def over_bucket(results: Sequence[Result]) -> Draw:
    """Return a plot of a step's communication over the bucket's size, the peers as levels."""
    chosen = (DEFAULT, TUNED)
    mine = [r for r in results if r.notes.get(BUCKET, 0) > 0 and r.name not in chosen]

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7.5, 4.0)
        axes = figure.subplots()
        curve = replace_name(times_of(mine, lambda r: r.notes[BUCKET]), "hvdkit, in buckets")
        ends = (min(curve.x), max(curve.x))
        levels = [
            Series(r.name, ends, (r.seconds,) * 2, (r.low,) * 2, (r.high,) * 2, r.kind)
            for r in results
            if r not in mine
        ]
        draw_curves(axes, [curve, *levels], unit=plain_time)
        axes.set_xlabel("bytes of a bucket, at most")
        axes.set_ylabel("time of all gradients")
        axes.set_title(title_of(results[0]))
        figure.legend(loc="outside right center", fontsize=8, frameon=False)

    return draw


def replace_name(parts: Sequence[Series], name: str) -> Series:
    """Return the points of several series as one, in the order of x."""
    points = sorted(point for s in parts for point in zip(s.x, s.y, s.low, s.high, strict=True))
    return Series(name, *zip(*points, strict=True), kind=parts[0].kind)


def bars(results: Sequence[Result]) -> Draw:
    """Return a plot of the times at one size, the fastest on top; whiskers: the middle half."""
    rows = sorted(results, key=lambda r: -r.seconds)

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7.5, 1.1 + 0.32 * len(rows))
        axes = figure.subplots()
        colours = [{OURS: "C0", PEER: "C7"}.get(r.kind, "C1") for r in rows]
        off = np.array([[r.seconds - r.low, r.high - r.seconds] for r in rows]).T
        axes.barh([r.name for r in rows], [r.seconds for r in rows], color=colours)
        axes.errorbar(
            [r.seconds for r in rows], range(len(rows)), xerr=off, fmt="none", ecolor=INK, lw=1
        )
        for number, r in enumerate(rows):
            axes.annotate(
                human_time(r.seconds),
                (r.high, number),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        if max(r.seconds for r in rows) > 20 * min(r.seconds for r in rows):
            axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: plain_time(x)))
        axes.set_title(f"{title_of(rows[0])}, {human_size(rows[0].nbytes)}")

    return draw


def plot_of(results: Sequence[Result], predicted: Sequence[Series] = ()) -> Draw:
    """Return the plot that fits the results of one measurement."""
    if any(BUCKET in r.notes for r in results):
        return over_bucket(results)
    return over_size(results, predicted) if len(sizes_of(results)) > 1 else bars(results)


def title_of(result: Result) -> str:
    return f"{result.what}, {result.ranks} ranks, {result.mpi}"


def save_png(draw: Draw, path: Path, *, dpi: int = 100) -> None:
    """Write a plot on white, in few colours, which makes the file a third as large."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(layout="constrained")
        draw(figure)
        written = io.BytesIO()
        figure.savefig(written, dpi=dpi)
    Image.open(written).convert("RGB").quantize(64).save(path, optimize=True)


def as_svg(draw: Draw, name: str) -> str:
    """Return a plot as an element of a page, in the page's own colour; it refers to nothing.

    Args:
        draw: what to draw.
        name: unique on the page, as then the plot's inner names are.
    """
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = dict.fromkeys(ink, INK) | {"svg.fonttype": "none", "font.family": "sans-serif"}
    style |= {"grid.color": INK, "axes.facecolor": "none", "figure.facecolor": "none"}
    with mpl.rc_context(style | {"font.size": 9, "svg.hashsalt": name}):
        figure = Figure(layout="constrained")
        draw(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    for unwanted in (
        r"<metadata>.*?</metadata>",
        r"<style.*?</style>",  # would be the whole page's; it has the one of these that matters
        r' xmlns(:\w+)?="[^"]*"',
        r' id="[A-Za-z_0-9.]*_\d+"',  # which nothing refers to, and every plot has
        r'(?<=<svg) (width|height)="[^"]*"',
    ):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    return svg.replace("xlink:href", "href").replace(INK, "currentColor")
