"""What runs on each host of a job: it starts programs, passes on what they write, and ends them.

* ``hvdrun --tcp`` starts one agent a host, and it the ranks; ``hvdrun --mpi`` starts one here,
  and it mpirun.  Orders come on stdin: a task, a line of JSON, and then the word ``go``, ``end``
  or ``kill``.  The end of the file means that the launcher has gone: everything is killed at once.
* With a program as its arguments it is what mpirun starts for a rank, and passes on its output.

What ranks write goes out on stdout as records, short lines that name the rank and the stream, so
that whoever gathers them can put whole lines together again (`read_record`).

Only the standard library is imported: other hosts get this file's source on stdin, whatever is
installed there.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

#: Where launchers put a process's rank.
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")

#: The largest part of a line in a record.  mpirun passes on 4096 bytes at a time.
_PIECES = re.compile(rb"[^\n]{,3500}\n|[^\n]{1,3500}")
_BATCH = 4096

_RECORD = re.compile(rb"\x1ehvd ([a-zA-Z]) (\d+) (.*)", re.DOTALL)

#: Between SIGTERM and SIGKILL.
_SECONDS_TO_END = 5.0
#: For what a program has left behind, and which may go on writing.
_SECONDS_TO_DRAIN = 1.0
#: What the other ranks have to say, before mpirun hears of one's failure and ends them.
_SECONDS_FOR_OTHERS = 1.0
#: What mpirun may take to fetch what was written.
_SECONDS_TO_FETCH = 1.0
_SECONDS_BETWEEN_LOOKS = 0.1

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def read_record(line: bytes) -> tuple[str, int, bytes] | None:
    """Return a record's kind, rank and content; None: `line` is none of ours.

    Kinds: ``o`` and ``e``, the end of a line on stdout or stderr, ``O`` and ``E``, a part of one;
    ``s``, a rank was started, on which host; ``x``, it has ended, with which status, and whether it
    was told to; ``h``, the host is ready; ``f``, it is not, and why.
    """
    match = _RECORD.fullmatch(line)
    return None if match is None else (match[1].decode(), int(match[2]), match[3])


class Outlet:
    """Where records go.

    Args:
        descriptor: written to.
        paced: write a few whole records at a time, and only when the last were fetched: mpirun
            mixes what it fetches from several ranks.
    """

    def __init__(self, descriptor: int, *, paced: bool) -> None:
        self._descriptor = descriptor
        self._paced = paced
        self._batch = b""

    def send(self, kind: str, rank: int, content: bytes = b"") -> None:
        """Write a record, sooner or later."""
        record = b"\x1ehvd %s %d %s\n" % (kind.encode(), rank, content)
        if len(self._batch) + len(record) > _BATCH:
            self.flush()
        self._batch += record

    def flush(self) -> None:
        """Write what has not been written."""
        if self._paced and self._batch:
            self._wait_until_fetched()
        while self._batch:
            self._batch = self._batch[os.write(self._descriptor, self._batch) :]

    def _wait_until_fetched(self) -> None:
        deadline = time.monotonic() + _SECONDS_TO_FETCH
        count = bytearray(4)
        with suppress(OSError):
            while time.monotonic() < deadline:
                fcntl.ioctl(self._descriptor, termios.FIONREAD, count)
                if not any(count):
                    return
                time.sleep(0.0005)


@dataclass
class _Program:
    """A program that was started, and the pipes on which it writes."""

    rank: int
    process: subprocess.Popen[bytes]
    pipes: dict[int, str] = field(default_factory=dict)


class Minder:
    """Start programs, pass on what they write, and obey orders until all of them have ended.

    Args:
        control: the descriptor on which orders come.
        outlet: for records; None: programs write to this process's stdout and stderr.
    """

    def __init__(self, control: int, outlet: Outlet | None) -> None:
        self._control = control
        self._outlet = outlet
        self._orders = b""
        self._programs: list[_Program] = []
        self._left: list[_Program] = []  # have ended, but their pipes have not
        self._told = False
        self._kill_at = float("inf")
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, self._read_orders)
        self.status = 0
        """The first that was not 0: negative for a signal, as `subprocess` has it."""

    def start(self, rank: int, command: list[str], environment: dict[str, str]) -> None:
        """Start a program; one that cannot be started has ended with status 127."""
        piped = None if self._outlet is None else subprocess.PIPE
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=piped,
                stderr=piped,
                close_fds=False,  # MPICH's mpirun talks to ranks on one of them
                start_new_session=True,
                preexec_fn=partial(_die_with, os.getpid()),  # noqa: PLW1509 (no threads)
            )
        except OSError as exc:
            self._send("e", rank, f"hvdrun: {command[0]} cannot be started: {exc}".encode())
            self._send("x", rank, b"127 0")
            self.status = self.status or 127
            return
        program = _Program(rank, process)
        self._programs.append(program)
        for pipe, kind in ((process.stdout, "o"), (process.stderr, "e")):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                program.pipes[pipe.fileno()] = kind
                read = partial(self._pass_on, program)
                self._selector.register(pipe.fileno(), selectors.EVENT_READ, read)
        self._send("s", rank, os.uname().nodename.encode())

    def mind(self) -> None:
        """Return when all programs have ended and what they wrote is passed on."""
        try:
            while self._programs:
                self._look()
            deadline = time.monotonic() + _SECONDS_TO_DRAIN
            while any(program.pipes for program in self._left) and time.monotonic() < deadline:
                self._look()
            if self._outlet is not None:
                self._outlet.flush()
        except OSError:  # nobody reads any more
            self._signal(signal.SIGKILL)

    def _look(self) -> None:
        for key, _ in self._selector.select(_SECONDS_BETWEEN_LOOKS):
            key.data(key.fd)
        for program in list(self._programs):
            self._collect(program)
        if time.monotonic() > self._kill_at:
            self._signal(signal.SIGKILL)
        if self._outlet is not None:
            self._outlet.flush()

    def _collect(self, program: _Program) -> None:
        """Note the end of a program, if it has ended."""
        pid = program.process.pid
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return
        if ended.si_status or self._told:  # its children, while its number is still its own
            _signal_group(pid, signal.SIGKILL)
        status = program.process.wait()
        for pipe in list(program.pipes):
            self._pass_on(program, pipe)
        self._programs.remove(program)
        self._left.append(program)
        self.status = self.status or status
        self._send("x", program.rank, b"%d %d" % (status, self._told))

    def _pass_on(self, program: _Program, pipe: int) -> None:
        """Pass on what a program has written, up to 64 KiB of it."""
        try:
            data = os.read(pipe, 65536)
        except BlockingIOError:
            return
        kind = program.pipes[pipe]
        if not data:
            self._selector.unregister(pipe)
            del program.pipes[pipe]
        for piece in _PIECES.findall(data):
            whole = piece.endswith(b"\n")
            self._send(kind if whole else kind.upper(), program.rank, piece.rstrip(b"\n"))

    def _read_orders(self, control: int) -> None:
        data = os.read(control, 4096)
        self._orders += data
        *lines, self._orders = self._orders.split(b"\n")
        if not data:
            self._selector.unregister(control)
            # An mpirun that is killed leaves a directory that may stop a later one.
            lines.append(b"end" if self._outlet is None else b"kill")
        for line in lines:
            if line == b"end":
                self._signal(signal.SIGTERM)
                self._kill_at = time.monotonic() + _SECONDS_TO_END
            elif line == b"kill":
                self._signal(signal.SIGKILL)
            elif line.isdigit():  # mpirun's, which does the rest by itself
                self._signal(int(line))

    def _signal(self, number: int) -> None:
        self._told = self._told or number in (signal.SIGTERM, signal.SIGKILL)
        for program in self._programs:
            _signal_group(program.process.pid, number)

    def _send(self, kind: str, rank: int, content: bytes = b"") -> None:
        if self._outlet is not None:
            self._outlet.send(kind, rank, content)


def read_line(descriptor: int) -> str:
    """Return a line without its end, and not a byte of what follows it; empty at the end."""
    line = b""
    while (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode()


def find_missing(task: dict[str, Any], environment: dict[str, str]) -> str | None:
    """Return what a host lacks to do its task; None: nothing."""
    program = task["command"][0]
    if shutil.which(program, path=environment.get("PATH")) is None:
        if os.path.isfile(program):  # noqa: PTH113
            how = f"write  python {program}" if program.endswith(".py") else "see chmod +x"
            return f"{program!r} is a file, but no program that can be executed; {how}"
        return f"there is no program {program!r} (PATH={environment.get('PATH', '')})"
    gone = next((file for file in task["files"] if not os.path.exists(file)), None)  # noqa: PTH110
    if gone is not None:
        return f"there is no file {gone!r} (in {os.getcwd()})"  # noqa: PTH109
    return None


def serve() -> int:
    """Be the agent of a host: check the task, wait for the word to go, and mind the ranks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = read_line(0)
    if not line:
        return 1
    task = json.loads(line)
    environment = dict(os.environ) | task["environment"]
    with suppress(OSError):  # then it is whether the program is found that matters
        os.chdir(task["directory"])
    outlet = Outlet(1, paced=False)
    missing = find_missing(task, environment)
    outlet.send(*(("h", 0) if missing is None else ("f", 0, json.dumps(missing).encode())))
    outlet.flush()
    minder = Minder(0, None if task["raw"] else outlet)
    if missing is not None or read_line(0) != "go":
        return 0
    for rank, more in task["ranks"]:
        minder.start(rank, task["command"], environment | more)
    minder.mind()
    return exit_status(minder.status) if task["raw"] else 0


def relay(command: list[str]) -> int:
    """Be what mpirun starts for a rank.

    The rank is minded by a process out of mpirun's reach, so that what the rank wrote is passed
    on even if mpirun kills all that it has started.
    """
    rank = next((int(os.environ[name]) for name in _RANKS if name in os.environ), None)
    if rank is None:
        sys.exit(f"hvdrun: mpirun tells its processes no rank: none of {', '.join(_RANKS)} is set")
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    control, order = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(order)
        os.setsid()
        outlet = Outlet(1, paced=True)
        minder = Minder(control, outlet)
        minder.start(rank, command, dict(os.environ))
        minder.mind()
        if minder.status > 0:
            time.sleep(_SECONDS_FOR_OTHERS)
        os._exit(exit_status(minder.status))
    os.close(control)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: os.write(order, b"%d\n" % number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def exit_status(status: int) -> int:
    """Return a status as a shell has it: 128 and the signal."""
    return status if status >= 0 else 128 - status


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when `parent` ends."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)


if __name__ == "__main__":
    sys.exit(relay(sys.argv[2:]) if sys.argv[1:2] == ["--"] else serve())
