"""The command line: ``hvdkit run | doctor | draw | simulate | tune``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from hvdkit import __version__
from hvdkit.cli import doctor, draw, hvdrun, simulate, tune
from hvdkit.errors import HvdkitError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 2 for a mistake in its arguments."""
    parser = argparse.ArgumentParser(
        prog="hvdkit", description="Collective communication for training."
    )
    parser.add_argument("--version", action="version", version=f"hvdkit {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (hvdrun, doctor, draw, simulate, tune):
        command.add_parser(commands)
    args = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may know no arrows
    try:
        status = int(args.run(args))
        sys.stdout.flush()
    except HvdkitError as exc:
        print(f"hvdkit: {exc}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
