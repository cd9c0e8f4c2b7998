"""Broadcast: every rank ends with the root's array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.collectives.pick import pick
from hvdkit.dtypes import check_supported, exported
from hvdkit.errors import ArgumentError, HvdkitError


def broadcast(
    group: Group, data: NDArray[Any], *, root: int, name: str | None, algorithm: str
) -> None:
    """Overwrite `data` on every rank with the root's; blocking.

    Args:
        group: the ranks.
        data: C-contiguous; equal shape and dtype on all ranks.
        root: the rank whose data it is.
        name: for messages and the check.
        algorithm: a schedule's name, ``"shm"``, ``"mpi"`` or ``"auto"``.

    Raises:
        MismatchError: on every rank, if ranks disagree.
        ArgumentError, UnsupportedError: root out of range, unknown algorithm, unsupported dtype.
    """
    key = ("broadcast", data.dtype, data.shape, root, name, algorithm)
    plan: tuple[Call, str] | None = group.recall(key)
    if plan is None:
        try:
            plan = _plan(group, data, root, name, algorithm)
        except HvdkitError as exc:
            group.refuse("broadcast", name, exc)
        group.keep(key, plan)
    call, way = plan
    if way == "shm":
        assert group.arena is not None
        arguments = (exported(data), root, call.signature)
        if group.arena_call(group.arena.native.broadcast, *arguments):
            group.raise_mismatch(call)
        return
    group.agree(call)
    flat = data.reshape(-1).view(np.uint8)
    if way == "mpi":
        group.library().library_broadcast(flat, root)
    else:
        group.run_schedule("broadcast", way, flat, root=root)


def _plan(
    group: Group, data: NDArray[Any], root: int, name: str | None, algorithm: str
) -> tuple[Call, str]:
    check_supported(data.dtype)
    check_root(group, root)
    call = Call(
        "broadcast",
        name,
        (
            ("dtype", data.dtype.name),
            ("shape", str(data.shape)),
            ("root_rank", str(root)),
            ("algorithm", algorithm),
        ),
    )
    return call, pick("broadcast", algorithm, data.nbytes, no_arena=group.no_arena)


def check_root(group: Group, root: object) -> None:
    """Refuse a root that is not a rank of the group.

    Raises:
        ArgumentError: with the range that is allowed.
    """
    if not isinstance(root, int | np.integer) or not 0 <= root < group.size:
        raise ArgumentError(f"root_rank {root!r} is not a rank; ranks are 0 to {group.size - 1}")
