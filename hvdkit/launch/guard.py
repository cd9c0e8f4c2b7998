"""The process that is started for a rank: it forks the rank, outlives it, and says how it ended.

* A rank that is killed leaves no word of its own, and mpirun then kills the others: its guard
  notes which rank was the first, and what happened to it.
* A guard that is killed takes its rank along (Linux's parent-death signal).
* The launcher holds the job's lifeline, a FIFO, open for writing.  When it is gone, however it
  went, the guards end their ranks and remove the job's directory.

mpirun starts this file by its path.  Only the standard library is imported, so that the rank is
forked before anything has started a thread, and imports what the caller of ``run`` would import.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

#: Where launchers put a process's rank.
_RANKS = ("HVDKIT_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")

#: The status of a rank that was told to end: the shell's for SIGTERM.
_TOLD = 128 + signal.SIGTERM

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Fork the rank and wait for it; return the exit status for mpirun."""
    task = json.loads(sys.argv[1])
    directory = Path(task["directory"])
    rank = next((int(os.environ[name]) for name in _RANKS if name in os.environ), None)
    if rank is None:
        sys.exit(f"hvdkit: the launcher tells no rank: none of {', '.join(_RANKS)} is set")
    if task["output"]:
        _redirect(Path(task["output"]) / folder_name(rank, task["size"]))
    lifeline = _open_lifeline(directory, task["host"])
    told, tell = os.pipe()
    guard, child = os.getpid(), os.fork()
    if child == 0:
        os.close(told)
        _die_with(guard)
        return _be_the_rank(task, rank, tell)
    os.close(tell)
    order = _Order(child)
    signal.signal(signal.SIGTERM, order.on_sigterm)
    if lifeline is not None:
        threading.Thread(target=order.on_end_of_file, args=(lifeline,), daemon=True).start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if order.by_launcher:
        shutil.rmtree(directory, ignore_errors=True)
    if order.by_launcher or order.by_mpirun:
        return _TOLD
    # Not blocking: processes that the rank left behind may hold the pipe open.
    if not (select.select([told], [], [], 0)[0] and os.read(told, 1)):
        ended = how_it_ended(status)
        early = " before its function returned" if status >= 0 else ""
        leave_note(directory, rank, ended + early)
        return _end_alike(status)
    return status if status >= 0 else 128 - status


def leave_note(
    directory: Path, rank: int, what: str, *, details: str = "", secondary: bool = False
) -> None:
    """Tell the launcher what happened to a rank, unless that rank's note is there already.

    On another host, where the directory is not, the note goes to stderr.

    Args:
        directory: the job's.
        rank: whose note it is.
        what: completes the sentence "rank 1 ...".
        details: a traceback, if there is one.
        secondary: the rank only suffers from another's end.
    """
    place = directory / f"failure-{rank}.json"
    if place.exists():
        return
    note = {"rank": rank, "what": what, "details": details, "secondary": secondary}
    try:
        place.with_suffix(".new").write_text(json.dumps(note | {"time": time.time()}))
        place.with_suffix(".new").rename(place)
    except OSError:
        sys.stderr.write(f"hvdkit: rank {rank} {what}\n{details}")


def folder_name(rank: int, size: int) -> str:
    """Return the name of a rank's output folder: Horovod's, which sorts by rank."""
    return f"rank.{rank:0{len(str(size - 1))}}"


class _Order:
    """The order to end a rank, and who gave it."""

    def __init__(self, child: int) -> None:
        self.child = child
        self.by_mpirun = False
        self.by_launcher = False

    def on_sigterm(self, *_: object) -> None:
        """Pass the signal on: a rank may handle it, to save its work."""
        self.by_mpirun = True
        self._send(signal.SIGTERM)

    def on_end_of_file(self, lifeline: int) -> None:
        """Wait until the launcher has gone, then end the rank."""
        os.read(lifeline, 1)
        self.by_launcher = True
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.child, number)


def _be_the_rank(task: dict[str, Any], rank: int, tell: int) -> int:
    """Do the rank's work; afterwards this process ends as any Python process does."""
    directory = Path(task["directory"])
    sys.path[:] = task["path"] or sys.path[1:]  # not this file's own folder
    try:
        from hvdkit.launch.worker import work
    except Exception as exc:
        what = f"cannot import hvdkit with {sys.executable}: {exc}"
        leave_note(directory, rank, what, details=traceback.format_exc())
        return 1
    work(
        directory,
        rank,
        task["size"],
        told=partial(os.write, tell, b"."),
        show_errors=bool(task["output"]),
    )
    return 0


def _end_alike(status: int) -> int:
    """End this process as its rank has ended, for launchers tell how; return its exit status.

    A launcher takes status 0 for success, which it was not.  Hydra does not end the ranks of other
    hosts for a mere status: under it the guard is killed in any case.
    """
    by_hydra = not {"HVDKIT_RANK", "OMPI_COMM_WORLD_RANK"} & set(os.environ)
    if status >= 0 and not by_hydra:
        return status or 1
    number = signal.SIGKILL if status >= 0 else -status
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the rank has dumped its own
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


def _redirect(place: Path) -> None:
    """Let this process and its rank write to files in `place` instead of to mpirun."""
    place.mkdir(parents=True, exist_ok=True)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        with (place / name).open("wb", buffering=0) as file:
            os.dup2(file.fileno(), descriptor)


def _open_lifeline(directory: Path, host: str) -> int | None:
    """Return the lifeline, or None on a host that is not the launcher's: no FIFO spans hosts.

    There it is mpirun that ends the rank, when it has lost those on the launcher's host.
    """
    path = directory / "lifeline"
    if os.uname().nodename != host or not path.exists():
        return None
    lifeline = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or it would wait for a dead launcher
    os.set_blocking(lifeline, True)
    return lifeline


def _die_with(guard: int) -> None:
    """Ask the kernel to kill this process when `guard` ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:  # it ended before the kernel was asked
        os._exit(_TOLD)


def how_it_ended(status: int) -> str:
    """Return what a process's exit status says; completes a sentence."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time signal
        name = "real-time"
    hint = "; the kernel does that when memory runs out" if -status == signal.SIGKILL else ""
    return f"was killed by signal {-status} ({name}){hint}"


if __name__ == "__main__":
    sys.exit(main())
