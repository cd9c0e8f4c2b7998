"""An agent on a host, as the launcher sees it: what it is told, and what it says."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from hvdkit.errors import LauncherError
from hvdkit.launch import agent

#: Reads the agent from the first line of stdin.  What the directory holds is not to be imported.
_BOOT = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "exec(compile(eval(open(0, 'rb', 0, closefd=False).readline()), 'hvdkit-agent', 'exec'))"
)

#: Of the pipe to an agent: a task must fit in it, for one that cannot be reached reads nothing.
_PIPE_BYTES = 2**20

#: What is remembered of an agent's stderr, to tell why it could not do its work.
_LINES_OF_REASON = 5

_KILLED_MPIRUN = b"PMIx server's listener thread failed to start"


@dataclass(frozen=True)
class Task:
    """What an agent is told.  It goes to it through a pipe: it may hold a secret."""

    host: str
    command: Sequence[str]
    ranks: Sequence[tuple[int, Mapping[str, str]]] = ()
    """The ranks to start, and the environment of each."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for all of them, besides those that the host has."""
    files: Sequence[str] = ()
    """What must be there, besides the program."""
    raw: bool = False
    """The program writes records by itself, as mpirun does with the agents that it starts."""
    python: str = sys.executable
    """What the agent itself runs in."""


class Agent:
    """An agent, as the launcher sees it.

    Args:
        task: what it shall do.
        reach: the command that runs a command on its host, which is appended; none: this host.
        environment: of the agent itself.
    """

    def __init__(self, task: Task, reach: Sequence[str], environment: Mapping[str, str]) -> None:
        self.task = task
        self.ready = False
        self.missing: str | None = None
        self.reason: list[str] = []
        self.met_a_killed_mpirun = False
        self._partial: dict[IO[bytes], bytes] = {}
        boot = [task.python, "-c", _BOOT]
        line = [*reach, "exec " + shlex.join(boot)] if reach else boot
        try:
            self.process = subprocess.Popen(
                line,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C reaches the launcher alone
            )
        except OSError as exc:
            raise LauncherError(f"{line[0]} cannot be started: {exc}") from exc
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.stdout, self.stderr = self.process.stdout, self.process.stderr
        for pipe in (self.stdout, self.stderr):
            os.set_blocking(pipe.fileno(), False)
        told = {
            "command": list(task.command),
            "directory": str(Path.cwd()),
            "environment": dict(task.environment),
            "files": list(task.files),
            "ranks": [(rank, dict(more)) for rank, more in task.ranks],
            "raw": task.raw,
        }
        source = Path(agent.__file__).read_text(encoding="utf-8")
        assert self.process.stdin is not None
        with suppress(OSError):
            fcntl.fcntl(self.process.stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.tell(f"{source!a}\n{json.dumps(told)}")

    def tell(self, order: str) -> None:
        """Send a line; one who has gone hears nothing."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(order.encode() + b"\n")
            self.process.stdin.flush()

    def read(self, pipe: IO[bytes]) -> tuple[list[bytes], bool]:
        """Return the lines that have come, without their ends, and whether the pipe is open."""
        try:
            data = os.read(pipe.fileno(), 65536)
        except BlockingIOError:
            return [], True
        *lines, rest = (self._partial.pop(pipe, b"") + data).split(b"\n")
        if not data:
            return ([*lines, rest] if rest else lines), False
        self._partial[pipe] = rest
        return lines, True

    def note(self, line: bytes) -> None:
        """Remember what was said on stderr."""
        self.met_a_killed_mpirun |= _KILLED_MPIRUN in line
        self.reason = [*self.reason, line.decode(errors="replace").strip()][-_LINES_OF_REASON:]

    def let_go(self) -> None:
        """Close the pipes: without a launcher it ends, with all that it has started."""
        for pipe in (self.process.stdin, self.stdout, self.stderr):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        if not self.ready:  # it may never read that
            self._kill()

    def wait(self, seconds: float) -> None:
        """Return when it has ended; kill it if that takes longer than `seconds`."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._kill()
            self.process.wait()

    def why_not_ready(self, seconds: float) -> str:
        """Return why it did not get ready within `seconds`."""
        if self.missing is not None:
            return self.missing
        said = " ".join(filter(None, self.reason))
        status = self.process.poll()
        if status is None and not said:
            return f"no answer within {seconds:g} s"
        return f"cannot be reached ({said or f'status {status}'})"

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
