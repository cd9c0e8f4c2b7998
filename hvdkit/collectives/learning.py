"""What differs between ranks (rows, splits) is learnt once, and then taken to be as it was.

In an all-gather or all-to-all every rank must know the others' lengths before it can make room for
their data.  Asking costs a round.  But a training step asks the same things every time, so in the
arena a call goes ahead with the lengths of the last one: their digest is part of the signature that
the first round compares anyway, and whoever has other lengths now has another signature.

        first call          exchange lengths        transfer
        later calls                                 transfer
        lengths change      transfer refused        exchange lengths, then transfer, from now on

Refusal is seen by all ranks in the same round, so all of them turn to asking at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group

T = TypeVar("T")

#: Transfers the data: ``(lengths of all ranks, signature)``; None if the signatures differed.
Transfer = Callable[[NDArray[np.int64], int], T | None]


@dataclass(frozen=True)
class _Learnt:
    """The lengths of an earlier call; without `mine` they changed once, and are asked for now."""

    mine: tuple[int, ...] | None
    everyone: NDArray[np.int64]
    signature: int


_CHANGING = _Learnt(None, np.empty((0, 0), np.int64), 0)


def with_lengths(
    group: Group, call: Call, mine: Sequence[int], transfer: Transfer[T], *, in_arena: bool
) -> T:
    """Transfer with every rank's lengths, int64 ``(size, len(mine))``.  Collective.

    Args:
        group: the ranks.
        call: equal on all ranks.
        mine: this rank's lengths.
        transfer: what to do with them.
        in_arena: whether `transfer` compares signatures, so that lengths may be taken as known.

    Raises:
        MismatchError: on every rank, if ranks make different calls.
    """
    if in_arena:
        result = _as_learnt(group, call, tuple(mine), transfer)
        if result is not None:
            return result
    everyone = group.agree(call, mine)
    # The same signature as on a rank that asks for the first time and has just been answered.
    result = transfer(everyone, _digest(call, everyone))
    assert result is not None, "ranks that have just agreed have one signature"
    return result


def _as_learnt(group: Group, call: Call, mine: tuple[int, ...], transfer: Transfer[T]) -> T | None:
    """Transfer with the lengths known, or ask for them the first time; None if they changed."""
    key = ("lengths", call.signature)
    learnt: _Learnt | None = group.recall(key)
    if learnt is _CHANGING:
        return None
    if learnt is None or learnt.mine != mine:
        everyone = group.exchange(call, mine)
        if everyone is not None:
            learnt = _Learnt(mine, everyone, _digest(call, everyone))
            group.keep(key, learnt)
            return transfer(everyone, learnt.signature)
    else:
        result = transfer(learnt.everyone, learnt.signature)
        if result is not None:
            return result
    group.keep(key, _CHANGING)
    group.settle(call)
    return None


def _digest(call: Call, everyone: NDArray[np.int64]) -> int:
    text = call.signature.to_bytes(8, "little") + everyone.tobytes()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
