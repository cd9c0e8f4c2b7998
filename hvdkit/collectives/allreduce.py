"""All-reduce: every rank ends with the combination of all ranks' arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.group import Group
from hvdkit.collectives.reduction import Reduction, plan_reduction
from hvdkit.dtypes import exported


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
) -> Reduction:
    """Reduce `source` of all ranks into `target` of all ranks; blocking.  Return the plan.

    Args:
        group: the ranks.
        source: C-contiguous, any shape; equal shape and dtype on all ranks.
        target: C-contiguous, of `source`'s shape and dtype; may be `source` itself.
        op: what to do with the contributions.
        name: for messages and the check; ranks must give the same one.
        prescale: factor of each contribution, before the reduction.
        postscale: factor of the result, after an average is divided.
        algorithm: a schedule's name, ``"shm"``, ``"mpi"`` or ``"auto"``.

    Raises:
        MismatchError: on every rank, if ranks disagree.
        ArgumentError, UnsupportedError: unknown or undefined op, dtype or algorithm.
        PeerError: another rank died.
    """
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
    if plan.bound is not None:
        if group.arena_call(plan.bound, exported(source), exported(target)):
            group.raise_mismatch(plan.call)
        return plan
    group.agree(plan.call)
    if target is not source:
        np.copyto(target, source)
    data = target.reshape(-1)
    plan.begin(group, data)
    if plan.algorithm == "mpi":
        group.library().library_allreduce(data, plan.op)
    else:
        group.run_schedule("allreduce", plan.algorithm, data, op=plan.op)
    plan.finish(group, data)
    return plan
