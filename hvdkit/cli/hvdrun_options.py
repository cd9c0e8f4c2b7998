"""The options of ``hvdrun``: its own, horovodrun's by their names, and what they mean here."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hvdkit.config import MIB
from hvdkit.errors import ArgumentError, UnsupportedError

_LEVELS = ("TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "FATAL")

#: horovodrun's options that change how fast Horovod is, or what its logs look like: a job does
#: the same without them.  An option, and whether it takes a value.
_WITHOUT_EFFECT = {
    "--cycle-time-ms": "calls are not negotiated in cycles",
    "--cache-capacity": "calls are not negotiated in cycles",
    "--timeline-mark-cycles": "calls are not negotiated in cycles",
    "--no-timeline-mark-cycles": None,
    "--hierarchical-allreduce": "the algorithm is picked for each message",
    "--no-hierarchical-allreduce": "the algorithm is picked for each message",
    "--hierarchical-allgather": "the algorithm is picked for each message",
    "--no-hierarchical-allgather": "the algorithm is picked for each message",
    "--torus-allreduce": "the algorithm is picked for each message",
    "--no-torus-allreduce": None,
    "--autotune": "nothing is tuned while a job runs",
    "--no-autotune": None,
    "--autotune-log-file": "nothing is tuned while a job runs",
    "--autotune-warmup-samples": "nothing is tuned while a job runs",
    "--autotune-steps-per-sample": "nothing is tuned while a job runs",
    "--autotune-bayes-opt-max-samples": "nothing is tuned while a job runs",
    "--autotune-gaussian-process-noise": "nothing is tuned while a job runs",
    "--mpi-threads-disable": "MPI is used by one thread at a time where it has to be",
    "--no-mpi-threads-disable": None,
    "--num-nccl-streams": "there is no NCCL",
    "--thread-affinity": "threads are not bound to cores",
    "--log-with-timestamp": "timestamps are set by Python's logging",
    "--log-without-timestamp": None,
    "--log-hide-timestamp": None,
    "--no-log-hide-timestamp": "timestamps are set by Python's logging",
    "--disable-cache": None,
}
_WITH_VALUE = {
    "--cycle-time-ms",
    "--cache-capacity",
    "--autotune-log-file",
    "--autotune-warmup-samples",
    "--autotune-steps-per-sample",
    "--autotune-bayes-opt-max-samples",
    "--autotune-gaussian-process-noise",
    "--num-nccl-streams",
    "--thread-affinity",
}

_NOT_ELASTIC = "a job keeps the ranks that it starts with: elastic jobs are not supported"

#: horovodrun's options without which the job would be another one, and how many values they take.
_REFUSED = {
    "--min-np": (1, _NOT_ELASTIC),
    "--min-num-proc": (1, _NOT_ELASTIC),
    "--max-np": (1, _NOT_ELASTIC),
    "--max-num-proc": (1, _NOT_ELASTIC),
    "--slots-per-host": (1, _NOT_ELASTIC),
    "--elastic-timeout": (1, _NOT_ELASTIC),
    "--reset-limit": (1, _NOT_ELASTIC),
    "--blacklist-cooldown-range": (2, _NOT_ELASTIC),
    "--host-discovery-script": (1, _NOT_ELASTIC),
    "--jsrun": (0, "start the program with jsrun itself, which is an MPI's launcher"),
}

#: The sections of horovodrun's configuration file, and the option's name before each key.
_SECTIONS = {
    "params": "",
    "autotune": "autotune_",
    "timeline": "timeline_",
    "stall_check": "stall_check_",
    "library_options": "",
    "logging": "log_",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options, and the program that follows them."""
    parser.add_argument(
        "-np", "-n", "--num-proc", type=_positive, help="how many ranks (default: all slots)"
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="say what is started, and how; and show all that mpirun says of a failure",
    )
    parser.add_argument(
        "-cb", "--check-build", action="store_true", help="say what was found here, and end"
    )
    parser.add_argument(
        "--config-file", type=Path, metavar="FILE", help="options as YAML; those given here win"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the program and its arguments")
    _add_places(parser.add_argument_group("where"))
    _add_output(parser.add_argument_group("output"))
    _add_settings(parser.add_argument_group("what the ranks are told"))
    hidden = parser.add_argument_group(
        "of horovodrun's",
        "Its other options are known: those that only tune Horovod itself have no effect, which is "
        "said in a line; those of elastic jobs are refused.",
    )
    for name in _WITHOUT_EFFECT:
        if name in _WITH_VALUE:
            hidden.add_argument(name, help=argparse.SUPPRESS)
        else:
            hidden.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name, (count, _) in _REFUSED.items():
        if count:
            hidden.add_argument(name, nargs=count, help=argparse.SUPPRESS)
        else:
            hidden.add_argument(name, action="store_true", help=argparse.SUPPRESS)


def _add_places(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-H", "--hosts", metavar="a:2,b:4", help="hosts and their slots")
    group.add_argument("-hostfile", "--hostfile", metavar="FILE", help="lines such as: a slots=2")
    group.add_argument("--mpi", action="store_true", help="start the ranks by mpirun")
    group.add_argument(
        "--tcp",
        "--gloo",
        action="store_true",
        help="start them as plain processes, which need no MPI (default: where no mpirun fits)",
    )
    group.add_argument(
        "--network-interfaces",
        "--network-interface",
        action="append",
        metavar="NAMES",
        help="those to use between hosts, separated by commas",
    )
    group.add_argument(
        "--start-timeout",
        type=float,
        metavar="SECONDS",
        help="for all ranks, over TCP (default: 120)",
    )
    group.add_argument(
        "--rsh", metavar="COMMAND", help="what runs a command on a host (default: $HVDKIT_RSH, ssh)"
    )
    group.add_argument("-p", "--ssh-port", type=int, metavar="PORT", help="of all hosts")
    group.add_argument("-i", "--ssh-identity-file", metavar="FILE", help="the private key")
    group.add_argument("--mpi-args", metavar="ARGUMENTS", help="more for mpirun; write it with =")
    group.add_argument("--binding-args", metavar="ARGUMENTS", help="more for mpirun, on binding")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output-filename",
        type=Path,
        metavar="FOLDER",
        help="also write each rank's output to rank.N/stdout and rank.N/stderr in it",
    )
    group.add_argument(
        "-prefix-timestamp",
        "--prefix-output-with-timestamp",
        action="store_true",
        help="begin each line with the time",
    )
    group.add_argument("--no-labels", action="store_true", help="begin no line with its rank")


def _add_settings(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fusion-threshold-mb", type=_number, metavar="MB", help="of gradients reduced together"
    )
    group.add_argument("--timeline-filename", metavar="FILE", help="where to write a timeline")
    stall = group.add_mutually_exclusive_group()
    stall.add_argument(
        "--no-stall-check", action="store_const", const=1, help="do not warn of ranks that wait"
    )
    stall.add_argument(
        "--stall-check",
        dest="no_stall_check",
        action="store_const",
        const=0,
        help=argparse.SUPPRESS,
    )
    for name, what in (
        ("--stall-check-warning-time-seconds", "before ranks that wait are a warning"),
        ("--stall-check-shutdown-time-seconds", "before they are an error"),
        ("--gloo-timeout-seconds", "for the ranks to connect, over TCP"),
    ):
        group.add_argument(name, type=_number, metavar="SECONDS", help=what)
    group.add_argument(
        "--log-level", type=str.upper, choices=_LEVELS, help="from which severity on to log"
    )


def settings(args: argparse.Namespace) -> dict[str, str]:
    """Return the options as the environment variables of `hvdkit.config`."""
    threshold = args.fusion_threshold_mb
    given = {
        "HVDKIT_FUSION_THRESHOLD": None if threshold is None else int(threshold * MIB),
        "HVDKIT_TIMELINE": args.timeline_filename,
        "HVDKIT_STALL_CHECK_DISABLE": args.no_stall_check,
        "HVDKIT_STALL_CHECK_TIME_SECONDS": args.stall_check_warning_time_seconds,
        "HVDKIT_STALL_SHUTDOWN_TIME_SECONDS": args.stall_check_shutdown_time_seconds,
        "HVDKIT_LOG_LEVEL": args.log_level,
        "HVDKIT_START_TIMEOUT": args.start_timeout,
        "HOROVOD_GLOO_TIMEOUT_SECONDS": args.gloo_timeout_seconds,
    }
    return {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in given.items()
        if value is not None
    }


def refuse(args: argparse.Namespace) -> None:
    """Raise UnsupportedError if an option was given without which the job would be another."""
    for name, (_, because) in _REFUSED.items():
        if getattr(args, _attribute(name)):
            raise UnsupportedError(f"{name}: {because}")
    if args.mpi and args.tcp:
        raise ArgumentError("--mpi and --tcp exclude each other; give one")
    if args.tcp:
        for name in ("--mpi-args", "--binding-args"):
            if getattr(args, _attribute(name)):
                raise ArgumentError(f"{name} is for mpirun, which --tcp does without; give one")


def without_effect(args: argparse.Namespace) -> Iterator[str]:
    """Yield a line for each option that was given and does nothing."""
    for name, because in _WITHOUT_EFFECT.items():
        if because is not None and getattr(args, _attribute(name)) not in (None, False):
            yield f"{name} has no effect: {because}"


def read_config_file(args: argparse.Namespace) -> None:
    """Set the options that a configuration file names, but for those on the command line.

    Raises:
        ArgumentError: it cannot be read, or has a section or a key that is not known.
        UnsupportedError: there is no YAML parser.
    """
    path: Path = args.config_file
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as exc:
        raise UnsupportedError(
            f"--config-file={path}: reading YAML needs PyYAML (pip install pyyaml); or give its "
            "options on the command line"
        ) from exc
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as exc:
        raise ArgumentError(f"--config-file={path} cannot be read: {exc}") from exc
    if not isinstance(sections, dict):
        raise ArgumentError(f"--config-file={path} holds no sections")
    for key, value in _config_values(sections):
        name = "num_proc" if key == "np" else _attribute(str(key))
        if not hasattr(args, name):
            raise ArgumentError(f"--config-file={path}: nothing is called {key!r}")
        given = getattr(args, name) not in (None, False)
        if not given and not (name in ("tcp", "mpi") and (args.tcp or args.mpi)):
            setattr(args, name, value)


def _config_values(sections: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name of an option and its value, for all in a configuration file."""
    for section, values in sections.items():
        if section == "controller":
            yield ("tcp" if str(values).lower() == "gloo" else str(values).lower()), True
            continue
        prefix = _SECTIONS.get(_attribute(str(section)))
        if prefix is None or not isinstance(values, dict):
            yield section, values
            continue
        for key, value in values.items():
            if prefix == "stall_check_" and key == "enabled":
                yield "no_stall_check", int(not value)
            elif prefix == "autotune_" and key == "enabled":
                yield "autotune", value
            elif value is not None:
                yield prefix + key, value


def _attribute(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 0 or more")
    return value
