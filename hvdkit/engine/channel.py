"""A channel: a group of ranks with the lane on which its collectives run, under one name."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.engine.lane import Lane


@dataclass(frozen=True)
class Stage:
    """What a rank is at in a channel; travels between ranks.

    Args:
        operations: how many it has begun.
        title: the one under way or, if none is, the last one.
        seconds: for how long it has been under way; 0 if none is.
        awaited: whether a thread does nothing but wait for it.
        ranks: of all ranks, those of the channel.
    """

    operations: int
    title: str
    seconds: float
    awaited: bool
    ranks: tuple[int, ...]


class Channel:
    """Args: `key`, the same on all ranks; `ranks`, of all ranks those that are in the group."""

    def __init__(self, key: str, ranks: tuple[int, ...], group: Group, lane: Lane) -> None:
        self.key = key
        self.ranks = ranks
        self.group = group
        self.lane = lane
        self._seen = -1
        self._since = 0.0

    @property
    def call(self) -> Call | None:
        """The call under way, or the last one; None before the first."""
        doing = self.group.doing
        return doing if doing is None or isinstance(doing, Call) else doing.call

    def look(self) -> Stage:
        """Return what this rank is at.  How long is known only from one look to the next."""
        now = time.perf_counter()
        operations, busy = self.group.operations, self.lane.busy()
        if not busy or operations != self._seen:
            self._seen, self._since = (operations if busy else -1), now
        return Stage(
            operations=operations,
            title="nothing yet" if self.call is None else self.call.title,
            seconds=now - self._since if busy else 0.0,
            awaited=self.lane.awaited(),
            ranks=self.ranks,
        )
