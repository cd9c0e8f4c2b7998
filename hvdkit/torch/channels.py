"""The channels of optimizers that are gone: a thread, shared memory and an MPI communicator each.

An optimizer goes on each rank when Python lets go of it; its channel can only go on all ranks at
once.  So it waits for the next optimizer of the process set, whose creation is collective.
"""

from __future__ import annotations

import weakref
from typing import Any

from hvdkit.api import context
from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.engine.channel import Channel
from hvdkit.engine.communicator import Communicator

_used: weakref.WeakKeyDictionary[Communicator, dict[str, tuple[weakref.ref[Any], Channel]]] = (
    weakref.WeakKeyDictionary()
)


def keep_channel(among: Communicator, user: object, channel: Channel) -> None:
    """Note that `channel`, of the ranks of `among`, is needed as long as `user` lives.  Local."""
    _used.setdefault(among, {})[channel.key] = (weakref.ref(user), channel)


def release_unused_channels(among: Communicator) -> None:
    """Let go of the channels that no rank of `among` needs any more.  Collective."""
    used = _used.setdefault(among, {})
    mine = {
        key
        for key, (user, channel) in used.items()
        if user() is None and channel.lane.free and not channel.lane.busy()
    }
    for key in sorted(among.call(_common, mine)):
        context().release(used.pop(key)[1])


def _common(group: Group, keys: set[str]) -> set[str]:
    group.agree(Call("release_unused_channels", None))
    return set.intersection(*group.transport.allgather_object(keys))
