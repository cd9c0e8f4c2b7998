"""Who waits for whom, worked out from what the ranks report.

    wait in a channel          for the ranks of its group that have begun fewer operations there
    wait for a named one       for the ranks of its process set that have not announced it

A rank is stuck for ever if all its threads wait in hvdkit, and for each thing that they wait for
somebody late is stuck for ever as well.  That is computed from above: all ranks whose threads wait,
less those that have a wait which may yet end, until none is left to take away.  No time limit comes
into it; but what is reported may have changed on the way, so it is certain only when it is found
again later with the very same operations.

This module is pure: reports in, waits out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdkit.collectives.calls import JOIN, Call
from hvdkit.engine.channel import Stage
from hvdkit.engine.requests import Key
from hvdkit.errors import describe_by_rank, format_ranks

#: What rank 0 knows of named operations: the call, who has announced it, who has not.
Named = Mapping[Key, tuple[Call, tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Report:
    """What a rank is at.

    Args:
        stages: by channel.
        pending: seconds since named operations were submitted that have not begun.
        awaited: those of them for which a thread waits, each with a mark of its own: another use
            of the name has another mark.
        idle: whether every thread that may make calls waits in hvdkit.
        last: title of the last named operation that has begun; empty if none has.
        answers: the question's number; 0: unasked, because something has taken long.
    """

    stages: Mapping[str, Stage]
    pending: Mapping[Key, float]
    awaited: Mapping[Key, float]
    idle: bool
    last: str = ""
    answers: int = 0


@dataclass(frozen=True)
class Wait:
    """One thing for which ranks wait.

    Args:
        where: the channel's key, or the named operation's.
        which: of the operations there: another one is another wait.
        title: such as ``"allreduce 'loss'"``.
        ranks: all that take part.
        waiting: those whose turn it is to wait.
        blocked: those in which a thread does nothing else; also ranks that have joined.
        late: those that have not come.
        certain: those of them of which it is known that they have yet to come.
        seconds: the longest that any has waited.
    """

    where: str | Key
    which: Any
    title: str
    ranks: tuple[int, ...]
    waiting: tuple[int, ...]
    blocked: tuple[int, ...]
    late: tuple[int, ...]
    certain: tuple[int, ...]
    seconds: float


def find_waits(reports: Mapping[int, Report], named: Named) -> list[Wait]:
    """Return what ranks wait for, and who is late.

    Args:
        reports: by rank, of those that could answer.
        named: what rank 0 knows of named operations.
    """
    keys = sorted({key for report in reports.values() for key in report.stages})
    in_channels = [_wait_in_channel(reports, key) for key in keys]
    waits = [wait for wait in in_channels if wait is not None]
    for where, (call, ready, absent) in named.items():
        there = [rank for rank in ready if rank in reports]
        blocked = tuple(rank for rank in there if where in reports[rank].awaited)
        waits.append(
            Wait(
                where=where,
                which=tuple(reports[rank].awaited[where] for rank in blocked),
                title=call.title,
                ranks=tuple(sorted({*ready, *absent})),
                waiting=ready,
                blocked=blocked,
                late=absent,
                certain=absent,
                seconds=max([reports[rank].pending.get(where, 0.0) for rank in there], default=0.0),
            )
        )
    return waits


def _wait_in_channel(reports: Mapping[int, Report], key: str) -> Wait | None:
    """Return the wait for the latest operation of a channel that is under way; None: none is."""
    stages = {rank: r.stages[key] for rank, r in reports.items() if key in r.stages}
    under_way = {rank: stage for rank, stage in stages.items() if stage.seconds > 0}
    if not under_way:
        return None
    latest = max(stage.operations for stage in under_way.values())
    there = tuple(r for r in sorted(under_way) if under_way[r].operations == latest)
    # Ranks that have joined serve the others, who have a call that can be named, if there are any.
    waiting = tuple(r for r in there if under_way[r].title != JOIN) or there
    first = under_way[waiting[0]]
    behind = tuple(rank for rank in sorted(stages) if stages[rank].operations < latest)
    # A rank without the channel has let go of it, or is about to make it; or it did not answer.
    unknown = tuple(rank for rank in first.ranks if rank not in stages)
    return Wait(
        where=key,
        which=latest,
        title=first.title,
        ranks=first.ranks,
        waiting=waiting,
        blocked=tuple(rank for rank in there if under_way[rank].awaited),
        late=tuple(sorted(behind + unknown)),
        certain=behind,
        seconds=max(under_way[rank].seconds for rank in waiting),
    )


def find_deadlock(reports: Mapping[int, Report], waits: Sequence[Wait]) -> list[int]:
    """Return the ranks none of which can go on, whatever the others do."""
    blocked_in = {
        rank: [wait for wait in waits if rank in wait.blocked]
        for rank, report in reports.items()
        if report.idle
    }
    stuck = {rank for rank, theirs in blocked_in.items() if theirs}
    while True:
        free = {
            rank
            for rank in stuck
            if not all(stuck.intersection(wait.certain) for wait in blocked_in[rank])
        }
        if not free:
            return sorted(stuck)
        stuck -= free


def describe(wait: Wait, reports: Mapping[int, Report]) -> str:
    """Return a warning that names the late ranks, and says what each is at."""
    shown = {rank: _what_it_does(rank, wait, reports) for rank in wait.late}
    return (
        f"{wait.title} is stalled: {format_ranks(wait.waiting)} waited {wait.seconds:.0f} s for "
        f"{format_ranks(wait.late)}\n{describe_by_rank(shown)}\n"
        "Every rank must make the same calls; a rank with less data than the others calls join()."
    )


def describe_deadlock(stuck: Sequence[int], waits: Sequence[Wait]) -> str:
    """Return the error of ranks that wait for each other."""
    shown = {
        rank: " and ".join(
            f"{wait.title}{_place(wait)}, for {format_ranks(wait.late)}"
            for wait in waits
            if rank in wait.blocked
        )
        for rank in stuck
    }
    return (
        f"deadlock: {format_ranks(stuck)} wait for each other in different calls\n"
        f"{describe_by_rank(shown)}\n"
        "Make the same calls, on the same process sets, in the same order on every rank; calls "
        "that are matched by name are the asynchronous ones."
    )


def _what_it_does(rank: int, wait: Wait, reports: Mapping[int, Report]) -> str:
    report = reports.get(rank)
    if report is None:
        return "does not answer"
    elsewhere = [
        stage.title
        for key, stage in report.stages.items()
        if key != wait.where and stage.seconds and stage.awaited
    ] + [repr(name) for _, name in report.awaited]
    now = f"waits for {', '.join(elsewhere)}" if elsewhere else "is in its own code"
    if report.idle and not elsewhere:
        now = "is in hvdkit"
    return f"{_what_it_did(wait, report)}; {now}"


def _what_it_did(wait: Wait, report: Report) -> str:
    """Return what a rank did last of the kind that the others wait for."""
    if not isinstance(wait.where, str):
        return f"last did {report.last}" if report.last else "has done nothing by name yet"
    stage = report.stages.get(wait.where)
    if stage is None:
        return "takes no part there any more"
    if not stage.operations:
        return "has done nothing there yet"
    return f"last did {stage.title} (operation {stage.operations} there)"


def _place(wait: Wait) -> str:
    if isinstance(wait.where, str):
        return f" ({wait.where})"
    return f" (asynchronous, process set {wait.where[0]})"
