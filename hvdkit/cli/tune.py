"""``hvdkit tune``: measure the machine, so that ``algorithm="auto"`` is right on it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hvdkit import api
from hvdkit.config import NO_TUNING
from hvdkit.errors import ArgumentError, ConfigError
from hvdkit.schedules.machine import Level
from hvdkit.tuner import tune
from hvdkit.tuning.file import COMMAND, default_path, load, save
from hvdkit.tuning.fit import Fit
from hvdkit.tuning.measure import TURNS
from hvdkit.tuning.record import Levels, Tuning

_VARIABLE = "HVDKIT_TUNING_FILE"

_HEADS = "auto picks               time   over fastest    MPI's own"


def add_parser(commands: Any) -> None:
    """Add ``tune`` to the commands."""
    parser = commands.add_parser(
        "tune",
        help="measure this machine, so that algorithm='auto' is right on it",
        description="Measure what messages and shared memory cost here, and which algorithm, "
        "segment and bucket are the best, for jobs of as many ranks on these nodes.  Start it as "
        f"a job: {COMMAND.format(ranks='N')}.  What is found goes to a file that init() reads on "
        "rank 0: the one that HVDKIT_TUNING_FILE names, or else hvdkit/tuning.json in "
        "$XDG_CONFIG_HOME or ~/.config.",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write here instead")
    parser.add_argument(
        "--turns", type=int, default=TURNS, help=f"of each candidate (default {TURNS})"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, and write the file on rank 0.  Collective.

    Raises:
        ArgumentError: there is one rank only, or too few turns.
        ConfigError: the file that is to be written to is none of hvdkit's.
    """
    if args.turns < 1:
        raise ArgumentError(f"--turns {args.turns}: expected 1 or more")
    path = _path(args.out, os.environ)
    os.environ[_VARIABLE] = str(NO_TUNING)  # what is there already must not change what is measured
    api.init()
    world = api.context().world
    if world.size == 1:
        raise ArgumentError(f"one rank has nothing to choose; start it as {_command()}")
    others = _others(path)
    tuning, fits = tune(api.context(), _progress(world.rank), turns=args.turns)
    if world.rank == 0:
        save(path, tuning, others)
        print(f"\n{_describe(tuning, fits)}\nwrote {path}")
    api.shutdown()
    return 0


def _others(path: Path) -> tuple[Tuning, ...]:
    """Return what the file has, to which the new entry is added.  Collective.

    Raises:
        ConfigError: on every rank, if it is none of hvdkit's: before anything is measured.
    """
    world = api.context().world
    others: tuple[Tuning, ...] = ()
    trouble = ""
    if world.rank == 0:
        try:
            others = load(path) if path.exists() else ()
        except ConfigError as exc:
            trouble = str(exc)
    trouble = world.broadcast_object(trouble, 0)
    if trouble:
        raise ConfigError(trouble)
    return others


def _path(out: Path | None, environ: Mapping[str, str]) -> Path:
    if out is not None:
        return out
    named = environ.get(_VARIABLE, "")
    return Path(named) if named and Path(named) != NO_TUNING else default_path(environ)


def _command() -> str:
    return COMMAND.format(ranks="N")


def _progress(rank: int) -> Callable[[str], None]:
    """Return what shows what is measured next, on rank 0."""

    def say(what: str) -> None:
        if rank == 0:
            end = "\033[K\r" if sys.stderr.isatty() else "\n"
            print(f"measuring {what}", end=end, file=sys.stderr, flush=True)

    return say


def _describe(tuning: Tuning, fits: Mapping[str, Fit]) -> str:
    """Return what was found, for people."""
    lines = ["            alpha, us          beta, ns/KB        gamma, ns/KB       fits within"]
    for name, found in fits.items():
        figures = "".join(
            f"{_figure(found, part, scale):<19}"
            for part, scale in (("alpha", 1e6), ("beta", 1e12), ("gamma", 1e12))
        )
        lines.append(f"  {name:<10}{figures}{100 * found.error:.0f} %")
    lines += ["", f"alphas of a message beside another one: {_at_once(tuning.levels, fits)}"]
    for kind in tuning.grid:
        lines += ["", f"{kind:<15}{_HEADS}", *_rows(kind)]
    segments = ", ".join(f"{n:,}: {segment:,}" for n, segment in tuning.segments)
    lines += ["", f"bytes of a segment, by bytes of the message: {segments}"]
    lines += [f"bytes of a bucket: {tuning.bucket_bytes:,}"]
    return "\n".join(lines)


def _at_once(levels: Levels, fits: Mapping[str, Fit]) -> str:
    known = {"within": levels.within, "across": levels.across}
    return ", ".join(f"{name} {known[name].at_once:.2g}" for name in known if name in fits)


def _figure(found: Fit, part: str, scale: float) -> str:
    value, margin = (getattr(level, part) * scale for level in _both(found))
    return f"{value:.3g} +- {margin:.2g}"


def _both(found: Fit) -> tuple[Level, Level]:
    return found.level, found.margin


def _rows(kind: str) -> list[str]:
    """Return a line a size: what auto takes, against the fastest, and the MPI library's own."""
    tuning = api.context().tuning
    assert tuning is not None
    grid = tuning.grid[kind]
    rows = []
    for nbytes in sorted({cell.nbytes for cells in grid.values() for cell in cells}):
        times = {
            name: cell.seconds
            for name, cells in grid.items()
            for cell in cells
            if cell.nbytes == nbytes
        }
        library = f"{times.pop('mpi') * 1e6:>12.1f} us" if "mpi" in times else ""
        picked = api.explain(nbytes, kind).picked
        ratio = times[picked] / min(times.values())
        rows.append(
            f"{nbytes:>13,}  {picked:<20}{times[picked] * 1e6:>9.1f} us{ratio:>14.2f}{library}"
        )
    return rows
