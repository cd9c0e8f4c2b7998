"""What a rank does that has no more data, while others have: it adds nothing to their all-reduces.

    rank 0   allreduce  allreduce  join ........................... leaves
    rank 1   allreduce  allreduce  allreduce  allreduce  join       leaves
                                   ^ rank 0's signature is another: rank 1 asks what it does,
                                     rank 0 learns what rank 1 wants, and both make the call

A rank that has joined contributes what changes nothing: zeros to a sum or an average (which is
still divided by the number of all ranks), the largest value to a minimum, and so on.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.adasum import adasum
from hvdkit.collectives.allreduce import allreduce
from hvdkit.collectives.barrier import barrier
from hvdkit.collectives.calls import JOIN, JOINABLE, Call
from hvdkit.collectives.group import Group
from hvdkit.dtypes import ReduceOp
from hvdkit.errors import ArgumentError, UnsupportedError


def serve_joined(group: Group) -> None:
    """Take part in the others' calls until every rank of the group is here; blocking."""
    call = Call(JOIN, None)
    while True:
        group.begin(call)
        if group.arena is not None:
            differ = group.arena_call(group.arena.native.barrier, call.signature)
        else:
            differ = group.differs(call)
        if not differ:
            return
        others = [theirs for theirs in group.transport.allgather_object(call) if theirs != call]
        if others[0].kind in JOINABLE and all(theirs == others[0] for theirs in others):
            with suppress(ArgumentError, UnsupportedError):  # every rank gets it; it is theirs
                contribute(group, others[0])


def contribute(group: Group, call: Call) -> None:
    """Take part in `call`, which the others make, without changing their result."""
    if call.arguments is None:  # none of the others could make it: they wait to hear so
        group.agree(call)
        return
    arguments = dict(call.arguments)
    if call.kind == "barrier":
        barrier(group, name=call.name, **arguments)
        return
    op, prescale = arguments["op"], arguments["prescale"]
    arrays = [neutral(dtype, shape, op, prescale) for dtype, shape in arguments.pop("arrays")]
    if op is ReduceOp.ADASUM:
        postscale = arguments["postscale"]
        adasum(group, arrays, name=call.name, prescale=prescale, postscale=postscale)
        return
    (nothing,) = arrays
    allreduce(group, nothing, nothing, name=call.name, **arguments)


def neutral(
    dtype: np.dtype[Any], shape: tuple[int, ...], op: ReduceOp, prescale: float
) -> NDArray[Any]:
    """Return an array that, multiplied by `prescale`, leaves unchanged what `op` combines it with.

    (But for a product of integers, where not every factor allows that.)
    """
    if prescale and op in (ReduceOp.MIN, ReduceOp.MAX):
        largest = (op is ReduceOp.MIN) == (prescale > 0)
        return np.full(shape, _extreme(dtype, largest=largest), dtype)
    if prescale and op is ReduceOp.PRODUCT:
        return np.full(shape, 1 if dtype.kind in "biu" else 1 / prescale, dtype)
    return np.zeros(shape, dtype)


def _extreme(dtype: np.dtype[Any], *, largest: bool) -> Any:
    if dtype.kind == "b":
        return largest
    if dtype.kind in "iu":
        return np.iinfo(dtype).max if largest else np.iinfo(dtype).min
    return np.inf if largest else -np.inf
