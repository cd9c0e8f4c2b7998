"""Who decides what happens next among named operations: rank 0, as announcements come in.

    rank 0      submits A, B                       decides: B, then A
    rank 1      submits B ---- announces B ---->            |   |
                submits A ---- announces A ---->  <---------+---+  both run B, then A

An operation can begin once every rank of its process set has announced it.  The order of the
decisions is one for the whole job: every rank runs those that concern it in that order.  So
operations of overlapping process sets cannot wait for each other in a circle: of those decided and
not complete, all ranks of the earliest are free to run it.

A rank announces whenever it has something new and is told whenever something is decided; nothing
runs by the clock.  After its first use a request travels as its 64-bit signature.

A rank that leaves announces that as well.  It goes on until the decision about it comes: until then
it takes part in what the others were told to run with it, and nothing is decided with it after.

This module is pure: messages in, decisions out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from hvdkit.collectives.calls import JOINABLE, Call, joined_error, mismatch
from hvdkit.engine.requests import Key, Request
from hvdkit.errors import HvdkitError, PeerError, format_ranks

#: Requests of each rank that travel as signatures: more than most jobs have.
MOST_KNOWN = 4096


@dataclass(frozen=True)
class Announcement:
    """Operations that a rank is ready for, in order of submission."""

    items: tuple[tuple[Key, int], ...] = ()
    """``(key, signature)`` of each."""
    requests: Mapping[int, Request] = field(default_factory=dict)
    """By signature, those that this rank has not sent before."""
    joined: bool = False
    """Whether the rank has called `join`."""
    leaving: bool = False
    """Whether this is the rank's last."""


@dataclass(frozen=True)
class Run:
    """Operations that begin now, together if there are several."""

    ranks: tuple[int, ...]
    keys: tuple[Key, ...]
    requests: tuple[Request, ...]
    absent: tuple[int, ...] = ()
    """Those of the ranks that have joined, and bring nothing."""

    def brief(self) -> Run:
        """Return it without what a rank knows that has announced the operations itself."""
        return Run((), self.keys, (), ())


@dataclass(frozen=True)
class Fail:
    """An operation that cannot begin."""

    ranks: tuple[int, ...]
    key: Key
    error: HvdkitError


@dataclass(frozen=True)
class AllJoined:
    """Every rank has called `join`."""

    ranks: tuple[int, ...]
    last: int


@dataclass(frozen=True)
class Left:
    """A rank takes part in nothing that is decided after this; if it is rank 0, nothing is."""

    ranks: tuple[int, ...]
    rank: int


Decision = Run | Fail | AllJoined | Left


def keep(known: dict[int, Request], request: Request) -> None:
    """Add to the requests that a rank has sent.

    The rank and rank 0 both keep count, by this one rule, so that they forget the same at once.
    """
    if len(known) >= MOST_KNOWN:
        known.clear()
    known[request.call.signature] = request


class Coordinator:
    """Matches announcements.  On rank 0 only; local, not for several threads at once.

    Args:
        members: the ranks of each process set by its number; a live mapping, 0 is all ranks.
        fuse_bytes: the most that is fused.
    """

    def __init__(self, members: Mapping[int, tuple[int, ...]], *, fuse_bytes: int) -> None:
        self._members = members
        self._fuse_bytes = fuse_bytes
        self._known: dict[int, dict[int, Request]] = defaultdict(dict)  # by rank and signature
        self._shared: WeakValueDictionary[int, Request] = WeakValueDictionary()
        self._pending: dict[Key, dict[int, list[Request]]] = {}  # no list in it is empty
        self._touched: dict[Key, None] = {}  # a set that keeps its order
        self._joined: list[int] = []
        self._leaving: list[int] = []
        self._left: set[int] = set()
        self._given_up: dict[Key, dict[int, list[HvdkitError]]] = {}  # to ranks not yet there
        self._late: list[Fail] = []
        self._ended = False

    def announce(self, rank: int, announcement: Announcement) -> None:
        """Take note of what `rank` is ready for."""
        if self._ended:
            return
        known = self._known[rank]
        for key, signature in announcement.items:
            request = known.get(signature)
            if request is None:
                request = self._shared.setdefault(signature, announcement.requests[signature])
                keep(known, request)
            if not self._is_late(rank, key):
                self._pending.setdefault(key, {}).setdefault(rank, []).append(request)
                self._touched[key] = None
        if announcement.joined and not self._left:
            self._joined.append(rank)
        if announcement.leaving:
            self._leaving.append(rank)
            self._left.add(rank)
            self._joined.clear()
        if announcement.joined or announcement.leaving:
            self.reconsider()

    def reconsider(self) -> None:
        """Look at everything again: a process set has come or gone."""
        self._touched.update(dict.fromkeys(self._pending))

    def decide(self) -> list[Decision]:
        """Return what can begin, or must fail, in order."""
        decisions: list[Decision] = list(self._late)
        self._late.clear()
        touched, self._touched = self._touched, {}
        for key in touched:
            while (decision := self._decide(key)) is not None:
                decisions.append(decision)
        everyone = self._members[0]
        if len(self._joined) == len(everyone):
            decisions.append(AllJoined(everyone, self._joined[-1]))
            self._joined.clear()
            self._given_up.clear()
        for rank in self._leaving:
            decisions.append(Left(everyone, rank))
            self._forget(rank)
            if rank == 0:  # whose decision is the last
                self._ended = True
                self._pending.clear()
                break
        self._leaving.clear()
        return self._fuse(decisions)

    def waiting(self) -> dict[Key, tuple[Call, tuple[int, ...], tuple[int, ...]]]:
        """Return the operations that ranks wait for: a call, who has announced it, who has not."""
        found = {}
        for key, by_rank in self._pending.items():
            ready = tuple(sorted(by_rank))
            found[key] = (by_rank[ready[0]][0].call, ready, self._missing(key))
        return found

    def give_up(self, key: Key, error: HvdkitError) -> Fail | None:
        """Fail an operation for which ranks wait in vain; those who come later fail as well.

        None: nobody waits for it any more.
        """
        if key not in self._pending:
            return None
        for rank in self._missing(key):
            self._given_up.setdefault(key, {}).setdefault(rank, []).append(error)
        return Fail(tuple(self._take(key)), key, error)

    def _missing(self, key: Key) -> tuple[int, ...]:
        """Return the ranks that have yet to announce an operation."""
        here = {*self._pending[key], *self._joined}
        return tuple(rank for rank in self._members.get(key[0], ()) if rank not in here)

    def _forget(self, rank: int) -> None:
        """Let go of what a rank has announced that leaves, and could not begin."""
        self._known.pop(rank, None)
        for key, by_rank in list(self._pending.items()):
            by_rank.pop(rank, None)
            if not by_rank:
                del self._pending[key]

    def _is_late(self, rank: int, key: Key) -> bool:
        """Return whether the others have given up what `rank` announces."""
        errors = self._given_up.get(key, {}).get(rank)
        if not errors:
            return False
        self._late.append(Fail((rank,), key, errors.pop(0)))
        if not any(self._given_up[key].values()):
            del self._given_up[key]
        return True

    def _take(self, key: Key) -> dict[int, Request]:
        """Take the next use of a name off the table; return each rank's request, in rank order."""
        by_rank = self._pending[key]
        requests = {rank: by_rank[rank].pop(0) for rank in sorted(by_rank)}
        for rank in requests:
            if not by_rank[rank]:
                del by_rank[rank]
        if not by_rank:
            del self._pending[key]
        return requests

    def _decide(self, key: Key) -> Run | Fail | None:
        """Return what becomes of an operation if everyone is there; takes it off the table."""
        by_rank, ranks = self._pending.get(key), self._members.get(key[0])
        if by_rank is None or ranks is None:
            return None
        if len(by_rank) + len(self._joined) < len(ranks) and not self._left:  # a quick look
            return None
        missing = self._missing(key)
        gone = [rank for rank in missing if rank in self._left]
        if missing and not gone:
            return None
        absent = tuple(rank for rank in ranks if rank not in by_rank)
        requests = self._take(key)
        calls = {rank: request.call for rank, request in requests.items()}
        there, first = tuple(requests), next(iter(requests.values()))
        if gone:
            return Fail(there, key, left_error(first.call, gone))
        differ = len({call.signature for call in calls.values()}) > 1
        if differ or "error" in dict(first.call.parts):
            return Fail(there, key, mismatch(list(calls.values()), ranks=list(calls)))
        if absent and (first.call.kind not in JOINABLE or first.call.arguments is None):
            return Fail(there, key, joined_error(first.call, absent))
        return Run(ranks, (key,), (first,), absent)

    def _fuse(self, decisions: Sequence[Decision]) -> list[Decision]:
        """Join neighbours that may travel in one message."""
        groups: list[list[Any]] = []
        nbytes = 0
        for decision in decisions:
            last = groups[-1][-1] if groups else None
            size = decision.requests[0].nbytes if isinstance(decision, Run) else 0
            if _alike(last, decision) and nbytes + size <= self._fuse_bytes:
                groups[-1].append(decision)
                nbytes += size
            else:
                groups.append([decision])
                nbytes = size
        return [group[0] if len(group) == 1 else _together(group) for group in groups]


def _alike(one: Decision | None, other: Decision) -> bool:
    """Return whether two decisions may travel in one message."""
    return (
        isinstance(one, Run)
        and isinstance(other, Run)
        and other.requests[0].fusion is not None
        and one.requests[0].fusion == other.requests[0].fusion
        and one.keys[0][0] == other.keys[0][0]
        and one.absent == other.absent
    )


def _together(runs: Sequence[Run]) -> Run:
    keys = tuple(key for run in runs for key in run.keys)
    requests = tuple(request for run in runs for request in run.requests)
    return Run(runs[0].ranks, keys, requests, runs[0].absent)


def left_error(call: Call, left: Sequence[int]) -> PeerError:
    """Return the error of a call that ranks will never make."""
    return PeerError(
        f"{call.title}: {format_ranks(left)} called shutdown(), or the program ended there, before "
        "making this call"
    )
