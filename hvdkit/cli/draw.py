"""``hvdkit draw``: an algorithm or a pipeline schedule over time, in the terminal or as SVG."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from hvdkit.errors import ArgumentError
from hvdkit.parallel.pipeline import draw as pipeline
from hvdkit.parallel.pipeline import svg
from hvdkit.parallel.pipeline.instructions import Times
from hvdkit.parallel.pipeline.registry import SCHEDULES, PipelineSchedule
from hvdkit.schedules.draw import DEFAULT_SEGMENTS, draw_svg, draw_text
from hvdkit.schedules.hierarchical import hierarchical
from hvdkit.schedules.registry import ALGORITHMS, Algorithm, get

if TYPE_CHECKING:
    # argparse has no public name for the type of what add_subparsers() returns.
    from argparse import _SubParsersAction

DEFAULT_RANKS = 4
DEFAULT_RANKS_PER_NODE = 2
DEFAULT_STAGES = 4
DEFAULT_MICROBATCHES = 8
DEFAULT_CHUNKS = 2

#: The all-reduce that is one for each number of ranks a node, and so not in the registry.
HIERARCHICAL = "hierarchical"

_OF_ALGORITHMS = ("ranks", "collective", "segments", "ranks_per_node")
_DURATIONS = ("forward", "backward_input", "backward_weight")
_OF_SCHEDULES = ("stages", "microbatches", "chunks", *_DURATIONS)


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``draw`` to the subcommands of ``hvdkit``."""
    parser = subparsers.add_parser(
        "draw",
        help="draw an algorithm's messages, or a pipeline schedule, over time",
        description="Draw a collective algorithm's messages over time, with its steps and bytes "
        "against their formula and the lower bound; or a pipeline schedule, with its bubble "
        "against the formula and what each rank holds in memory.",
        epilog="algorithms and schedules:\n" + known_names(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("algorithm", help="its name, such as ring or 1f1b")
    parser.add_argument("--out", type=Path, metavar="FILE.svg", help="write an SVG here as well")
    of_algorithm = parser.add_argument_group("of a collective algorithm")
    of_algorithm.add_argument(
        "--ranks", type=int, help=f"number of ranks (default {DEFAULT_RANKS})"
    )
    of_algorithm.add_argument(
        "--collective", help="needed where several have the algorithm and allreduce is not meant"
    )
    of_algorithm.add_argument(
        "--segments", type=int, help=f"of a pipelined algorithm (default {DEFAULT_SEGMENTS})"
    )
    of_algorithm.add_argument(
        "--ranks-per-node", type=int, help=f"of {HIERARCHICAL} (default {DEFAULT_RANKS_PER_NODE})"
    )
    _add_schedule_options(parser.add_argument_group("of a pipeline schedule"))
    parser.set_defaults(run=run)


def _add_schedule_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--stages",
        type=int,
        help=f"of the pipeline, one a rank; interleaved cuts each into --chunks "
        f"(default {DEFAULT_STAGES})",
    )
    group.add_argument(
        "--microbatches", type=int, help=f"of a batch (default {DEFAULT_MICROBATCHES})"
    )
    group.add_argument(
        "--chunks", type=int, help=f"of layers a rank, of interleaved (default {DEFAULT_CHUNKS})"
    )
    for option, what in (
        ("--forward", "a stage's forward"),
        ("--backward-input", "the gradient of its input"),
        ("--backward-weight", "the gradient of its weights"),
    ):
        group.add_argument(
            option, type=duration, metavar="TIME", help=f"how long {what} takes (default 1)"
        )


def duration(text: str) -> Fraction:
    """Return a duration such as ``"2"``, ``"0.5"`` or ``"1/3"``, exactly."""
    try:
        value = Fraction(text)
    except ZeroDivisionError as exc:
        raise argparse.ArgumentTypeError(f"{text} divides by zero") from exc
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Print the diagram; with ``--out`` write the SVG too.  Local: no other rank is involved.

    Raises:
        ArgumentError: no such name, or a number that cannot be drawn, or an option that the named
            one does not have, or no such folder.
    """
    if args.algorithm in SCHEDULES:
        _refuse(args, _OF_ALGORITHMS, f"{args.algorithm} is a pipeline schedule")
        drawing = _plan_schedule(args, SCHEDULES[args.algorithm])
        print(pipeline.draw_text(drawing))
        if args.out is not None:
            _write(args.out, svg.draw_svg(drawing))
        return 0
    algorithm = find(args.algorithm, args.collective, args.ranks_per_node)
    _refuse(args, _OF_SCHEDULES, f"{args.algorithm} is a collective algorithm")
    ranks = DEFAULT_RANKS if args.ranks is None else args.ranks
    print(draw_text(algorithm, ranks, segments=args.segments))
    if args.out is not None:
        _write(args.out, draw_svg(algorithm, ranks, segments=args.segments))
    return 0


def _plan_schedule(args: argparse.Namespace, schedule: PipelineSchedule) -> pipeline.Drawing:
    chunks = DEFAULT_CHUNKS if schedule.chunked else 1
    durations = {name: getattr(args, name) for name in _DURATIONS}
    return pipeline.plan(
        schedule,
        DEFAULT_STAGES if args.stages is None else args.stages,
        DEFAULT_MICROBATCHES if args.microbatches is None else args.microbatches,
        chunks=chunks if args.chunks is None else args.chunks,
        times=Times(**{name: time for name, time in durations.items() if time is not None}),
    )


def _refuse(args: argparse.Namespace, names: tuple[str, ...], because: str) -> None:
    """Raise ArgumentError if an option of the other kind was given."""
    for name in names:
        if getattr(args, name) is not None:
            raise ArgumentError(f"{because}: leave --{name.replace('_', '-')} out")


def _write(path: Path, picture: str) -> None:
    try:
        path.write_text(picture, encoding="utf-8")
    except OSError as exc:
        raise ArgumentError(f"cannot write {path}: {exc.strerror}") from exc
    print(f"wrote {path}")


def find(name: str, collective: str | None, ranks_per_node: int | None = None) -> Algorithm:
    """Return the algorithm called `name`; all-reduce's, where several collectives have one.

    Raises:
        ArgumentError: nothing is called so, and the message lists what there is; or it does not
            know of nodes, or of so many ranks on one.
    """
    if name == HIERARCHICAL and collective in (None, "allreduce"):
        per_node = DEFAULT_RANKS_PER_NODE if ranks_per_node is None else ranks_per_node
        if per_node < 1:
            raise ArgumentError(f"a node has at least one rank, not {per_node}")
        return hierarchical(per_node)
    if ranks_per_node is not None:
        raise ArgumentError(f"{name} knows no nodes: leave --ranks-per-node out")
    if collective is not None:
        return get(collective, name)
    holders = [collective for collective, known in ALGORITHMS.items() if name in known]
    if not holders:
        raise ArgumentError(f"unknown algorithm {name!r}; the known ones are\n{known_names()}")
    return get("allreduce" if "allreduce" in holders else holders[0], name)


def known_names() -> str:
    """Return the known names, a line a collective and one for the pipeline schedules."""
    names = {kind: ", ".join(known) for kind, known in ALGORITHMS.items()}
    names["allreduce"] += f", {HIERARCHICAL}"
    names["pipeline"] = ", ".join(SCHEDULES)
    return "\n".join(f"  {kind}: {known}" for kind, known in names.items())
