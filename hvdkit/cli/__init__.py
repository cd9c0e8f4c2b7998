"""The command line: ``hvdkit doctor | draw``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hvdkit import __version__
from hvdkit.cli import doctor, draw
from hvdkit.errors import HvdkitError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 2 for a mistake in its arguments."""
    parser = argparse.ArgumentParser(
        prog="hvdkit", description="Collective communication for training."
    )
    parser.add_argument("--version", action="version", version=f"hvdkit {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (doctor, draw):
        command.add_parser(commands)
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except HvdkitError as exc:
        print(f"hvdkit: {exc}", file=sys.stderr)
        return 2
