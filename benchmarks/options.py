"""The options that the benchmarks share, which make's variables set.

RANKS= is mpirun's; SIZES=, ALGORITHMS=, PEERS=, DTYPE= and TURNS= are passed on to every benchmark.
One that makes no sense for a benchmark is ignored, and its first rank says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hvdkit as hvd
from hvdkit.config import parse_bytes

#: Turns of each candidate.
TURNS = 21

#: Turns of each candidate in a short run: about as few as hundreds of figures can be compared with.
SHORT_TURNS = 15


@dataclass(frozen=True)
class Choice:
    """What an option of several values takes.

    Args:
        default: taken if nothing is given.
        known: what can be given; empty for numbers of bytes.
        short: the default of a short run; empty if it is the same.
    """

    default: Sequence[str]
    known: Sequence[str] = ()
    short: Sequence[str] = ()


def parser(text: str, *, turns: int = TURNS, **choices: Choice) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark takes, and of what this one does.

    Args:
        text: the script's docstring.
        turns: of each candidate, if neither --turns nor --short is given.
        choices: of "sizes", "algorithms", "peers" and "dtype".
    """
    made = argparse.ArgumentParser(description=text.splitlines()[0])
    for name in ("sizes", "algorithms", "peers", "dtype"):
        choice = choices.get(name)
        if choice is None:
            made.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
            continue
        made.add_argument(
            f"--{name}",
            nargs="*" if name == "peers" else "+",
            choices=choice.known or None,
            type=str if choice.known else parse_bytes,
            metavar=None if choice.known else "BYTES",
            help=f"default: {' '.join(choice.default)}",
        )
    made.add_argument("--turns", type=int, help=f"of each candidate, default: {turns}")
    made.add_argument("--short", action="store_true", help="fewer turns and sizes")
    made.add_argument("--out", type=Path, help="JSON file to add the figures to, with CSV beside")
    made.set_defaults(parsed=(turns, choices))
    return made


def read(
    made: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the options, with the defaults filled in; `ignored` has those that mean nothing."""
    args = made.parse_args(arguments)
    turns, choices = args.parsed
    if args.turns is None:
        args.turns = min(turns, SHORT_TURNS) if args.short else turns
    for name in ("sizes", "algorithms", "peers", "dtype"):
        choice, given = choices.get(name), getattr(args, name)
        if choice is not None and given is None:
            values = choice.short if args.short and choice.short else choice.default
            setattr(args, name, [v if choice.known else parse_bytes(v) for v in values])
    args.ignored = [
        f"--{name}"
        for name in ("sizes", "algorithms", "peers", "dtype")
        if name not in choices and getattr(args, name) is not None
    ]
    return args


def start(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line and join the job.  Collective."""
    args = read(made)
    hvd.init()
    say_ignored(args)
    return args


def say_ignored(args: argparse.Namespace) -> None:
    """Say on the first rank, or before there are any, which options mean nothing here."""
    if args.ignored and not (hvd.is_initialized() and hvd.rank()):
        print(f"ignored, as they mean nothing to this benchmark: {', '.join(args.ignored)}")
