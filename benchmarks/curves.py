"""The figures of docs/algorithms.md: each algorithm as a picture, and measured beside predicted.

    mpirun -n 4 python benchmarks/curves.py --images docs/images [--sizes 4 1MiB] [--out FILE.json]

Every algorithm of every collective takes turns with the others at each size; predicted is what
hvdkit's closed forms say, with what ``hvdkit tune`` has fitted on as many ranks of this machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import measuring
import numpy as np
import options
import predictions
from allreduce import can_be_had
from allreduce import ours as ours_of_allreduce
from collectives import COLLECTIVES, candidate, ours
from matplotlib.figure import Figure
from measuring import Candidate
from options import Choice
from plots import draw_curves, plain_time, save_png, times_of
from records import Result, Run

import hvdkit as hvd
from hvdkit.schedules.draw import draw_svg
from hvdkit.schedules.hierarchical import hierarchical
from hvdkit.schedules.registry import ALGORITHMS, Algorithm

SIZES = ["4", "256", "4KiB", "32KiB", "256KiB", "1MiB", "4MiB", "16MiB"]
SHORT_SIZES = ["4", "32KiB", "4MiB"]

#: Ranks and segments of the pictures: few enough to be read.
DRAWN_RANKS, DRAWN_SEGMENTS = 4, 2

FLOAT32 = np.dtype(np.float32)


def candidates_of(what: str) -> list[Candidate]:
    """Return every algorithm of a collective that can be had.  Collective."""
    if what == "allreduce":
        names = ["shm", "gathered", *ALGORITHMS[what]]
        return [ours_of_allreduce(name) for name in names if can_be_had(name)]
    return [candidate(name, what, FLOAT32, ours(what, name)) for name in ALGORITHMS[what]]


def draw(folder: Path) -> None:
    """Write the picture of every schedule."""
    every = [known for some in ALGORITHMS.values() for known in some.values()]
    folder.mkdir(parents=True, exist_ok=True)
    for algorithm in [*every, hierarchical(2)]:
        segments = DRAWN_SEGMENTS if algorithm.pipelined else None
        picture = draw_svg(algorithm, DRAWN_RANKS, segments=segments)
        (folder / f"draw-{file_name(algorithm)}.svg").write_text(picture, encoding="utf-8")


def file_name(algorithm: Algorithm) -> str:
    """Return the algorithm's name, with its collective's where several have one of that name."""
    others = [known for known in ALGORITHMS.values() if algorithm.name in known]
    alone = len(others) <= 1 or algorithm.collective == "allreduce"
    return algorithm.name if alone else f"{algorithm.collective}-{algorithm.name}"


def save_curves(results: Sequence[Result], folder: Path) -> None:
    """Write a plot for each algorithm, with the prediction where ranks like these were tuned."""
    run = Run("curves", "", {}, {}, tuple(results))
    known = predictions.tunings()
    for what in dict.fromkeys(r.what for r in results):
        some = [r for r in results if r.what == what]
        beside = predictions.predicted([run], known).get((what, some[0].ranks), [])
        for name in dict.fromkeys(r.name for r in some):
            mine = times_of([r for r in some if r.name == name], lambda r: r.nbytes)
            series = [*mine, *(s for s in beside if s.name == name)]

            def one(figure: Figure, series=series, title=f"{what}, {name}") -> None:
                figure.set_size_inches(4.6, 3.0)
                axes = figure.subplots()
                draw_curves(axes, series, unit=plain_time)
                axes.set_title(title)
                axes.legend(fontsize=8, frameon=False)

            save_png(one, folder / f"curve-{what}-{name}.png", dpi=80)


def main() -> None:
    parser = options.parser(__doc__, sizes=Choice(SIZES, short=SHORT_SIZES))
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER")
    args = options.start(parser)
    results = []
    for what in ("allreduce", *COLLECTIVES):
        results += measuring.run(what, args.sizes, candidates_of(what), turns=args.turns)
    if hvd.rank() == 0:
        draw(args.images)
        save_curves(results, args.images)
    measuring.keep("curves", results, args.out)
    sys.exit(any(result.wrong for result in results))


if __name__ == "__main__":
    main()
