"""All figures as one page that needs nothing else, and the plots as PNG files.

    python benchmarks/report.py [results] [--against OLD] [--images FOLDER]

FOLDER/report.html has the machine, the versions and the dates, and for every measurement its plot,
the ratios to the peers, the percentage of the roofs and, folded, all figures.  With --against the
page says first what is slower or faster than in an earlier report, beyond the noise.  --images
writes the plots that the README shows, and nothing else.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import compare
import predictions
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from plots import Series, as_svg, plot_of, save_png, title_of
from records import OURS, PEER, ROOF, ReportError, Result, Run, load
from tables import by_measurement, gigabytes, human_range, human_size, human_time, sizes_of

from hvdkit.errors import ConfigError
from hvdkit.schedules.registry import ALGORITHMS
from hvdkit.tuning import Tuning

#: What is shown first, and under which title; the others follow.
TITLES = {
    "allreduce": "All-reduce",
    "collectives": "Other collectives",
    "dtypes": "Dtypes and operations",
    "step": "A training step's communication",
    "bucketing": "Buckets",
    "compression": "Compression",
    "hosts": "Between hosts",
    "torch": "PyTorch",
    "tensorflow": "TensorFlow",
    "pipeline": "Pipelines",
}

#: The plots that the README and the docs show: benchmark, measurement, ranks, name of the file.
README_PLOTS = (
    ("allreduce", "allreduce", 2, "allreduce-2-ranks"),
    ("allreduce", "allreduce", 4, "allreduce-4-ranks"),
    ("bucketing", "gradients of ResNet-50, width 0.5", 2, "bucketing-2-ranks"),
    ("hosts", "allreduce, 2 x 2 ranks, 1 Gbit/s, over MPI", 4, "hosts-2-x-2-ranks"),
)


@dataclass(frozen=True)
class Table:
    """Rows of text.  `best` has the numbers of rows to be marked, `bad` cells that are warnings."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False
    best: Sequence[int] = ()
    bad: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """A plot, as `plots.as_svg` makes it, and tables."""

    title: str = ""
    text: str = ""
    svg: Markup = field(default_factory=Markup)
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Section:
    """A heading of the page."""

    title: str
    parts: Sequence[Part]
    text: str = ""


def sections_of(
    runs: Iterable[Run], predicted: dict[tuple[str, int], Sequence[Series]] | None = None
) -> list[Section]:
    """Return a section for each benchmark.

    Args:
        runs: what `records.load` gives.
        predicted: by measurement and number of ranks, curves to be drawn beside the measured ones.
    """
    parts: dict[str, list[Part]] = {}
    for run in runs:
        for some in by_measurement(run.results):
            beside = (predicted or {}).get((some[0].what, some[0].ranks), ())
            part = replace(part_of(some, beside), text=run.date)
            parts.setdefault(run.benchmark, []).append(part)
    order = [*TITLES, *sorted(parts.keys() - TITLES)]
    return [Section(TITLES.get(name, name), parts[name]) for name in order if name in parts]


def part_of(results: Sequence[Result], predicted: Sequence[Series] = ()) -> Part:
    """Return the plot and the tables of one measurement."""
    tables = [all_figures(results, folded=len(sizes_of(results)) > 1)]
    if len(sizes_of(results)) > 1:
        tables.insert(0, fastest(results))
    choices = predictions.choices_of(results)
    if choices:
        head = ["size", "fastest, measured", "fastest, predicted", "its time over the least"]
        tables.insert(-1, Table(head, choices))
    crossings = predictions.crossings_of(results)
    if crossings:
        head = ["faster short", "faster long", "from, measured", "from, predicted", "over measured"]
        tables.insert(-1, Table(head, crossings))
    title = title_of(results[0])
    return Part(title, svg=Markup(as_svg(plot_of(results, predicted), title)), tables=tables)


def fastest(results: Sequence[Result]) -> Table:
    """Return by size the fastest of ours, over each peer and in percent of each roof."""
    names = {kind: _names(results, kind) for kind in (PEER, ROOF)}
    head = ["size", "fastest", "time", "busbw, GB/s"]
    head += [f"x {name}" for name in names[PEER]] + [f"% of {name}" for name in names[ROOF]]
    rows = []
    for nbytes in sizes_of(results):
        at = {r.name: r for r in results if r.nbytes == nbytes}
        mine = [r for r in at.values() if r.kind == OURS]
        if mine:
            best = min(mine, key=lambda r: r.seconds)
            row = [human_size(nbytes), best.name, human_time(best.seconds), gigabytes(best.busbw)]
            rows.append(row + _against(best, at, names))
    return Table([*head, "#wrong"], [[*row, _wrong(results, row[0])] for row in rows])


def all_figures(results: Sequence[Result], *, folded: bool) -> Table:
    """Return every figure, the fastest of each size first."""
    names = {kind: _names(results, kind) for kind in (PEER, ROOF)}
    notes = list(dict.fromkeys(note for r in results for note in r.notes))
    head = ["size", "", "time", "middle half", "95 % interval", "algbw, GB/s", "busbw, GB/s"]
    head += ["#wrong", *(f"x {name}" for name in names[PEER])]
    head += [*(f"% of {name}" for name in names[ROOF]), *notes]
    rows, best = [], []
    for nbytes in sizes_of(results):
        at = {r.name: r for r in results if r.nbytes == nbytes}
        best.append(len(rows))
        for r in sorted(at.values(), key=lambda r: r.seconds):
            row = [human_size(nbytes), r.name, human_time(r.seconds)]
            row += [human_range(r.low, r.high), human_range(*r.interval)]
            row += [gigabytes(r.algbw), gigabytes(r.busbw), _errors(r.wrong)]
            row += _against(r, at, names)
            rows.append([*row, *(f"{r.notes[n]:.3g}" if n in r.notes else "" for n in notes)])
    bad = [row[7] for row in rows if row[7] != "0"]
    return Table(head, rows, "all figures", folded=folded, best=best, bad=bad)


def _names(results: Sequence[Result], kind: str) -> list[str]:
    return list(dict.fromkeys(r.name for r in results if r.kind == kind))


def _against(r: Result, at: dict[str, Result], names: dict[str, list[str]]) -> list[str]:
    """Return how many times as fast as each peer, and the percentage of each roof."""
    cells = [f"{at[n].seconds / r.seconds:.2f}" if n in at else "" for n in names[PEER]]
    percent = [f"{100 * at[n].seconds / r.seconds:.0f} %" if n in at else "" for n in names[ROOF]]
    return cells + percent


def _wrong(results: Sequence[Result], size: str) -> str:
    return str(sum(r.wrong for r in results if human_size(r.nbytes) == size))


def _errors(wrong: int) -> str:
    return f"{wrong} wrong" if wrong else "0"


def compared(old: Iterable[Run], new: Iterable[Run]) -> Section:
    """Return what is slower or faster than in an earlier report, beyond the noise."""
    found = compare.changes(compare.figures_of(old), compare.figures_of(new))
    marked = [c for c in found if c.verdict in ("slower", "faster")]
    rows = [
        [
            ", ".join([c.new.what, c.new.name, human_size(c.new.nbytes), f"{c.new.ranks} ranks"]),
            human_time(c.old.seconds),
            human_time(c.new.seconds),
            c.peer,
            f"{c.ratio:.2f}",
            "regression" if c.verdict == "slower" else "faster",
        ]
        for c in sorted(marked, key=lambda c: -c.ratio)
    ]
    head = ["", "before", "now", "over", "now / before", ""]
    text = f"{len(found)} figures are in both reports; {len(marked)} differ beyond the noise."
    return Section("Changes", [Part(tables=[Table(head, rows, bad=["regression"])])], text)


def simulator(runs: Iterable[Run], known: Sequence[Tuning]) -> list[Section]:
    """Return by how much ``hvdkit simulate`` is off where ranks were measured and tuned."""
    parts = []
    for run in runs:
        for some in by_measurement(run.results):
            estimates = predictions.estimates_of(some, known)
            if some[0].what in ALGORITHMS and estimates is not None:
                rows = predictions.errors_of(some, estimates)
                if rows:
                    table = Table(predictions.heads_of(some), rows)
                    parts.append(Part(title_of(some[0]), tables=[table]))
    text = (
        "The schedules as hvdkit simulate plays them, with what hvdkit tune has fitted, against "
        "what was measured: +10 % says that the simulation is 10 % longer.  On more ranks than "
        "cores ranks wait for cores, of which the simulation knows nothing."
    )
    return [Section("Simulated and measured", parts, text)] if parts else []


def render(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    """Return the page."""
    settings: dict[str, str] = {}
    for title in ("machine", "versions"):
        for name in dict.fromkeys(n for run in runs for n in getattr(run, title)):
            found = dict.fromkeys(getattr(run, title).get(name, "") for run in runs)
            settings[name] = ", ".join(text for text in found if text)
    days = sorted({run.date for run in runs})
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    return page.render(dates=dates, settings=settings.items(), sections=sections)


def save_images(runs: Iterable[Run], folder: Path) -> None:
    """Write the plot of every measurement."""
    for run in runs:
        for some in by_measurement(run.results):
            name = f"{run.benchmark}-{some[0].what}-{some[0].ranks}-ranks-{some[0].mpi}"
            save_png(plot_of(some), folder / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}.png")


def save_readme_images(runs: Sequence[Run], folder: Path) -> list[str]:
    """Write the plots that the README shows; return those for which there are no figures."""
    missing = []
    for benchmark, what, ranks, name in README_PLOTS:
        found = [r for run in runs if run.benchmark == benchmark for r in run.results]
        some = [r for r in found if (r.what, r.ranks) == (what, ranks)]
        if some:
            first = by_measurement(some)[0]
            draw = plot_of(first, predictions.noted(first))
            save_png(draw, folder / f"{name}.png", dpi=90)
        else:
            missing.append(f"{what} on {ranks} ranks")
    return missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("--against", type=Path, metavar="OLD", help="earlier figures, to compare")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="only the README's plots")
    args = parser.parse_args()
    try:
        runs = load(args.folder)
        old = load(args.against) if args.against else []
        known = predictions.tunings()
    except (ReportError, ConfigError) as exc:
        print(exc, file=sys.stderr)
        return 2
    if args.images:
        missing = save_readme_images(runs, args.images)
        print(f"no figures for: {'; '.join(missing)}" if missing else f"plots in {args.images}")
        return int(bool(missing))
    sections = [compared(old, runs)] * bool(old)
    sections += sections_of(runs, predictions.predicted(runs, known)) + simulator(runs, known)
    page = args.folder / "report.html"
    page.write_text(render(runs, sections))
    save_images(runs, args.folder)
    print(f"{page}, {len(runs)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
