"""The parameters of a distributed optimizer: their names, layouts, and which travel together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch

from hvdkit.engine.bucketing import Gradient
from hvdkit.errors import ArgumentError
from hvdkit.torch.convert import numpy_dtype

#: ``(name, parameter)`` pairs.
Named: TypeAlias = Iterable[tuple[str, torch.nn.Parameter]]

#: So many groups, or the parameters of each; None: by size.
Groups: TypeAlias = int | Sequence[Sequence[torch.nn.Parameter]] | None


def names_of(
    optimizer: torch.optim.Optimizer, named_parameters: Named | None
) -> dict[torch.nn.Parameter, str]:
    """Return each parameter's name.

    Raises:
        ArgumentError: a parameter without a name, a name that is given twice, or no pairs.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        return {parameter: f"parameter.{index}" for index, parameter in enumerate(parameters)}
    pairs = list(named_parameters)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise ArgumentError(
            "named_parameters takes (name, parameter) pairs: pass model.named_parameters()"
        )
    twice = sorted(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
    if twice:
        raise ArgumentError(f"named_parameters has names that occur twice: {', '.join(twice)}")
    names = {parameter: name for name, parameter in pairs}
    nameless = [parameter for parameter in parameters if parameter not in names]
    if nameless:
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in nameless)
        raise ArgumentError(
            f"named_parameters names {len(parameters) - len(nameless)} of the optimizer's "
            f"{len(parameters)} parameters; without a name are those of shape {shapes}"
        )
    return names


def described(parameters: Sequence[torch.Tensor], names: Sequence[str]) -> tuple[Gradient, ...]:
    """Return what ranks must have alike of the gradients of `parameters`, shapes as in memory."""
    gradients = []
    for name, parameter in zip(names, parameters, strict=True):
        order = memory_order(parameter)
        turned = order != tuple(range(parameter.ndim))
        title = f"{name}, dimensions in the order {order}" if turned else name
        shape = tuple(parameter.shape[dim] for dim in order)
        gradients.append(Gradient(title, shape, numpy_dtype(parameter.dtype)))
    return tuple(gradients)


def memory_order(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the dimensions from the outermost in memory to the innermost.

    Where there are gaps in memory, as they are.
    """
    dims = tuple(range(parameter.ndim))
    if parameter.is_contiguous():
        return dims
    order = tuple(sorted(dims, key=parameter.stride, reverse=True))
    return order if parameter.permute(order).is_contiguous() else dims


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the order that undoes `order`."""
    return tuple(order.index(dim) for dim in range(len(order)))
