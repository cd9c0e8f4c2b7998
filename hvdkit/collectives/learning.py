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
    learnt: Callable[[L, int], None] | None = None,
) -> T:
    """Transfer with every rank's lengths.  Collective.

    Args:
        group: the ranks.
        call: equal on all ranks.
        mine: this rank's lengths.
        lay_out: given everyone's, int64 ``(size, len(mine))``, returns what `transfer` needs.
        transfer: given that and a signature, transfers the data; None if the signatures differed.
        in_arena: whether `transfer` compares signatures, so that lengths may be taken as known.
        learnt: told what `transfer` was given when it has done without asking.

    Raises:
        MismatchError: on every rank, if ranks make different calls.
    """
    if in_arena:
        result = _as_learnt(group, call, tuple(mine), lay_out, transfer, learnt)
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
    learnt: Callable[[L, int], None] | None,
) -> T | None:
    """Transfer with the lengths known, or ask for them the first time; None if they changed."""
    key = ("lengths", call.signature)
    known: Any = group.recall(key)
    if known is _CHANGING:
        return None
    if known is None or known.mine != mine:
        everyone = group.exchange(call, mine)
        if everyone is not None:
            known = _Learnt(mine, lay_out(everyone), _digest(call, everyone))
            group.keep(key, known)
            return transfer(known.layout, known.signature)
    else:
        result = transfer(known.layout, known.signature)
        if result is not None:
            if learnt is not None:
                learnt(known.layout, known.signature)
            return result
    ask_from_now_on(group, call)
    return None


def ask_from_now_on(group: Group, call: Call) -> None:
    """Take no lengths for known any more, after signatures differed.  Collective.

    Raises:
        MismatchError: it was not for the lengths that they did.
    """
    group.keep(("lengths", call.signature), _CHANGING)
    group.settle(call)


def _digest(call: Call, everyone: NDArray[np.int64]) -> int:
    text = call.signature.to_bytes(8, "little") + everyone.tobytes()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
