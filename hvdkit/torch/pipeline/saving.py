"""A sharded model and its optimizer, as named arrays: into a checkpoint, and back from one.

layers.3.weight                     a parameter or buffer
optimizer.layers.3.weight.exp_avg   what the optimizer keeps for it
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvdkit.errors import ArgumentError
from hvdkit.parallel.checkpoint import Index
from hvdkit.torch.convert import array_of, tensor_of

Arrays = dict[str, NDArray[Any]]


def arrays_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Arrays:
    """Return what a module and its optimizer hold, by name; of parameters in their own memory."""
    arrays = {name: _array(tensor) for name, tensor in module.state_dict().items()}
    for name, parameter in _named(module, optimizer):
        for key, value in optimizer.state[parameter].items() if optimizer is not None else ():
            if isinstance(value, torch.Tensor):
                arrays[f"optimizer.{name}.{key}"] = _array(value)
            elif isinstance(value, bool | int | float):
                arrays[f"optimizer.{name}.{key}"] = np.array(value)
            elif value is not None:
                raise ArgumentError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} of "
                    f"{name!r}, which is neither a tensor nor a number"
                )
    return arrays


def wanted_of(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, index: Index
) -> Arrays:
    """Return what is to be read for a module and its optimizer: arrays like those in the index."""
    wanted = {name: _array(tensor) for name, tensor in module.state_dict().items()}
    known: dict[str, list[str]] = {}
    for name in index.tensors:
        if name.startswith("optimizer."):
            known.setdefault(name.removeprefix("optimizer.").rpartition(".")[0], []).append(name)
    for name, _ in _named(module, optimizer):
        for full in known.get(name, ()):
            tensor = index.tensors[full]
            wanted[full] = np.empty(tensor.shape, tensor.dtype)
    return wanted


@torch.no_grad()
def take(
    arrays: Mapping[str, NDArray[Any]],
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Put what was read into a module and its optimizer."""
    for name, tensor in module.state_dict().items():
        tensor.copy_(tensor_of(arrays[name]))
    for name, parameter in _named(module, optimizer):
        prefix = f"optimizer.{name}."
        state = {
            full.removeprefix(prefix): tensor_of(array)
            for full, array in arrays.items()
            if full.startswith(prefix) and "." not in full.removeprefix(prefix)
        }
        if state and optimizer is not None:
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if value.ndim else value
                for key, value in state.items()
            }


def hyperparameters(optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    """Return an optimizer's groups without their parameters, as JSON has them."""
    if optimizer is None:
        return []
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    try:
        json.dumps(groups)
    except TypeError as exc:
        raise ArgumentError(f"the optimizer's groups cannot be written as JSON: {exc}") from exc
    return groups


def set_hyperparameters(
    optimizer: torch.optim.Optimizer | None, groups: list[dict[str, Any]]
) -> None:
    """Give an optimizer the hyperparameters that were written.

    Raises:
        ArgumentError: it has another number of groups.
    """
    if optimizer is None:
        return
    if len(groups) != len(optimizer.param_groups):
        raise ArgumentError(
            f"the checkpoint's optimizer has {len(groups)} groups of parameters, this one "
            f"{len(optimizer.param_groups)}"
        )
    for group, written in zip(optimizer.param_groups, groups, strict=True):
        group.update(
            {
                key: tuple(value) if isinstance(group.get(key), tuple) else value
                for key, value in written.items()
            }
        )


def _named(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters that the optimizer has, under each of their names."""
    if optimizer is None:
        return
    there = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter in there:
            yield name, parameter


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return array_of(tensor.detach().cpu())
