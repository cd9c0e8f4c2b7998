"""torch.distributed's reductions on tensors: each converts, and calls the core's.

These functions run on a process group's lane, in place on the memory of contiguous tensors.  What
this rank cannot do is an error on all ranks.  Ranks count within the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import ReduceOp as TorchOp

from hvdkit import collectives
from hvdkit.collectives.group import Group
from hvdkit.dtypes import ReduceOp
from hvdkit.errors import ArgumentError, UnsupportedError
from hvdkit.torch.c10d.checks import check_dtypes, check_parts, refusing
from hvdkit.torch.c10d.tensors import Target, source

Tensors = Sequence[torch.Tensor]

_OPS: dict[Any, ReduceOp] = {
    TorchOp.SUM: ReduceOp.SUM,
    TorchOp.AVG: ReduceOp.AVERAGE,
    TorchOp.PRODUCT: ReduceOp.PRODUCT,
    TorchOp.MIN: ReduceOp.MIN,
    TorchOp.MAX: ReduceOp.MAX,
}


def operation(op: Any) -> tuple[ReduceOp, float]:
    """Return torch's reduction as hvdkit's, and the factor of each contribution.

    Raises:
        UnsupportedError: a bitwise operation, or a factor that is a tensor.
    """
    kind = getattr(op, "op", op)
    how = _OPS.get(kind)
    if how is not None:
        return how, 1.0
    if kind != TorchOp.PREMUL_SUM:
        known = ", ".join(other.name for other in _OPS)
        raise UnsupportedError(
            f"ReduceOp.{kind.name} is not supported; supported are {known} and PREMUL_SUM"
        )
    factor = op.__getstate__()[1]
    if isinstance(factor, torch.Tensor):
        raise UnsupportedError("PREMUL_SUM takes a number as its factor here, not a tensor")
    return ReduceOp.SUM, factor


def allreduce(group: Group, tensors: Tensors, op: Any) -> None:
    """Reduce each tensor in place."""
    with refusing(group, "allreduce"):
        how, factor = operation(op)
        targets = [Target(tensor) for tensor in tensors]
    for target in targets:
        _reduce(group, target.array, target.array, how, factor)
        target.store()


def reduce(group: Group, tensors: Tensors, op: Any, root: int) -> None:
    """Reduce into the root's tensor; the others' stay as they are."""
    with refusing(group, "allreduce"):
        how, factor = operation(op)
        targets = [Target(tensor) for tensor in tensors]
    for target in targets:
        here = group.rank == root
        result = target.array if here else np.empty_like(target.array)
        _reduce(group, target.array, result, how, factor, name=f"to rank {root}")
        if here:
            target.store()


def reduce_scatter(group: Group, outputs: Tensors, inputs: Tensors, op: Any) -> None:
    """Reduce each input, and leave in the output this rank's part of `size` equal ones."""
    with refusing(group, "reducescatter"):
        how, factor = operation(op)
        sources = [source(tensor).reshape(-1) for tensor in inputs]
        targets = [Target(tensor) for tensor in outputs]
        check_dtypes(sources, targets)
        for given, target in zip(sources, targets, strict=True):
            if given.size != target.array.size * group.size:
                raise ArgumentError(
                    f"the input has {given.size} elements: for {group.size} ranks that is not "
                    f"{target.array.size} each, as the output has"
                )
    for given, target in zip(sources, targets, strict=True):
        target.flat[:] = _reducescatter(group, given, how, factor)
        target.store()


def reduce_scatter_lists(
    group: Group, outputs: Tensors, inputs: Sequence[Tensors], op: Any
) -> None:
    """Reduce each list of parts, of any lengths, and leave in the output that of this rank."""
    for output, parts in zip(outputs, inputs, strict=True):
        _reduce_scatter_list(group, output, parts, op)


def _reduce_scatter_list(group: Group, output: torch.Tensor, parts: Tensors, op: Any) -> None:
    with refusing(group, "reducescatter"):
        how, factor = operation(op)
        sources, target = [source(part).reshape(-1) for part in parts], Target(output)
        check_dtypes(sources, [target])
        check_parts("input", [part.size for part in sources], group.size)
        if sources[group.rank].size != target.array.size:
            raise ArgumentError(
                f"input {group.rank} has {sources[group.rank].size} elements, and the output "
                f"{target.array.size}"
            )
    if len({part.size for part in sources}) == 1:
        target.flat[:] = _reducescatter(group, np.concatenate(sources), how, factor)
    else:
        for rank, part in enumerate(sources):
            result = target.flat if rank == group.rank else np.empty_like(part)
            _reduce(group, part, result, how, factor, name=f"to rank {rank}")
    target.store()


def _reduce(
    group: Group,
    given: NDArray[Any],
    result: NDArray[Any],
    how: ReduceOp,
    factor: float,
    *,
    name: str | None = None,
) -> None:
    options: dict[str, Any] = {"prescale": factor, "postscale": 1.0, "algorithm": "auto"}
    collectives.allreduce(group, given, result, op=how, name=name, **options)


def _reducescatter(group: Group, given: NDArray[Any], how: ReduceOp, factor: float) -> NDArray[Any]:
    options: dict[str, Any] = {"prescale": factor, "postscale": 1.0, "algorithm": "auto"}
    return collectives.reducescatter(group, given, op=how, name=None, **options)
