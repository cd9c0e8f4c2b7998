"""Adasum: an all-reduce that adds what is orthogonal and averages what is parallel.

Maleki et al., "Scaling distributed training with adaptive summation", MLSys 2021.  Two gradients a
and b become

    (1 - a.b / (2 |a|^2)) a  +  (1 - a.b / (2 |b|^2)) b

and more than two are combined in pairs, then pairs of pairs, as `schedules.adasum` orders them.
Each array (a layer's gradient) has its own dot products.  On the data::

    exchange halves             [1]   the partner's half lands beside mine, in segments
    sum up the dot products     [2]   a few numbers, among the ranks that hold the two vectors
    combine                     [3]   my half becomes the result's
    ...                               the same at distances 2, 4, ... with a quarter, an eighth
    exchange results            [4]   back again, until every rank has the whole

An element is combined on one rank and copied to the others: all end with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.collectives.program import Bounds, Move, bounds_of, even_bounds, lay_out
from hvdkit.collectives.reduction import number
from hvdkit.dtypes import FLOATS, ReduceOp, check_supported
from hvdkit.errors import ArgumentError, HvdkitError, UnsupportedError
from hvdkit.schedules.adasum import vector_halving
from hvdkit.schedules.cost import log2_floor
from hvdkit.schedules.steps import Exchange, chunk_indices

#: Elements of a dot product at a time: fewer than OpenBLAS shares out among threads, so that the
#: order of summation, and with it every bit, is the same each time.
DOT_BLOCK = 8192

#: Elements combined at a time, so that the temporaries stay in the cache.
BLOCK = 32768

#: A squared norm below this has lost its digits to underflow, and counts as zero.
LEAST_SQUARE = float(np.sqrt(np.finfo(np.float64).tiny))

#: Beyond this a weight leaves float32's range, or is about to.
LARGEST_WEIGHT = 1e30


@dataclass(frozen=True, slots=True)
class _Combination:
    """What a rank does with a block that has landed beside its own."""

    pieces: tuple[tuple[int, slice], ...]
    """``(part, elements)`` for each part that reaches into the block."""
    incoming_first: bool
    sums: tuple[Move, ...]
    """Sums up the dot products over the ranks that hold the two vectors."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """One step of the schedule, laid out."""

    moves: tuple[Move, ...]
    combination: _Combination | None
    """None: what comes is a result, and replaces what this rank has."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """All of a call that does not change from one step to the next."""

    call: Call
    prescale: float
    postscale: float
    bounds: Bounds
    """Where the parts begin and end when they stand one after the other."""
    stages: tuple[_Stage, ...]


def adasum(
    group: Group,
    parts: Sequence[NDArray[Any]],
    *,
    name: str | None,
    prescale: float,
    postscale: float,
) -> None:
    """Combine `parts` of all ranks by Adasum, in place; blocking.  Collective.

    With p ranks, q the largest power of two that is at most p, n bytes and k = log2 q: 2k steps and
    2n(q-1)/q bytes sent a rank, and 12k(k+1) bytes a part in k(k+1)/2 messages for the dot
    products.  If p is not q: 2 steps more, and n bytes by the p - q ranks that take in another.

    Dot products accumulate in float64.  Vectors of 16-bit floats are combined in float32, and
    rounded once for each of the (up to k + 1) combinations.  A vector of zeros leaves the other
    as it is; NaN and infinities make the whole part not finite, on every rank.

    Args:
        group: the ranks.
        parts: C-contiguous, any shapes, of one floating dtype; shapes and dtype equal on all ranks.
            Each is combined by itself.  A single one is worked on where it lies, several are
            copied to one buffer and back.
        name: for messages and the check; ranks must give the same one.
        prescale: factor of each contribution; postscale: factor of the result.

    Raises:
        MismatchError: on every rank, if ranks disagree or one could not make the call.
        ArgumentError, UnsupportedError: no parts, several dtypes or one that is not floating.
        PeerError: another rank died.
    """
    plan = _plan(group, parts, name=name, prescale=prescale, postscale=postscale)
    group.agree(plan.call)
    alone = len(parts) == 1 and parts[0].flags.c_contiguous
    data = parts[0].reshape(-1) if alone else np.concatenate([part.reshape(-1) for part in parts])
    if plan.prescale != 1.0:
        group.kernels.scale(data, factor=plan.prescale)
    _run(group, plan, data)
    group.kernels.scale(data, factor=plan.postscale)
    if not alone:
        for part, (start, stop) in zip(parts, pairwise(plan.bounds), strict=True):
            part[...] = data[start:stop].reshape(part.shape)


def _plan(
    group: Group,
    parts: Sequence[NDArray[Any]],
    *,
    name: str | None,
    prescale: float,
    postscale: float,
) -> _Plan:
    """Return the plan of a call, kept from an earlier one like it if there was one."""
    key = ("adasum", name, prescale, postscale, tuple([(p.dtype, p.shape) for p in parts]))
    plan: _Plan | None = group.recall(key)
    if plan is None:
        try:
            dtype = _dtype_of(parts)
            before = number("prescale_factor", prescale)
            after = number("postscale_factor", postscale)
        except HvdkitError as exc:
            group.refuse("allreduce", name, exc)
        call = Call(  # with an all-reduce's labels, so that it can be compared with one
            "allreduce",
            name,
            (
                ("op", "Adasum"),
                ("dtype", dtype.name),
                ("shape", ", ".join(str(part.shape) for part in parts)),
                ("prescale_factor", repr(before)),
                ("postscale_factor", repr(after)),
                ("algorithm", "auto"),
            ),
            {
                "arrays": tuple((part.dtype, part.shape) for part in parts),
                "op": ReduceOp.ADASUM,
                "prescale": before,
                "postscale": after,
                "algorithm": "auto",
            },
        )
        bounds = bounds_of(part.size for part in parts)
        stages = _lay_out(
            group.rank,
            group.size,
            bounds,
            itemsize=dtype.itemsize,
            segment_bytes=group.segment_bytes,
        )
        plan = _Plan(call, before, after, bounds, stages)
        group.keep(key, plan)
    return plan


def _dtype_of(parts: Sequence[NDArray[Any]]) -> np.dtype[Any]:
    """Return the one dtype of all parts.

    Raises:
        ArgumentError: no parts, or parts of several dtypes.
        UnsupportedError: Adasum is not defined for the dtype.
    """
    dtypes = list(dict.fromkeys(part.dtype for part in parts))
    if not dtypes:
        raise ArgumentError("Adasum needs at least one array")
    for dtype in dtypes:
        check_supported(dtype)
        if dtype not in FLOATS:
            known = ", ".join(known_dtype.name for known_dtype in FLOATS)
            raise UnsupportedError(f"Adasum is not defined for {dtype}, only for {known}")
    if len(dtypes) > 1:
        found = ", ".join(dtype.name for dtype in dtypes)
        raise ArgumentError(f"Adasum takes arrays of one dtype, not of {found}; call it for each")
    return dtypes[0]


def _lay_out(
    rank: int, size: int, parts: Bounds, *, itemsize: int, segment_bytes: int
) -> tuple[_Stage, ...]:
    """Lay out this rank's steps on `parts` that stand one after the other.  Pure and local."""
    chunks = 1 << log2_floor(size)
    bounds = even_bounds(parts[-1], chunks)
    products = (0, 3 * (len(parts) - 1))
    longest = max(1, segment_bytes // itemsize)
    longest_sum = max(1, segment_bytes // 8)
    stages = []
    partners: list[int] = []
    for step in vector_halving(rank, size, chunks):
        if step.reduce is None:
            stages.append(_Stage(lay_out([step], size, bounds, longest=longest), None))
            continue
        peer, carried = step.reduce
        if step.send is not None:  # the peer keeps another block, and its share of the products
            partners.append(peer)
        block = chunk_indices(carried)
        sums = [Exchange(send=(other, 0), reduce=(other, 0)) for other in partners]
        combination = _Combination(
            pieces=_pieces(parts, bounds[block[0]], bounds[block[-1] + 1]),
            incoming_first=peer < rank,
            sums=lay_out(sums, size, products, longest=longest_sum),
        )
        landing = replace(step, reduce=None, store=step.reduce)
        stages.append(_Stage(lay_out([landing], size, bounds, longest=longest), combination))
    return tuple(stages)


def _pieces(parts: Bounds, begin: int, end: int) -> tuple[tuple[int, slice], ...]:
    """Return each part that has elements among `begin` to `end`, and which."""
    return tuple(
        (part, slice(max(start, begin), min(stop, end)))
        for part, (start, stop) in enumerate(pairwise(parts))
        if max(start, begin) < min(stop, end)
    )


def _run(group: Group, plan: _Plan, data: NDArray[Any]) -> None:
    """Combine 1-D `data` of all ranks."""
    landing = np.empty_like(data)  # of which only the first block that lands is ever touched
    for stage in plan.stages:
        if stage.combination is None:
            group.executor.run(stage.moves, data)
            continue
        group.executor.run(stage.moves, landing, source=data)
        own_first = not stage.combination.incoming_first
        lower, upper = (data, landing) if own_first else (landing, data)
        products = np.zeros((len(plan.bounds) - 1, 3))
        for part, piece in stage.combination.pieces:
            products[part] = _dot_products(lower[piece], upper[piece])
        group.executor.run(stage.combination.sums, products.reshape(-1))
        weights = _weights(products)
        for part, piece in stage.combination.pieces:
            _add(lower[piece], upper[piece], weights[part], out=data[piece])


def _dot_products(lower: NDArray[Any], upper: NDArray[Any]) -> NDArray[np.float64]:
    """Return lower.upper, |lower|^2 and |upper|^2."""
    total = np.zeros(3)
    with np.errstate(all="ignore"):
        for start in range(0, lower.size, DOT_BLOCK):
            block = slice(start, start + DOT_BLOCK)
            a = lower[block].astype(np.float64, copy=False)
            b = upper[block].astype(np.float64, copy=False)
            total += (a.dot(b), a.dot(a), b.dot(b))
    return total


def _weights(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights of the two vectors, ``(parts, 2)``, of their ``(parts, 3)`` products."""
    dot, squares = products[:, :1], products[:, 1:]
    with np.errstate(all="ignore"):
        return np.where(squares < LEAST_SQUARE, 1.0, 1.0 - 0.5 * (dot / squares))


def _add(
    lower: NDArray[Any], upper: NDArray[Any], weights: NDArray[np.float64], *, out: NDArray[Any]
) -> None:
    """Set `out` to the weighted sum; it may be either operand."""
    # A vector that is tiny beside a parallel one has a weight that float32 may not hold.
    narrow = out.itemsize <= 4 and not np.any(np.abs(weights) > LARGEST_WEIGHT)
    wide = np.float32 if narrow else np.float64
    first, second = weights.astype(wide)
    with np.errstate(all="ignore"):
        for start in range(0, out.size, BLOCK):
            block = slice(start, start + BLOCK)
            total = lower[block].astype(wide, copy=False) * first
            total += upper[block].astype(wide, copy=False) * second
            out[block] = total
