"""Stall warnings, errors in place of a hang, and deadlocks found for certain.

Every rank looks at itself once in a while.  One that has waited for longer than a moment reports
to rank 0, which asks all ranks what they are at, and then knows who waits for whom (see
`hvdkit.engine.waits`).  A deadlock is acted on once it has been seen for some time, with the very
same operations every time.

A rank that leaves says to the others how many operations it has begun in each channel.  Whoever
is in a later one there waits in vain, and is told so at once.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from hvdkit.collectives.calls import JOIN, Call
from hvdkit.engine.channel import Channel
from hvdkit.engine.handles import Handle
from hvdkit.engine.negotiation import left_error
from hvdkit.engine.requests import Key
from hvdkit.engine.waits import (
    Report,
    Wait,
    describe,
    describe_deadlock,
    find_deadlock,
    find_waits,
)
from hvdkit.errors import HorovodInternalError, StallError

if TYPE_CHECKING:
    from hvdkit.engine.progress import Progress

log = logging.getLogger("hvdkit")

#: Waits shorter than this are nobody's business.
MOMENT = 2.0

#: Seconds between looks, where no limit asks for shorter ones.
PACE = 1.0

#: The same once a rank has left: others may begin what cannot end.
PACE_AT_THE_END = 0.25

#: In which a thread is, innermost, that waits for other ranks.
WAITING_IN = frozenset(
    f"hvdkit.{name}"
    for name in (
        "collectives.executor",
        "collectives.group",
        "collectives.short_hierarchical",
        "engine.communicator",
        "engine.handles",
        "transport.base",
        "transport.mpi",
        "transport.tcp.link",
        "transport.tcp.mesh",
        "transport.tcp.transport",
    )
)


@dataclass(frozen=True)
class Question:
    """Rank 0 asks what a rank is at."""

    number: int


@dataclass(frozen=True)
class Abort:
    """Rank 0 ends a channel."""

    key: str
    error: HorovodInternalError


@dataclass(frozen=True)
class Farewell:
    """A rank that leaves has begun so many operations in channels, and begins no more."""

    operations: Mapping[str, int]


@dataclass
class _Round:
    """The answers to one question."""

    number: int
    asked: float
    reports: dict[int, Report] = field(default_factory=dict)
    judged: bool = False


class Watch:
    """Looks after one rank; on rank 0, after all.

    Args:
        channels: of this rank; a live list.
        rank: this rank.
        size: of the job.
        check: seconds after which a wait is worth a warning; 0: never.
        shutdown: seconds after which it is an error; 0: never.
        deadlock: seconds for which a deadlock must last to be an error; 0: never.
    """

    def __init__(
        self,
        channels: list[Channel],
        *,
        rank: int,
        size: int,
        check: float,
        shutdown: float,
        deadlock: float,
    ) -> None:
        self._channels = channels
        self._rank = rank
        self._size = size
        self._check = check
        self._shutdown = shutdown
        self._deadlock = deadlock
        limits = [seconds for seconds in (check, shutdown, deadlock) if seconds]
        self.interval: float | None = min([PACE, *(s / 4 for s in limits)]) if limits else None
        """Seconds between looks; None: there is nothing to look for."""
        self._limited = bool(limits)
        self._moment = min([MOMENT, *(seconds / 2 for seconds in limits)])
        self._looked = 0.0
        self._round = _Round(0, 0.0)
        self._waited: dict[str | Key, float] = {}  # for how long, when that was last looked at
        self._stuck: tuple[Any, float] = ((), 0.0)
        self._callers: set[int] = set()  # threads that have been seen in hvdkit
        self._last: dict[str, dict[int, int]] = {}  # of ranks that have left, by channel
        self._parted: set[str] = set()
        self._progress: Progress

    def attach(self, progress: Progress) -> None:
        """Say through whom to talk to the other ranks."""
        self._progress = progress

    def look(self) -> None:
        """Report to rank 0 if something has taken long here.  On the progress thread."""
        now = time.monotonic()
        if self.interval is None or now - self._looked < self.interval:
            return
        self._looked = now
        self._end_what_cannot_end()
        if not self._limited:
            return
        report = self._report()
        longest = max([*(s.seconds for s in report.stages.values()), *report.pending.values(), 0])
        if longest < self._moment:
            return
        if self._rank:
            self._progress.post(0, report)
        else:
            self._ask()

    def part(self) -> bool:
        """Say farewell in every channel that has come to rest; return whether all have.

        For a rank that leaves, when nothing new begins in its channels.
        """
        farewells: dict[int, dict[str, int]] = {}
        for channel in self._channels:
            if channel.key not in self._parted and not channel.lane.busy():
                self._parted.add(channel.key)
                for rank in channel.ranks:
                    farewells.setdefault(rank, {})[channel.key] = channel.group.operations
        for rank, operations in farewells.items():
            if rank != self._rank:
                self._progress.post(rank, Farewell(operations))
        return all(channel.key in self._parted for channel in self._channels)

    def heard_all(self) -> bool:
        """Return whether all other ranks have said farewell in every channel."""
        return all(
            len(self._last.get(channel.key, ())) >= len(channel.ranks) - 1
            for channel in self._channels
        )

    def in_step(self, channel: Channel) -> bool:
        """Return whether all ranks have left a channel after the same operations."""
        last = self._last.get(channel.key, {})
        return all(
            last.get(rank) == channel.group.operations
            for rank in channel.ranks
            if rank != self._rank
        )

    def deliver(self, source: int, message: Question | Report | Abort | Farewell) -> None:
        """Take a message of another rank's watch."""
        if isinstance(message, Question):
            self._progress.post(0, self._report(message.number))
        elif isinstance(message, Abort):
            self._end(message)
        elif isinstance(message, Farewell):
            for key, operations in message.operations.items():
                self._last.setdefault(key, {})[source] = operations
            self.interval = min(self.interval or PACE, PACE_AT_THE_END)
            self._end_what_cannot_end()
        elif message.answers == 0:
            self._ask()
        elif message.answers == self._round.number:
            self._round.reports[source] = message
            self._judge_when_all_have_answered()

    def _end_what_cannot_end(self) -> None:
        """End channels in which this rank is further than one that has left."""
        for channel in self._channels:
            last, group = self._last.get(channel.key, {}), channel.group
            gone = [rank for rank, operations in last.items() if group.operations > operations]
            if gone and group.failure is None:
                group.abort(left_error(channel.call or Call("a collective", None), gone))

    def _report(self, answers: int = 0) -> Report:
        now = time.perf_counter()
        operations = self._progress.pending()
        return Report(
            stages={channel.key: channel.look() for channel in self._channels},
            pending={op.key: now - op.submitted for op in operations},
            awaited={op.key: op.submitted for op in operations if op.handle.waiters},
            idle=self._every_thread_waits(),
            last=self._progress.last,
            answers=answers,
        )

    def _ask(self) -> None:
        """Ask all ranks what they are at, unless that is under way.  On rank 0."""
        now, last = time.monotonic(), self._round
        patience = 1 if last.judged else 4
        if self.interval is None or now - last.asked < patience * self.interval:
            return
        if last.number and not last.judged:  # some rank's progress thread cannot answer
            self._judge(last.reports)
        self._round = _Round(last.number + 1, now, {0: self._report()})
        for rank in range(1, self._size):
            self._progress.post(rank, Question(self._round.number))
        self._judge_when_all_have_answered()

    def _judge_when_all_have_answered(self) -> None:
        here = set(range(self._size)) - self._progress.gone
        if here <= set(self._round.reports) and not self._round.judged:
            self._round.judged = True
            self._judge(self._round.reports)

    def _judge(self, reports: Mapping[int, Report]) -> None:
        """Warn of what has taken long, and end what will never end."""
        waits = find_waits(reports, self._progress.waiting())
        for wait in waits:
            if wait.title == JOIN or not wait.late:  # waiting is what join() is for
                continue
            if self._shutdown and wait.seconds >= self._shutdown:
                self._abort(wait, describe(wait, reports))
            elif self._is_worth_a_warning(wait):
                log.warning("%s", describe(wait, reports))
        self._waited = {wait.where: wait.seconds for wait in waits}
        stuck = find_deadlock(reports, waits)
        hopeless = [wait for wait in waits if set(wait.blocked) & set(stuck)]
        state = [(stuck, wait.where, wait.which, wait.certain) for wait in hopeless]
        now = time.monotonic()
        if not stuck or state != self._stuck[0]:
            self._stuck = (state, now)
        elif self._deadlock and now - self._stuck[1] >= self._deadlock:
            for wait in hopeless:
                self._abort(wait, describe_deadlock(stuck, waits))

    def _is_worth_a_warning(self, wait: Wait) -> bool:
        """Return whether a wait has passed another multiple of the limit."""
        if not self._check:
            return False
        before = self._waited.get(wait.where, 0.0)
        if before > wait.seconds:  # that was another operation
            before = 0.0
        return wait.seconds // self._check > before // self._check

    def _abort(self, wait: Wait, text: str) -> None:
        error = StallError(text)
        if not isinstance(wait.where, str):
            self._progress.give_up(wait.where, error)
            return
        abort = Abort(wait.where, error)
        for rank in wait.ranks:
            if rank:
                self._progress.post(rank, abort)
            else:
                self._end(abort)

    def _end(self, abort: Abort) -> None:
        for channel in self._channels:
            if channel.key == abort.key:
                channel.group.abort(abort.error)

    def _every_thread_waits(self) -> bool:
        """Return whether all threads wait that may make calls, as far as one can see.

        Those are all but daemons; and daemons that have been seen in hvdkit.
        """
        frames = sys._current_frames()
        try:
            for thread in threading.enumerate():
                frame = frames.get(thread.ident or 0)
                if frame is None or thread.name.startswith("hvdkit-"):
                    continue
                if waits_for_others(frame):
                    self._callers.add(thread.ident or 0)
                elif not thread.daemon or thread.ident in self._callers:
                    return False
            return True
        finally:  # this function's own frame is among them, in a circle that would keep users' data
            frames.clear()


def waits_for_others(frame: FrameType) -> bool:
    """Return whether a thread, of this innermost frame, waits for other ranks until they come."""
    if frame.f_code is Handle.wait.__code__ and frame.f_locals.get("timeout") is not None:
        return False
    if frame.f_globals.get("__name__") == "threading" and frame.f_back is not None:
        frame = frame.f_back  # threads that wait for messages over TCP do it in a Condition
    return frame.f_globals.get("__name__") in WAITING_IN
