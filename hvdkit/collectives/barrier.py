"""Barrier: no rank leaves before every rank has come."""

from __future__ import annotations

import numpy as np

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.collectives.pick import pick
from hvdkit.collectives.scheduled import run_schedule
from hvdkit.dtypes import ReduceOp
from hvdkit.errors import HvdkitError


def barrier(group: Group, *, name: str | None, algorithm: str) -> None:
    """Wait until every rank of the group has made this call.

    Raises:
        MismatchError: on every rank, if one made another call.
        ArgumentError: unknown algorithm.
    """
    key = ("barrier", name, algorithm)
    plan: tuple[Call, str] | None = group.recall(key)
    if plan is None:
        try:
            way = pick("barrier", algorithm, 0, no_arena=group.no_arena)
        except HvdkitError as exc:
            group.refuse("barrier", name, exc)
        plan = Call("barrier", name, (("algorithm", algorithm),), {"algorithm": algorithm}), way
        group.keep(key, plan)
    call, way = plan
    began = group.begin(call)
    if way == "shm":
        assert group.arena is not None
        while group.arena_call(group.arena.native.barrier, call.signature):
            group.settle(call)
    else:
        group.agree(call)
        if way == "mpi":
            group.library().library_barrier()
        else:
            run_schedule(group, "barrier", way, np.zeros(1, np.uint8), op=ReduceOp.MAX)
    group.record(call, way, 0, began)
