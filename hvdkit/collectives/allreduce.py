"""All-reduce: every rank ends with the combination of all ranks' arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.adasum import adasum
from hvdkit.collectives.group import Group
from hvdkit.collectives.reduction import Reduction, plan_reduction
from hvdkit.collectives.scheduled import run_schedule
from hvdkit.dtypes import ReduceOp, exported
from hvdkit.errors import ArgumentError
from hvdkit.transport.device import DeviceArray


def allreduce(
    group: Group,
    source: NDArray[Any],
    target: NDArray[Any],
    *,
    op: object,
    name: str | None,
    prescale: float,
    postscale: float,
    algorithm: str,
) -> Reduction | None:
    """Reduce `source` of all ranks into `target` of all ranks; blocking.  Return the plan.

    Adasum has a plan of another kind, and returns none.

    Args:
        group: the ranks.
        source: C-contiguous, any shape; equal shape and dtype on all ranks.
        target: C-contiguous, of `source`'s shape and dtype; may be `source` itself.
        op: what to do with the contributions.
        name: for messages and the check; ranks must give the same one.
        prescale: factor of each contribution, before the reduction.
        postscale: factor of the result, after an average is divided.
        algorithm: a schedule's name, ``"shm"``, ``"hierarchical"``, ``"gathered"``, ``"mpi"`` or
            ``"auto"``.

    Raises:
        MismatchError: on every rank, if ranks disagree.
        ArgumentError, UnsupportedError: unknown or undefined op, dtype or algorithm.
        PeerError: another rank died.
    """
    if op == ReduceOp.ADASUM or (isinstance(op, str) and op.upper() == ReduceOp.ADASUM.name):
        if algorithm != "auto":
            error = ArgumentError(f"Adasum has an algorithm of its own, not {algorithm!r}")
            group.refuse("allreduce", name, error)
        np.copyto(target, source)
        adasum(group, [target], name=name, prescale=prescale, postscale=postscale)
        return None
    plan = plan_reduction(
        group,
        "allreduce",
        source,
        op=op,
        name=name,
        prescale=prescale,
        postscale=postscale,
        algorithm=algorithm,
    )
    began = group.begin(plan.call)
    if plan.bound is not None:
        while group.arena_call(plan.bound, exported(source), exported(target)):
            group.settle(plan.call)
        group.record(plan.call, plan.algorithm, source.nbytes, began, counted=True)
        return plan
    group.agree(plan.call)
    if plan.algorithm == "hierarchical":
        assert group.hierarchy is not None
        group.hierarchy.allreduce(group, plan, source.reshape(-1), target.reshape(-1))
    else:
        _allreduce_flat(group, plan, source, target)
    group.record(plan.call, plan.algorithm, source.nbytes, began)
    return plan


def _allreduce_flat(
    group: Group, plan: Reduction, source: NDArray[Any], target: NDArray[Any]
) -> None:
    """Reduce by messages, whichever ranks they are between."""
    if target is not source:
        np.copyto(target, source)
    data = target.reshape(-1)
    plan.begin(group, data)
    if plan.algorithm == "mpi":
        group.library().library_allreduce(data, plan.op)
    else:
        run_schedule(group, "allreduce", plan.algorithm, data, op=plan.op)
    plan.finish(group, data)


def allreduce_on_device(
    group: Group,
    like: DeviceArray,
    prepare: Callable[[Reduction], DeviceArray],
    *,
    op: object,
    name: str | None,
    prescale: float,
    postscale: float,
    algorithm: str,
) -> Reduction:
    """Reduce what is in a device's memory, by the MPI library; blocking.  Return the plan.

    What the plan has to be done with the elements, the caller does.

    Args:
        group: the ranks, some of which may call `allreduce` instead.
        like: has the array's shape and dtype; equal on all ranks.
        prepare: called when all ranks agree; returns what is reduced in place, scaled by
            ``plan.prescale`` and, if a 16-bit float, as float32.
        op: of those of `allreduce`, not Adasum.
        name, prescale, postscale: as in `allreduce`.
        algorithm: ``"mpi"``.

    Raises:
        MismatchError, ArgumentError, UnsupportedError: as `allreduce`.
    """
    plan = plan_reduction(
        group,
        "allreduce",
        like,
        op=op,
        name=name,
        prescale=prescale,
        postscale=postscale,
        algorithm=algorithm,
    )
    began = group.begin(plan.call)
    group.agree(plan.call)
    group.library().library_allreduce(prepare(plan).reshape(-1), plan.op)
    group.record(plan.call, plan.algorithm, like.nbytes, began)
    return plan
