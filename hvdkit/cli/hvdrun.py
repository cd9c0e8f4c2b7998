"""``hvdrun -np 4 python train.py``, also ``hvdkit run``: start a program as the ranks of a job."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdkit import __version__
from hvdkit.cli import doctor
from hvdkit.cli.hvdrun_options import (
    add_options,
    read_config_file,
    refuse,
    settings,
    without_effect,
)
from hvdkit.config import Config
from hvdkit.errors import ArgumentError, HvdkitError, LauncherError
from hvdkit.launch.job import unwinding_on_sigterm
from hvdkit.launch.mpirun import Host, Mpirun, parse_hostfile, parse_hosts
from hvdkit.launch.output import Display, Style, wants_colours
from hvdkit.launch.start import (
    SHELL,
    Launch,
    find_mpi,
    python_of,
    remote_shell,
    start_by_mpirun,
    start_over_tcp,
)

_DESCRIPTION = """\
Start a program as the ranks of a job, on this host or on several. The first rank that fails ends
the job, and its status is hvdrun's. A line that rank 3 writes to stdout is shown as "[3] text", one
that it writes to stderr as "[3:err] text", coloured on a terminal (unless NO_COLOR is set)."""

_USAGE = "%(prog)s [options] -np N [-H a:2,b:2 | --hostfile F] [--mpi | --tcp] program [arguments]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``hvdrun`` and return its exit status: 2 for a mistake in its arguments."""
    parser = argparse.ArgumentParser(
        prog="hvdrun", description=_DESCRIPTION, usage=_USAGE, allow_abbrev=False
    )
    parser.add_argument("-v", "--version", action="version", version=f"hvdrun {__version__}")
    add_options(parser)
    try:
        return run(parser.parse_args(arguments))
    except HvdkitError as exc:
        _say(str(exc))
        return 2


def add_parser(commands: Any) -> None:
    """Add ``run`` to the commands."""
    parser = commands.add_parser(
        "run",
        help="start a program as the ranks of a job (hvdrun)",
        description=_DESCRIPTION,
        usage=_USAGE,
        allow_abbrev=False,
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start the job; return its exit status when it has ended.

    Raises:
        ArgumentError: an option is out of range, or contradicts another.
        UnsupportedError: an option of horovodrun's that cannot be honoured.
        LauncherError: a host cannot take part, or there is no mpirun where one is asked for.
    """
    if args.check_build:
        return doctor.run(args)
    if args.config_file is not None:
        read_config_file(args)
    refuse(args)
    for line in without_effect(args):
        _say(line)
    launch = _read(args)
    found = _choose(args, launch)
    streams = sys.stdout.buffer, sys.stderr.buffer
    style = Style(
        labels=not args.no_labels,
        timestamps=args.prefix_output_with_timestamp,
        colours=(wants_colours(streams[0], os.environ), wants_colours(streams[1], os.environ)),
    )
    sys.stdout.flush()
    try:
        display = Display(*streams, style=style, folder=args.output_filename, size=launch.size)
    except OSError as exc:
        raise ArgumentError(
            f"--output-filename={args.output_filename}: {exc.filename}: {exc.strerror}"
        ) from exc
    with unwinding_on_sigterm():
        return _start(launch, found, display)


def _start(launch: Launch, found: Mpirun | None, display: Display) -> int:
    """Return the job's exit status; 130 if Ctrl-C has ended it, as of a shell."""
    error = None
    try:
        if found is None:
            status, error = start_over_tcp(launch, display)
        else:
            status, error = start_by_mpirun(launch, found, display)
    except KeyboardInterrupt:
        status, error = 128 + signal.SIGINT, "ended by Ctrl-C"
    except BrokenPipeError:  # whoever reads the output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    finally:
        display.close()
    if error is not None:
        _say(error)
    return status


def _read(args: argparse.Namespace) -> Launch:
    """Return what is to be started."""
    command = tuple(args.command[1:] if args.command[:1] == ["--"] else args.command)
    if not command:
        raise ArgumentError("no program is given; write  hvdrun -np 4 python train.py")
    hosts = _hosts(args)
    size = args.num_proc or sum(slots for _, slots in hosts)
    if not size:
        raise ArgumentError("how many ranks? Give -np, or the hosts and their slots")
    told = settings(args)
    own = {name: text for name, text in os.environ.items() if name != SHELL}
    config = Config.from_environment(own | told)
    _follow(config.transport, args)
    interfaces = tuple(name for names in args.network_interfaces or () for name in names.split(","))
    more = [*shlex.split(args.binding_args or ""), *shlex.split(args.mpi_args or "")]
    shell = args.rsh or os.environ.get(SHELL)
    return Launch(
        command=command,
        size=size,
        hosts=hosts,
        # What a rank writes is to be seen even if it is killed.
        settings={"PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1"), **told},
        interfaces=interfaces,
        start_timeout=config.start_timeout,
        peer_timeout=config.peer_timeout,
        remote_shell=remote_shell(shell, args.ssh_port, args.ssh_identity_file),
        mpi_arguments=tuple(more),
        verbose=args.verbose,
    )


def _follow(transport: str, args: argparse.Namespace) -> None:
    """Choose --mpi or --tcp as HVDKIT_TRANSPORT says, which the ranks will read, too.

    Raises:
        ArgumentError: it contradicts an option.
    """
    if transport == "auto":
        return
    other = "mpi" if transport == "tcp" else "tcp"
    if getattr(args, other):
        raise ArgumentError(
            f"HVDKIT_TRANSPORT={transport} and --{other} contradict each other; give one"
        )
    setattr(args, transport, True)
    refuse(args)


def _hosts(args: argparse.Namespace) -> tuple[Host, ...]:
    if args.hosts is not None and args.hostfile is not None:
        raise ArgumentError("--hosts and --hostfile are two ways to say the same; give one")
    if args.hosts is not None:
        return parse_hosts(args.hosts)
    if args.hostfile is None:
        return ()
    try:
        return parse_hostfile(Path(args.hostfile).read_text().splitlines(), args.hostfile)
    except OSError as exc:
        raise ArgumentError(f"--hostfile={args.hostfile} cannot be read: {exc.strerror}") from exc


def _choose(args: argparse.Namespace, launch: Launch) -> Mpirun | None:
    """Return the mpirun to use; None: none, the ranks speak TCP."""
    if args.tcp:
        launch.say("over TCP, as asked for")
        return None
    try:
        found = find_mpi(python_of(launch.command), os.environ)
    except LauncherError as exc:
        if args.mpi or launch.mpi_arguments:
            raise
        launch.say(f"over TCP, because there is no mpirun that fits: {exc}")
        return None
    launch.say(f"by {found.path}" + ("" if args.mpi else ", which belongs to mpi4py's MPI"))
    return found


def _say(text: str) -> None:
    sys.stderr.write(f"hvdrun: {text}\n")
    sys.stderr.flush()
