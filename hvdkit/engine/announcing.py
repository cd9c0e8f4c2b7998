"""What a rank tells the others about named operations: announcements to rank 0, and its decisions.

other ranks     announce ----> mail ----> rank 0: Coordinator
every rank                   decisions <---- publish
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from hvdkit.collectives.calls import Call
from hvdkit.engine.negotiation import Announcement, Coordinator, Decision, Left, Run, keep
from hvdkit.engine.requests import Key, Operation, Request
from hvdkit.engine.stall import Farewell
from hvdkit.engine.submissions import News
from hvdkit.errors import HvdkitError
from hvdkit.transport.mail import Mail


class Announcer:
    """Tells rank 0 what this rank is ready for; on rank 0, decides, and tells every rank.

    What returns decisions returns those that this rank has to obey.

    Args:
        mail: to the progress threads of the other ranks.
        members: the ranks of every process set by its number; a live mapping.
        gone: the ranks that have left; live.
        rank: this rank among all.
        fuse_bytes: the most that travels together.
    """

    def __init__(
        self,
        mail: Mail,
        members: Mapping[int, tuple[int, ...]],
        gone: set[int],
        *,
        rank: int,
        fuse_bytes: int,
    ) -> None:
        self._mail = mail
        self._members = members
        self._gone = gone
        self._rank = rank
        self._coordinator = Coordinator(members, fuse_bytes=fuse_bytes) if rank == 0 else None
        self._told: dict[int, Request] = {}  # what rank 0 knows, by signature
        self._regrouped = False

    @property
    def decides_for_others(self) -> bool:
        """Whether ranks may wait for a decision of this one in which it takes no part."""
        return self._coordinator is not None and not all(
            self._rank in ranks for ranks in tuple(self._members.values())
        )

    def announce(self, news: News) -> list[Decision]:
        """Tell rank 0 of what was submitted; on rank 0, decide."""
        if any(news):
            announcement = self._announcement(news.operations, news.joined, news.leaving)
            if self._coordinator is None:
                self.post(0, announcement)
            else:
                self._coordinator.announce(0, announcement)
        if self._coordinator is None:
            return []
        if self._regrouped:
            self._regrouped = False
            self._coordinator.reconsider()
        return self._publish(self._coordinator.decide())

    def _announcement(
        self, operations: Sequence[Operation], joined: bool, leaving: bool
    ) -> Announcement:
        requests = {}
        for operation in operations:
            signature = operation.request.call.signature
            if signature not in self._told:
                keep(self._told, operation.request)
                requests[signature] = operation.request
        items = tuple((op.key, op.request.call.signature) for op in operations)
        return Announcement(items, requests, joined, leaving)

    def hear(self, source: int, announcement: Announcement) -> None:
        """Take note of another rank's announcement.  On rank 0."""
        assert self._coordinator is not None
        self._coordinator.announce(source, announcement)

    def reconsider(self) -> None:
        """Note that the process sets have changed.  From any thread."""
        self._regrouped = True

    def _publish(self, decisions: list[Decision]) -> list[Decision]:
        """Tell each rank the decisions that concern it.  On rank 0."""
        by_rank: dict[int, list[Decision]] = {}
        for decision in decisions:
            brief = decision.brief() if isinstance(decision, Run) else decision
            for rank in decision.ranks:
                needs_all = isinstance(decision, Run) and rank in decision.absent
                by_rank.setdefault(rank, []).append(decision if needs_all else brief)
        pickled: dict[tuple[int, ...], bytes] = {}  # most ranks are told the same
        for rank, theirs in by_rank.items():
            if rank != self._rank and rank not in self._gone:
                which = tuple(map(id, theirs))
                if which not in pickled:
                    pickled[which] = pickle.dumps(theirs, pickle.HIGHEST_PROTOCOL)
                self._mail.send(rank, pickled[which])
        return by_rank.get(self._rank, [])

    def post(self, destination: int, message: Any) -> None:
        """Send a message to the progress thread of another rank, unless that is gone.

        A rank that has left may still wait for the end of what is under way in its channels: it
        hears a farewell.
        """
        if destination not in self._gone or isinstance(message, Farewell):
            self._mail.send(destination, pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def give_up(self, key: Key, error: HvdkitError) -> list[Decision]:
        """Fail a named operation on every rank of it.  On rank 0."""
        assert self._coordinator is not None
        failed = self._coordinator.give_up(key, error)
        return [] if failed is None else self._publish([failed])

    def waiting(self) -> dict[Key, tuple[Call, tuple[int, ...], tuple[int, ...]]]:
        """Return what ranks have announced and others have not.  On rank 0."""
        assert self._coordinator is not None
        return self._coordinator.waiting()

    def resign(self) -> None:
        """Tell that nothing can begin with this rank any more, at once; of rank 0, to all."""
        if self._coordinator is None:
            self.post(0, Announcement(leaving=True))
        else:
            self._publish([Left(self._members[0], 0)])
