"""What a reducing call asks for: checked and resolved once, kept for the calls like it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from hvdkit.collectives.calls import Call
from hvdkit.collectives.gathered import bind_gathered
from hvdkit.collectives.group import Group
from hvdkit.collectives.pick import pick, pick_allreduce
from hvdkit.collectives.repeat import Bound
from hvdkit.collectives.short import bind_short
from hvdkit.dtypes import DTYPE_CODES, DTYPES, ReduceOp, as_op, check_supported
from hvdkit.errors import ArgumentError, HvdkitError
from hvdkit.transport.device import Memory

log = logging.getLogger("hvdkit")


@dataclass(frozen=True)
class Reduction:
    """All of an all-reduce or reduce-scatter that does not change from one step to the next."""

    call: Call
    op: ReduceOp
    algorithm: str
    prescale: float
    divisor: int
    """What a sum is divided by: the number of ranks, for an average."""
    postscale: float
    native: tuple[int, int, float, int, float, int]
    """The arena's arguments: dtype, op, prescale, divisor, postscale, signature."""
    bound: Bound | None
    nbytes: int

    @property
    def tally(self) -> tuple[str, str, str, int, int, float] | None:
        """What the arena counted of `bound`; see `Group.counts`."""
        if self.bound is None:
            return None
        calls, seconds = self.bound.calls, self.bound.nanoseconds * 1e-9
        dtype = DTYPES[self.native[0]].name
        return self.call.kind, dtype, self.algorithm, calls, calls * self.nbytes, seconds

    def begin(self, group: Group, data: NDArray[Any]) -> None:
        """Scale 1-D `data` before it is reduced over messages."""
        if self.prescale != 1.0:
            group.kernels.scale(data, factor=self.prescale)

    def finish(self, group: Group, data: NDArray[Any]) -> None:
        """Divide and scale 1-D `data` after it was."""
        group.kernels.scale(data, divisor=self.divisor, factor=self.postscale)


def plan_reduction(
    group: Group,
    kind: str,
    source: Memory,
    *,
    op: object,
    name: str | None,
    prescale: float,
    postscale: float,
    algorithm: str,
) -> Reduction:
    """Return the plan of a call, kept from an earlier one like it if there was one.

    Raises:
        ArgumentError, UnsupportedError: what this rank asks for cannot be done.  The other ranks
            get a MismatchError that says so.
    """
    key = (kind, source.dtype, source.shape, op, name, prescale, postscale, algorithm)
    plan: Reduction | None = group.recall(key)
    if plan is None:
        try:
            plan = _resolve(group, kind, source, as_op(op), name, prescale, postscale, algorithm)
        except HvdkitError as exc:
            group.refuse(kind, name, exc)
        group.keep(key, plan)
        if group.rank == 0:
            log.debug("%s of %d bytes runs by %s", plan.call.title, plan.nbytes, plan.algorithm)
    return plan


def _resolve(
    group: Group,
    kind: str,
    source: Memory,
    op: ReduceOp,
    name: str | None,
    prescale: float,
    postscale: float,
    algorithm: str,
) -> Reduction:
    check_supported(source.dtype, op)
    if op is ReduceOp.ADASUM:
        raise ArgumentError(f"Adasum is an all-reduce; {kind} has no such operation")
    if kind == "reducescatter" and source.ndim == 0:
        raise ArgumentError("reducescatter needs an array of at least one dimension")
    factors = {
        "prescale": number("prescale_factor", prescale),
        "postscale": number("postscale_factor", postscale),
    }
    call = Call(
        kind,
        name,
        (
            ("op", str(op)),
            ("dtype", source.dtype.name),
            ("shape", str(source.shape)),
            *((f"{label}_factor", repr(factor)) for label, factor in factors.items()),
            ("algorithm", algorithm),
        ),
        {"arrays": ((source.dtype, source.shape),), "op": op, "algorithm": algorithm} | factors,
    )
    way = resolve(group, kind, algorithm, source.nbytes)
    divisor = group.size if op is ReduceOp.AVERAGE else 1
    before, after = factors.values()
    native = (DTYPE_CODES[source.dtype], int(op), before, divisor, after, call.signature)
    bound: Bound | None = None
    if group.arena is not None and way == "shm":
        bound = group.arena.native.bind_allreduce(*native)
    elif way == "gathered":
        bound = bind_gathered(group, native, source.shape)
    elif kind == "allreduce" and way != "mpi":
        bound = bind_short(group, native, source.shape, source.nbytes, way)
    return Reduction(
        call=call,
        op=op,
        algorithm=way,
        prescale=before,
        divisor=divisor,
        postscale=after,
        native=native,
        bound=bound,
        nbytes=source.nbytes,
    )


def resolve(group: Group, kind: str, algorithm: str, nbytes: int) -> str:
    """Return the algorithm to run, ``"auto"`` resolved.

    Raises:
        ArgumentError: as `hvdkit.collectives.pick.pick`.
    """
    if kind != "allreduce":
        return pick(kind, algorithm, nbytes, no_arena=group.no_arena, estimates=group.estimates)
    return pick_allreduce(
        algorithm,
        nbytes,
        size=group.size,
        no_arena=group.no_arena,
        no_hierarchy=group.no_hierarchy,
        per_node=0 if group.hierarchy is None else group.hierarchy.layout.per_node,
        estimates=group.estimates,
    )


def number(label: str, value: object) -> float:
    """Return a factor as a float.

    Raises:
        ArgumentError: it is no number.
    """
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ArgumentError(f"{label} {value!r} is not a number") from None
