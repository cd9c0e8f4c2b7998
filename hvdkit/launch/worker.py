"""What a rank does: fetch the call, make it, and hand the result in."""

from __future__ import annotations

import io
import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np

from hvdkit.config import Config
from hvdkit.errors import LauncherError, PeerError
from hvdkit.launch.guard import leave_note
from hvdkit.launch.parcel import Parcel, pack_result, unpack
from hvdkit.transport.base import JobTransport
from hvdkit.transport.opening import open_world

#: What other ranks, which fail for the same reason, have to leave their notes as well.
_SECONDS_FOR_OTHERS = 0.5


def work(
    directory: Path, rank: int, size: int, *, told: Callable[[], object], show_errors: bool
) -> None:
    """Make the call that lies in `directory`.  Collective; ends this process if it fails.

    Rank 0 reads the call and writes the results.  To and from the other ranks they travel as
    messages, so that only rank 0 need be on the launcher's host.

    Args:
        directory: the job's.
        rank: this process's.
        size: how many ranks the launcher started.
        told: called when the launcher has the result, or a note of the error.
        show_errors: write the traceback to stderr too.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # a rank that is killed flushes nothing
    transport: JobTransport | None = None
    try:
        transport = _join(size)
        packed = transport.broadcast_object(_read(directory) if rank == 0 else b"", 0)
        if rank == 0:
            (directory / "started").touch()
        parcel: Parcel = pickle.loads(packed)
        function, args, kwargs = unpack(parcel)
        result = function(*args, **kwargs)
        _hand_in(transport, pack_result(result, parcel), directory)
        transport.close()
        told()
    except BaseException as exc:
        _tell(directory, rank, exc, show=show_errors)
        told()
        _end_job(transport)


def _join(size: int) -> JobTransport:
    """Return a transport over all ranks, when all of them have started.  Collective."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # init() will warn of unknown variables
        config = Config.from_environment(os.environ)
    opened = open_world(None, config, os.environ)
    transport = opened.transport
    if transport.size != size:
        raise LauncherError(
            f"run() started {size} ranks, but this one is of {transport.size}, {opened.description}"
        )
    transport.allgather_ints(np.zeros(1, np.int64))
    return transport


def _read(directory: Path) -> bytes:
    try:
        return (directory / "call").read_bytes()
    except FileNotFoundError as exc:
        raise LauncherError(
            f"rank 0 is on {os.uname().nodename}, where the launcher's {directory} is not: name "
            "the launcher's own host first in hosts= or in the hostfile, or set TMPDIR to a "
            "directory that all hosts share"
        ) from exc


def _hand_in(transport: JobTransport, result: bytes, directory: Path) -> None:
    """Write every rank's result to a file of its own, on rank 0.  Collective.

    Ranks that are ready wait without using their core; none leaves before all results are safe.
    """
    lengths = transport.allgather_ints(np.array([len(result)], np.int64))[:, 0]
    if transport.rank == 0:
        (directory / "result-0").write_bytes(result)
        for source in range(1, transport.size):
            received = np.empty(lengths[source], np.uint8)
            transport.backoff.wait(transport.irecv(received, source))
            received.tofile(directory / f"result-{source}")
    else:
        transport.backoff.wait(transport.isend(np.frombuffer(result, np.uint8), 0))
    transport.allgather_ints(np.zeros(1, np.int64))


def _tell(directory: Path, rank: int, error: BaseException, *, show: bool) -> None:
    """Leave a note of `error` for the launcher."""
    kind = type(error)
    lines = traceback.format_exception(kind, error, _without_this_file(error.__traceback__))
    text = "".join(lines)
    if show:
        with suppress(Exception):
            sys.stderr.write(text)
    # A syntax error's place stands before it, indented; a message's other lines, and notes, after.
    summary = traceback.format_exception_only(kind, error)
    what = next((line for line in summary if not line.startswith(" ")), kind.__name__)
    leave_note(
        directory,
        rank,
        f"raised {what.splitlines()[0]}",
        details=text,
        secondary=isinstance(error, PeerError),
    )


def _end_job(transport: JobTransport | None) -> NoReturn:
    """End this process and with it all others: by the transport, or for its status."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # the function may have put anything there
            stream.flush()
    time.sleep(_SECONDS_FOR_OTHERS)
    if transport is not None:
        transport.abort(1)
    os._exit(1)


def _without_this_file(frames: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the function on, or all of it if the function is not in it."""
    inner = frames
    while inner is not None and inner.tb_frame.f_code.co_filename == __file__:
        inner = inner.tb_next
    return inner or frames
