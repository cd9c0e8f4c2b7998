"""The all-reduce of small arrays over messages: everybody gets everything, and reduces it alone.

A small message costs what its rounds cost.  Ranks that are about to reduce have to compare what
they are about to do, which takes an all-gather of a number each; the elements go with it::

    rank 0   signature, a0       \\                  a0 + a1 + a2
    rank 1   signature, a1        >  all-gather  >   a0 + a1 + a2
    rank 2   signature, a2       /                   a0 + a1 + a2

so that an all-reduce is one collective, not two.  All ranks combine in rank order, and end with the
same bits.  Bytes received a rank (p-1)n: more than any other algorithm, which is why it is for few
ranks and few bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.group import Group
from hvdkit.collectives.reduction import Reduction
from hvdkit.dtypes import bfloat16

_INT = np.dtype(np.int64).itemsize


def allreduce_gathered(
    group: Group, plan: Reduction, source: NDArray[Any], target: NDArray[Any]
) -> None:
    """Reduce 1-D `source` of all ranks into 1-D `target`, which it may be; blocking.  Collective.

    16-bit floats are combined and scaled in float32, and rounded once.

    Raises:
        MismatchError: on every rank, if ranks disagree; `target` is as it was.
    """
    mine = _packed(source)
    plan.begin(group, _elements(mine, source))
    _combine(group, plan, group.gather(plan.call, mine), target)


def allreduce_agreed(group: Group, plan: Reduction, data: NDArray[Any]) -> None:
    """Reduce and finish 1-D `data`, which is scaled, of ranks that agree; blocking.  Collective."""
    _combine(group, plan, group.transport.allgather_ints(_packed(data)), data)


def _packed(data: NDArray[Any]) -> NDArray[np.int64]:
    """Return a copy of `data` in as many integers as it takes."""
    packed = np.zeros(-(-data.nbytes // _INT), np.int64)
    np.copyto(_elements(packed, data), data)
    return packed


def _elements(packed: NDArray[np.int64], like: NDArray[Any]) -> NDArray[Any]:
    """Return the elements in `packed`, or in each row of it, as many as `like` has."""
    return packed.view(np.uint8)[..., : like.nbytes].view(like.dtype)


def _combine(
    group: Group, plan: Reduction, everyone: NDArray[np.int64], target: NDArray[Any]
) -> None:
    """Set `target` to the result of every rank's elements."""
    with np.errstate(all="ignore"):
        rows = _elements(everyone, target)
        if target.dtype in (np.float16, bfloat16):
            rows = rows.astype(np.float32)
        total = rows[0].copy()
        for theirs in rows[1:]:
            group.kernels.reduce(total, theirs, plan.op, incoming_first=False)
        plan.finish(group, total)
        target[:] = total
