"""``hvdkit draw``: an algorithm as a space-time diagram, in the terminal or as SVG."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hvdkit.errors import ArgumentError
from hvdkit.schedules.draw import DEFAULT_SEGMENTS, draw_svg, draw_text
from hvdkit.schedules.registry import ALGORITHMS, Algorithm, get

if TYPE_CHECKING:
    # argparse has no public name for the type of what add_subparsers() returns.
    from argparse import _SubParsersAction


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``draw`` to the subcommands of ``hvdkit``."""
    parser = subparsers.add_parser(
        "draw",
        help="draw an algorithm's messages over time",
        description="Draw an algorithm's messages over time, with its steps and bytes against "
        "their formula and the lower bound.",
        epilog="algorithms:\n" + known_algorithms(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("algorithm", help="its name, such as ring")
    parser.add_argument("--ranks", type=int, default=4, help="number of ranks (default 4)")
    parser.add_argument(
        "--collective", help="needed where several have the algorithm and allreduce is not meant"
    )
    parser.add_argument(
        "--segments", type=int, help=f"of a pipelined algorithm (default {DEFAULT_SEGMENTS})"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.svg", help="write an SVG here as well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the diagram; with ``--out`` write the SVG too.  Local: no other rank is involved.

    Raises:
        ArgumentError: no such algorithm, or a number that cannot be drawn, or no such folder.
    """
    algorithm = find(args.algorithm, args.collective)
    print(draw_text(algorithm, args.ranks, segments=args.segments))
    if args.out is not None:
        picture = draw_svg(algorithm, args.ranks, segments=args.segments)
        try:
            args.out.write_text(picture, encoding="utf-8")
        except OSError as exc:
            raise ArgumentError(f"cannot write {args.out}: {exc.strerror}") from exc
        print(f"wrote {args.out}")
    return 0


def find(name: str, collective: str | None) -> Algorithm:
    """Return the algorithm called `name`; all-reduce's, where several collectives have one.

    Raises:
        ArgumentError: nothing is called so; the message lists what there is.
    """
    if collective is not None:
        return get(collective, name)
    holders = [collective for collective, known in ALGORITHMS.items() if name in known]
    if not holders:
        raise ArgumentError(f"unknown algorithm {name!r}; the known ones are\n{known_algorithms()}")
    return get("allreduce" if "allreduce" in holders else holders[0], name)


def known_algorithms() -> str:
    """Return the known names, a line a collective."""
    return "\n".join(f"  {kind}: {', '.join(known)}" for kind, known in ALGORITHMS.items())
