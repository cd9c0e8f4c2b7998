"""The configuration: one frozen dataclass, read once from the environment by ``init()``."""

from __future__ import annotations

import difflib
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hvdkit.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB

#: What launchers tell each rank, and the secret of a job: its place in it, not its configuration.
NOT_CONFIGURATION = frozenset(
    f"HVDKIT_{name}"
    for name in (
        "RANK",
        "SIZE",
        "LOCAL_RANK",
        "LOCAL_SIZE",
        "CROSS_RANK",
        "CROSS_SIZE",
        "RENDEZVOUS_ADDR",
        "RENDEZVOUS_PORT",
        "SECRET",
        "RSH",
    )
)

#: Bytes of a segment and of a bucket on a machine that nobody has tuned.
SEGMENT_BYTES = 512 * KIB
BUCKET_BYTES = 25 * MIB

#: Up to this many ranks everyone writes to everyone where an exchange of a few bytes is set up once
#: and repeated: one wait, of which Bruck's algorithm has log2 p.
DIRECT_RANKS = 8

#: Bytes of a segment between nodes where an MPI library's messages go over sockets: longer ones it
#: asks the receiver for first, and waits; on a link of 1 Gbit/s that takes 1.6 times as long.
SEGMENT_OVER_SOCKETS = 32 * KIB

#: What stands in the place of a tuning file's name where none is to be read.
NO_TUNING = Path("off")

_UNITS = {"": 1, "k": KIB, "m": MIB, "g": 1024 * MIB}
_SIZE = re.compile(r"(\d+)\s*([kmg]?)(?:i?b)?", re.IGNORECASE)


def _flag(text: str) -> bool:
    """Return the truth that `text` states: 1/0, true/false, yes/no or on/off."""
    known = {"1": True, "true": True, "yes": True, "on": True}
    known |= {"0": False, "false": False, "no": False, "off": False}
    if text.strip().lower() not in known:
        raise ValueError("expected 0 or 1")
    return known[text.strip().lower()]


def parse_bytes(text: str) -> int:
    """Return a number of bytes: an integer, optionally with a unit (``64MiB``, ``512k``)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("expected a number of bytes, such as 65536, 64KiB or 25MiB")
    return int(match[1]) * _UNITS[match[2].lower()]


def _positive_bytes(text: str) -> int:
    if parse_bytes(text) == 0:
        raise ValueError("expected 1 byte or more")
    return parse_bytes(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError("expected a number of seconds, 0 or more")
    return seconds


def _log_level(text: str) -> int:
    levels = {"trace": 5, "debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
    levels |= {"error": logging.ERROR, "fatal": logging.CRITICAL}
    if text.strip().lower() not in levels:
        raise ValueError(f"expected one of {', '.join(levels)}")
    return levels[text.strip().lower()]


def _path_or_none(text: str) -> Path | None:
    return None if text.upper() == "DYNAMIC" else Path(text)


def _count(text: str) -> int:
    if not text.strip().isdigit():
        raise ValueError("expected a whole number, 0 or more")
    return int(text)


def _transport(text: str) -> str:
    if text.strip().lower() not in ("auto", "mpi", "tcp"):
        raise ValueError("expected auto, mpi or tcp")
    return text.strip().lower()


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _positive_seconds(text: str) -> float:
    if _seconds(text) == 0:
        raise ValueError("expected a number of seconds, more than 0")
    return _seconds(text)


def _knob(default: Any, parse: Callable[[str], Any], *names: str) -> Any:
    """Declare a field that is read from the first of `names` that the environment sets."""
    return field(default=default, metadata={"parse": parse, "names": names})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the environment may change.  All ranks must hold the same; ``init()`` checks it."""

    native: bool = _knob(True, _flag, "HVDKIT_NATIVE")
    """Use the native module (else numpy does the work, and there is no shared-memory arena)."""

    shm: bool = _knob(True, _flag, "HVDKIT_SHM")
    """Let ranks of one node reduce in shared memory."""

    shm_dir: Path = _knob(Path("/dev/shm"), Path, "HVDKIT_SHM_DIR")
    """The tmpfs in which the arena lives, as an unnamed file."""

    slot_bytes: int = _knob(512 * KIB, _positive_bytes, "HVDKIT_SHM_SLOT")
    """Bytes of each of a rank's two staging slots in the arena."""

    spin: int = _knob(2000, _count, "HVDKIT_SPIN")
    """How often a waiting rank looks before it gives up its core, where it has one of its own."""

    segment_bytes: int | None = _knob(None, _positive_bytes, "HVDKIT_SEGMENT")
    """Bytes of a message: a chunk is cut in segments, one reduced while the next arrives.

    None: as the machine was tuned, or else `SEGMENT_BYTES` or `SEGMENT_OVER_SOCKETS`.
    """

    bucket_bytes: int | None = _knob(
        None, parse_bytes, "HVDKIT_FUSION_THRESHOLD", "HOROVOD_FUSION_THRESHOLD"
    )
    """Bytes of gradients that are reduced together; 0: each by itself.

    None: as the machine was tuned, or else `BUCKET_BYTES`.
    """

    tuning_file: Path | None = _knob(None, Path, "HVDKIT_TUNING_FILE")
    """What ``hvdkit tune`` has found; None: where it writes by itself, if there; ``off``: none."""

    stall_check: float = _knob(
        60.0, _seconds, "HVDKIT_STALL_CHECK_TIME_SECONDS", "HOROVOD_STALL_CHECK_TIME_SECONDS"
    )
    """Seconds after which ranks that wait for others are a warning; 0: never."""

    stall_check_disable: bool = _knob(
        False, _flag, "HVDKIT_STALL_CHECK_DISABLE", "HOROVOD_STALL_CHECK_DISABLE"
    )
    """Neither warn of ranks that wait, nor end them."""

    stall_shutdown: float = _knob(
        0.0, _seconds, "HVDKIT_STALL_SHUTDOWN_TIME_SECONDS", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"
    )
    """Seconds after which it is an error; 0: never."""

    deadlock_check: float = _knob(5.0, _seconds, "HVDKIT_DEADLOCK_CHECK_TIME_SECONDS")
    """Seconds for which ranks that wait for each other may do so; 0: for ever."""

    cuda_aware: bool | None = _knob(None, _flag, "HVDKIT_CUDA_AWARE")
    """Hand the memory of GPUs to the MPI library where it is asked for; None: if it says it can."""

    log_level: int = _knob(logging.WARNING, _log_level, "HVDKIT_LOG_LEVEL", "HOROVOD_LOG_LEVEL")
    """From which severity on the logger ``"hvdkit"`` speaks; stalls are warnings."""

    timeline: Path | None = _knob(None, _path_or_none, "HVDKIT_TIMELINE", "HOROVOD_TIMELINE")
    """Where `init` starts to write a timeline; None: nowhere.  Horovod's ``DYNAMIC`` is nowhere."""

    allow_singleton: bool = _knob(False, _flag, "HVDKIT_ALLOW_SINGLETON")
    """Start alone even where the launcher's environment says that there are more processes."""

    transport: str = _knob("auto", _transport, "HVDKIT_TRANSPORT")
    """How the ranks join: over MPI, over TCP, or as whoever started them would have it."""

    tcp_interfaces: tuple[str, ...] = _knob(
        (), _names, "HVDKIT_TCP_INTERFACES", "HOROVOD_GLOO_IFACE"
    )
    """Network interfaces that the TCP transport uses, the preferred first; none: all there are."""

    start_timeout: float = _knob(
        120.0,
        _positive_seconds,
        "HVDKIT_START_TIMEOUT",
        "HOROVOD_START_TIMEOUT",
        "HOROVOD_GLOO_TIMEOUT_SECONDS",
    )
    """Seconds in which all ranks must have met over TCP."""

    peer_timeout: float = _knob(30.0, _positive_seconds, "HVDKIT_PEER_TIMEOUT")
    """Seconds for which a TCP link may leave data unacknowledged before its peer counts as lost."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Config:
        """Read the configuration; ``HVDKIT_`` names win over Horovod's.

        Raises:
            ConfigError: a value that does not parse; the message has the variable's name.

        An unknown ``HVDKIT_`` name is a warning that suggests the nearest known one.
        """
        values: dict[str, Any] = {}
        known: set[str] = set()
        for knob in fields(cls):
            names = knob.metadata["names"]
            known.update(names)
            name = next((name for name in names if environ.get(name, "") != ""), None)
            if name is None:
                continue
            try:
                values[knob.name] = knob.metadata["parse"](environ[name])
            except ValueError as exc:
                raise ConfigError(f"{name}={environ[name]!r}: {exc}") from exc
        for name in sorted(environ):
            if name.startswith("HVDKIT_") and name not in known | NOT_CONFIGURATION:
                nearest = difflib.get_close_matches(
                    name.removeprefix("HVDKIT_"), [k.removeprefix("HVDKIT_") for k in known], n=1
                )
                hint = f"; did you mean HVDKIT_{nearest[0]}?" if nearest else ""
                warnings.warn(f"unknown environment variable {name}{hint}", stacklevel=2)
        return cls(**values)
