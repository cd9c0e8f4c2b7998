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
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group

L = TypeVar("L")
T = TypeVar("T")


@dataclass(frozen=True)
class _Learnt(Generic[L]):
    """The lengths of an earlier call, and what follows from them."""

    mine: tuple[int, ...]
    layout: L
    signature: int


#: In place of lengths that changed once: they are asked for now.
_CHANGING = object()


def with_lengths(
    group: Group,
    call: Call,
    mine: Sequence[int],
    lay_out: Callable[[NDArray[np.int64]], L],
    transfer: Callable[[L, int], T | None],
    *,
    in_arena: bool,
) -> T:
    """Transfer with every rank's lengths.  Collective.

    Args:
        group: the ranks.
        call: equal on all ranks.
        mine: this rank's lengths.
        lay_out: given everyone's, int64 ``(size, len(mine))``, returns what `transfer` needs.
        transfer: given that and a signature, transfers the data; None if the signatures differed.
        in_arena: whether `transfer` compares signatures, so that lengths may be taken as known.

    Raises:
        MismatchError: on every rank, if ranks make different calls.
    """
    if in_arena:
        result = _as_learnt(group, call, tuple(mine), lay_out, transfer)
        if result is not None:
            return result
    everyone = group.agree(call, mine)
    # The same signature as on a rank that asks for the first time and has just been answered.
    result = transfer(lay_out(everyone), _digest(call, everyone))
    assert result is not None, "ranks that have just agreed have one signature"
    return result


def _as_learnt(
    group: Group,
    call: Call,
    mine: tuple[int, ...],
    lay_out: Callable[[NDArray[np.int64]], L],
    transfer: Callable[[L, int], T | None],
) -> T | None:
    """Transfer with the lengths known, or ask for them the first time; None if they changed."""
    key = ("lengths", call.signature)
    learnt: Any = group.recall(key)
    if learnt is _CHANGING:
        return None
    if learnt is None or learnt.mine != mine:
        everyone = group.exchange(call, mine)
        if everyone is not None:
            learnt = _Learnt(mine, lay_out(everyone), _digest(call, everyone))
            group.keep(key, learnt)
            return transfer(learnt.layout, learnt.signature)
    else:
        result = transfer(learnt.layout, learnt.signature)
        if result is not None:
            return result
    group.keep(key, _CHANGING)
    group.settle(call)
    return None


def _digest(call: Call, everyone: NDArray[np.int64]) -> int:
    text = call.signature.to_bytes(8, "little") + everyone.tobytes()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
