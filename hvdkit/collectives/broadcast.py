"""Broadcast: every rank ends with the root's array."""

from __future__ import annotations

import numpy as np

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.collectives.pick import pick
from hvdkit.collectives.repeat import Remember, Repeat
from hvdkit.collectives.scheduled import run_schedule
from hvdkit.dtypes import check_supported, exported
from hvdkit.errors import ArgumentError, HvdkitError
from hvdkit.transport.device import Memory


def broadcast(
    group: Group,
    data: Memory,
    *,
    root: int,
    name: str | None,
    algorithm: str,
    remember: Remember | None = None,
) -> None:
    """Overwrite `data` on every rank with the root's; blocking.

    Args:
        group: the ranks.
        data: C-contiguous; equal shape and dtype on all ranks.
            For ``"mpi"`` it may be in the memory of a device.
        root: the rank whose data it is.
        name: for messages and the check.
        algorithm: a schedule's name, ``"shm"``, ``"mpi"`` or ``"auto"``.
        remember: told how the call is made again, in place.

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
    began = group.begin(call)
    if way == "mpi":
        group.agree(call)
        group.library().library_broadcast(data.reshape(-1).view(np.uint8), root)
    elif way == "shm":
        assert group.arena is not None and isinstance(data, np.ndarray)
        arguments = (exported(data), root, call.signature)
        while group.arena_call(group.arena.native.broadcast, *arguments):
            group.settle(call)
        if remember is not None:
            bound = group.arena.native.bind("broadcast", root, call.signature)
            again = group.settling(call)
            remember(Repeat(call, data.dtype, data.nbytes, bound, again))
    else:
        assert isinstance(data, np.ndarray)
        group.agree(call)
        run_schedule(group, "broadcast", way, data.reshape(-1).view(np.uint8), root=root)
    group.record(call, way, data.nbytes, began)


def _plan(
    group: Group, data: Memory, root: int, name: str | None, algorithm: str
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
    way = pick(
        "broadcast",
        algorithm,
        data.nbytes,
        no_arena=group.no_arena,
        estimates=group.estimates,
    )
    return call, way


def check_root(group: Group, root: object) -> None:
    """Refuse a root that is not a rank of the group.

    Raises:
        ArgumentError: with the range that is allowed.
    """
    if not isinstance(root, int | np.integer) or not 0 <= root < group.size:
        raise ArgumentError(f"root_rank {root!r} is not a rank; ranks are 0 to {group.size - 1}")
