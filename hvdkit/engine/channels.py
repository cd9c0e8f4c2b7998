"""The channels of a job: made and let go by the ranks that share them, all at once.

A channel is a thread, shared memory and a transport of its own.  Its user, such as an optimizer,
goes on each rank when Python lets go of it; the channel can only go on all ranks together.  So it
waits until a next one is made among the same ranks, which is collective.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.engine.channel import Channel
from hvdkit.engine.communicator import Communicator
from hvdkit.engine.grouping import GroupMaker
from hvdkit.engine.lane import Lane
from hvdkit.transport.base import JobTransport


class Channels:
    """Makes the channels of one job, and lets go of them.

    Args:
        transport: messages among all ranks.
        groups: makes the channels' groups.
        threaded: whether another thread than the caller's may communicate.
    """

    def __init__(self, transport: JobTransport, groups: GroupMaker, *, threaded: bool) -> None:
        self._transport = transport
        self._groups = groups
        self._threaded = threaded
        self.open: list[Channel] = []
        self._made: Counter[tuple[str, int]] = Counter()
        self._used: dict[int, dict[str, tuple[weakref.ref[Any], Channel]]] = {}

    def make(
        self, key: str, ranks: Sequence[int], transport: JobTransport, *, beside: bool = True
    ) -> Channel:
        """Return a channel of the transport's ranks.  Collective among them.

        Args:
            key: the same on all of them, and no other channel's.
            ranks: which they are of all ranks.
            transport: for this channel alone.
            beside: whether it is used on threads beside those that compute.
        """
        group = self._groups.make(transport, key, beside=beside)
        channel = Channel(key, tuple(ranks), group, Lane(key, threaded=self._threaded))
        self.open.append(channel)
        return channel

    def subgroup(self, ranks: Sequence[int], key: str) -> Channel:
        """Return a channel among `ranks`, ascending, this one of them.  Collective among them."""
        return self.make(key, ranks, self._transport.subset(ranks))

    def beside(self, among: Communicator, label: str) -> Channel:
        """Return a channel among the ranks of `among`, beside all others.  Collective."""
        return among.call(self._beside, among, label)

    def _beside(self, group: Group, among: Communicator, label: str) -> Channel:
        group.agree(Call("new_channel", label))
        transport: Any = group.transport
        # Counted by process set, for other ranks are in others; a key never comes again.
        self._made[label, among.number] += 1
        key = f"{label} {among.number}.{self._made[label, among.number]}"
        return self.make(key, among.ranks, transport.duplicate())

    def release(self, channel: Channel) -> None:
        """Finish what is in flight in a channel and let go of it.  Collective among its ranks."""
        self.open.remove(channel)
        channel.lane.close()
        self._groups.release(channel.group)

    def keep(self, channel: Channel, among: Communicator, user: object) -> None:
        """Note that `channel`, of the ranks of `among`, is needed as long as `user` lives."""
        self._used.setdefault(among.number, {})[channel.key] = (weakref.ref(user), channel)

    def release_unused(self, among: Communicator) -> None:
        """Let go of the channels that no rank of `among` needs any more.  Collective."""
        used = self._used.setdefault(among.number, {})
        mine = {
            key
            for key, (user, channel) in used.items()
            if user() is None and channel.lane.free and not channel.lane.busy()
        }
        for key in sorted(among.call(_common, mine)):
            self.release(used.pop(key)[1])

    def release_set(self, among: Communicator) -> None:
        """Let go of all channels of a process set, its own included.  Collective."""
        used = self._used.pop(among.number, {})
        for key in sorted(used):
            self.release(used[key][1])
        self.release(among.channel)


def _common(group: Group, keys: set[str]) -> set[str]:
    group.agree(Call("release_unused_channels", None))
    return set.intersection(*group.transport.allgather_object(keys))
