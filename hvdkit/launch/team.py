"""The agents of a job, one a host: to start them, to hear what they lack, and to mind them."""

from __future__ import annotations

import json
import os
import selectors
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO

from hvdkit.errors import LauncherError, format_ranks
from hvdkit.launch.agent import exit_status, read_record
from hvdkit.launch.agents import Agent
from hvdkit.launch.guard import how_it_ended
from hvdkit.launch.output import Display
from hvdkit.launch.remarks import Remarks

_SECONDS_BETWEEN_LOOKS = 0.1
#: What other ranks, which fail for the same reason, have to say so.
_SECONDS_FOR_OTHERS = 1.0
#: What mpirun may take to end when all ranks have.
_SECONDS_AFTER_ALL = 10.0
#: How long pipes are silent before they count as read when the agents have ended: others, such as a
#: shared ssh connection, may hold them open for ever.
_SECONDS_FOR_THE_REST = 2.0
#: What agents have to end their ranks, before these are killed.
_SECONDS_TO_END = 8.0


@dataclass(frozen=True)
class End:
    """How a rank has ended."""

    rank: int
    host: str
    status: int
    """Negative for a signal."""
    told: bool
    """It was told to end."""


class Team:
    """The agents of a job.  Leaving the context ends them, and all that they have started.

    Args:
        agents: one a host, or the one that minds mpirun.
        size: how many ranks will start.
        display: for what they write.
        remarks: to drop those of mpirun's that say nothing new; None: all are shown.
    """

    def __init__(
        self,
        agents: Sequence[Agent],
        size: int,
        display: Display,
        *,
        remarks: Remarks | None = None,
    ) -> None:
        self._agents = agents
        self._size = size
        self._display = display
        self._remarks = remarks
        self._selector = selectors.DefaultSelector()
        for each in agents:
            for pipe in (each.stdout, each.stderr):
                self._selector.register(pipe, selectors.EVENT_READ, each)
        self._open = 2 * len(agents)
        self._started: dict[int, str] = {}  # on which host
        self.ends: list[End] = []
        """In the order in which they became known."""

    def check(self, seconds: float) -> None:
        """Return when all agents are ready to start.

        Raises:
            LauncherError: some cannot be reached or lack something; names all of them and why.
        """
        deadline = time.monotonic() + seconds
        while True:
            late = [each for each in self._agents if not each.ready and each.missing is None]
            late = [each for each in late if self._is_open(each)]
            left = deadline - time.monotonic()
            if not late or left <= 0:
                break
            self._look(min(left, _SECONDS_BETWEEN_LOOKS))
        unready = [each for each in self._agents if not each.ready]
        problems = [f"  {each.task.host}: {each.why_not_ready(seconds)}" for each in unready]
        if problems:
            raise LauncherError(
                "nothing was started, because these hosts cannot take part:\n" + "\n".join(problems)
            )

    def go(self) -> None:
        """Let all agents start what they shall."""
        for each in self._agents:
            each.tell("go")

    def wait(self, start_timeout: float) -> int:
        """Return the job's exit status, in bounded time after the first rank has failed.

        Raises:
            LauncherError: not all ranks had started within `start_timeout` seconds.
        """
        began = time.monotonic()
        failed: float | None = None
        over: float | None = None
        quiet = began
        while self._open:
            heard = self._look(_SECONDS_BETWEEN_LOOKS)
            self._display.release_overdue()
            now = time.monotonic()
            if failed is None and self._has_failed():
                failed = now
            if failed is not None and now - failed > _SECONDS_FOR_OTHERS:
                self.end()
                break
            if over is None and len(self.ends) == self._size:
                over = now
            if over is not None and now - over > _SECONDS_AFTER_ALL:
                self.end()
                return 0
            if heard or any(each.process.poll() is None for each in self._agents):
                quiet = now
            if now - quiet > _SECONDS_FOR_THE_REST:
                break
            if now - began > start_timeout and len(self._started) < self._size and not self.ends:
                raise LauncherError(
                    f"not all ranks had started after {start_timeout:g} s: "
                    f"{len(self._started)} of {self._size} had; give more with --start-timeout"
                )
        return self._status()

    def end(self) -> None:
        """End all ranks, and show what they still have to say."""
        for each in self._agents:
            each.tell("end")
        deadline = time.monotonic() + _SECONDS_TO_END
        while self._open and time.monotonic() < deadline:
            self._look(_SECONDS_BETWEEN_LOOKS)

    def first_failure(self) -> End | None:
        """Return the end of the rank that failed first, those that were told to end apart."""
        failures = [end for end in self.ends if end.status]
        return min(
            failures, key=lambda end: (end.told, self._display.is_secondary(end.rank)), default=None
        )

    def explain(self) -> str | None:
        """Return what went wrong, in a line; None: nothing."""
        first = self.first_failure()
        if first is not None and not first.told:
            return f"rank {first.rank} of {self._size} on {first.host} {how_it_ended(first.status)}"
        for each in self._agents:
            if each.met_a_killed_mpirun:
                return (
                    "mpirun could not start, because an earlier one with the same process number "
                    "was killed and has left its session directory behind. Remove ompi.* in "
                    f"{os.environ.get('TMPDIR', '/tmp')} (those that are not of a running mpirun; "
                    "the number at the end is its process), or start the job again"
                )
        return self._lost() if self._status() else None

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is not None and all(each.ready for each in self._agents):
                self.end()
            self._show_remarks()
        finally:
            for each in self._agents:
                each.let_go()
            for each in self._agents:
                each.wait(_SECONDS_TO_END)
            self._selector.close()

    def _look(self, seconds: float) -> bool:
        """Take what agents say, for `seconds` at most; return whether there was anything."""
        found = self._selector.select(seconds)
        for key, _ in found:
            each: Agent = key.data
            pipe: IO[bytes] = key.fileobj  # type: ignore[assignment]
            lines, is_open = each.read(pipe)
            for line in lines:
                self._take(each, line, of_stdout=pipe is each.stdout)
            if not is_open:
                self._selector.unregister(pipe)
                self._open -= 1
        return bool(found)

    def _take(self, each: Agent, line: bytes, *, of_stdout: bool) -> None:
        record = read_record(line) if of_stdout else None
        if record is None:
            line = line.replace(b"\0", b"")  # Open MPI ends its texts with one
            each.note(line)
            if each.ready:
                for said in [line] if self._remarks is None else self._remarks.take(line):
                    self._display.write_unlabelled(said + b"\n")
            return
        kind, rank, content = record
        if kind in "oOeE":
            self._display.write(rank, kind, content)
            if kind == "e" and self._remarks is not None:
                self._remarks.hear(content)
        elif kind == "s":
            self._started[rank] = content.decode()
        elif kind == "h":
            each.ready = True
        elif kind == "f":
            each.missing = str(json.loads(content))
        elif kind == "x":
            status, told = map(int, content.split())
            host = self._started.get(rank, each.task.host)
            self.ends.append(End(rank, host, status, bool(told)))
            self._display.end_rank(rank, failed=status != 0)

    def _show_remarks(self) -> None:
        """Show what mpirun has said of the end, as far as `explain` does not say it."""
        if self._remarks is None:
            return
        first = self.first_failure()
        named = [] if first is None or first.told else [first.rank]
        for line in self._remarks.rest(named):
            self._display.write_unlabelled(line + b"\n")

    def _has_failed(self) -> bool:
        if any(end.status for end in self.ends):
            return True
        known = {end.rank for end in self.ends}
        return any(
            not self._is_open(each) and {rank for rank, _ in each.task.ranks} - known
            for each in self._agents
        )

    def _is_open(self, each: Agent) -> bool:
        return any(key.data is each for key in self._selector.get_map().values())

    def _status(self) -> int:
        first = self.first_failure()
        if first is not None and not first.told:
            return exit_status(first.status)
        if len(self.ends) == self._size and first is None:
            return 0
        if self._agents[0].task.raw:
            self._agents[0].wait(_SECONDS_TO_END)
            return exit_status(self._agents[0].process.returncode) or 1
        return 1

    def _lost(self) -> str:
        """Return what is known of a job that ended without its ranks having said so."""
        each = next((each for each in self._agents if each.task.raw), None)
        if each is not None:
            lost = sorted(self._started.keys() - {end.rank for end in self.ends})
            if each.process.returncode == 0 and lost:
                how = f"without word of how {format_ranks(lost)} did"
                return f"mpirun ended {how}; what it said stands above"
            return f"mpirun ended with status {self._status()}; what it said stands above"
        known = {end.rank for end in self.ends}
        hosts = [
            each.task.host for each in self._agents if {rank for rank, _ in each.task.ranks} - known
        ]
        return f"the connection to {', '.join(hosts)} was lost, and with it its ranks"
