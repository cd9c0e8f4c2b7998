"""Named operations: what a rank asks for, and the arrays that it brings."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import MOST_PLANS, Group
from hvdkit.dtypes import ReduceOp, check_supported
from hvdkit.engine.handles import Handle

#: Where an operation belongs: the number of its process set, and its name.
Key = tuple[int, str]

#: Does an operation, in the group of its process set, and returns its result.
Work = Callable[[Group], Any]


@dataclass(frozen=True)
class Request:
    """What ranks must agree on before a named operation can begin; travels between them.

    Args:
        call: the collective, with all that ranks must have equal.
        nbytes: of the arrays together.
        fusion: what other requests must have equal to travel in one message; None: none may.
    """

    call: Call
    nbytes: int = 0
    fusion: Hashable = None


@dataclass
class Operation:
    """A named operation of this rank, from its submission to its end.

    Args:
        key: process set and name.
        request: what the other ranks must ask for as well.
        pairs: the ``(source, target)`` arrays of an all-reduce, which may travel with others.
        result: what the handle of an all-reduce returns.
        work: what to do when all have asked for it, if it is not an all-reduce.
        fetch: brings the sources from where they are; done when all ranks are there.
        store: starts to bring the result to where it is wanted, and returns it.
    """

    key: Key
    request: Request
    pairs: tuple[tuple[Any, Any], ...] = ()
    result: Any = None
    work: Work | None = None
    fetch: Callable[[], None] | None = None
    store: Callable[[Any], Any] | None = None
    handle: Handle[Any] = field(init=False)
    submitted: float = 0.0
    """When, by `time.perf_counter`."""
    decided: float = 0.0
    """When rank 0's decision came in."""

    def __post_init__(self) -> None:
        self.handle = Handle(self.request.call.title)


#: Dtypes and shapes.
Arrays = tuple[tuple[np.dtype[Any], tuple[int, ...]], ...]


@lru_cache(maxsize=MOST_PLANS)  # a training step asks for the same things every time
def allreduce_request(
    name: str, arrays: Arrays, op: ReduceOp, prescale: float, postscale: float
) -> Request:
    """Return what ranks must agree on for an all-reduce of `arrays` as one operation.

    Raises:
        UnsupportedError: `op` is not defined for one of the dtypes.
    """
    for dtype, _ in arrays:
        check_supported(dtype, op)
    parts = (
        ("op", str(op)),
        *_described(arrays),
        ("prescale_factor", repr(prescale)),
        ("postscale_factor", repr(postscale)),
    )
    arguments = {
        "arrays": arrays,
        "op": op,
        "prescale": prescale,
        "postscale": postscale,
        "algorithm": "auto",
    }
    return Request(
        Call("allreduce", name, parts, arguments),
        nbytes=sum(dtype.itemsize * math.prod(shape) for dtype, shape in arrays),
        fusion=None if op is ReduceOp.ADASUM else (op, prescale, postscale),
    )


@lru_cache(maxsize=MOST_PLANS)
def other_request(
    kind: str, name: str, arrays: Arrays, parts: tuple[tuple[str, str], ...], *, ragged: bool
) -> Request:
    """Return what ranks must agree on for any other operation.

    Args:
        kind: the collective.
        name: the operation's.
        arrays: shapes without the first dimension if `ragged`: that may differ.
        parts: whatever else must be equal.
        ragged: whether first dimensions may differ.

    Raises:
        UnsupportedError: a dtype that hvdkit does not carry.
    """
    for dtype, _ in arrays:
        check_supported(dtype)
    return Request(Call(kind, name, (*parts, *_described(arrays, ragged=ragged))))


def _described(arrays: Arrays, *, ragged: bool = False) -> tuple[tuple[str, str], ...]:
    """Return dtypes and shapes as parts of a call."""
    shapes = [f"({', '.join(['any'] * ragged + [str(n) for n in shape])})" for _, shape in arrays]
    names = [dtype.name for dtype, _ in arrays]
    if len(arrays) == 1:
        return ("dtype", names[0]), ("shape", shapes[0])
    listed = "; ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
    return (("tensors", f"{len(arrays)}: {listed}"),)
