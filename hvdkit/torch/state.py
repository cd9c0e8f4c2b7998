"""Start all ranks alike: parameters and optimizer state from one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hvdkit.api import rank
from hvdkit.array_collectives import broadcast_object
from hvdkit.errors import UnsupportedError
from hvdkit.torch.movements import broadcast_


def broadcast_parameters(
    params: Mapping[str, Any] | Iterable[tuple[str, Any]] | list[torch.Tensor], root_rank: int = 0
) -> None:
    """Overwrite every tensor of `params` with the root's.  Collective, blocking.

    Args:
        params: ``model.state_dict()``, ``model.named_parameters()`` or a list of tensors; the same
            names, in the same order, on every rank.  Entries that are not tensors are left alone.
        root_rank: the rank to copy from.

    Raises:
        MismatchError: names, shapes or dtypes differ between ranks.
        UnsupportedError: `params` is neither of these.
    """
    if not isinstance(params, Mapping | Iterable) or isinstance(params, torch.Tensor):
        raise UnsupportedError(
            "broadcast_parameters takes model.state_dict() or model.named_parameters(), "
            f"not {type(params).__name__}"
        )
    pairs: Iterable[Any] = params.items() if isinstance(params, Mapping) else params
    if isinstance(params, list):
        pairs = [(str(i), p) if isinstance(p, torch.Tensor) else p for i, p in enumerate(params)]
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise UnsupportedError(
                "broadcast_parameters takes (name, tensor) pairs: "
                "pass model.named_parameters(), not model.parameters()"
            )
        name, tensor = pair
        if isinstance(tensor, torch.Tensor):
            broadcast_(tensor, root_rank, name=name)


@dataclass(frozen=True)
class _Shell:
    """Stands for a tensor in a state dict that travels without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int = 0, model: torch.nn.Module | None = None
) -> None:
    """Give every rank the root's optimizer state and hyperparameters.  Collective, blocking.

    A rank may have no state yet, as before the first step when only the root has read a
    checkpoint: it gets the root's.

    Args:
        optimizer: over the same parameters on every rank.
        root_rank: the rank to copy from.
        model: without effect, for no state has to be made up here; Horovod's scripts pass it.

    Raises:
        MismatchError: the ranks' calls differ.
    """
    del model
    state = optimizer.state_dict()
    tensors: list[torch.Tensor] = []
    shells = _map(state, torch.Tensor, lambda tensor: _hull(tensor, tensors))
    shells = broadcast_object(shells, root_rank, name="optimizer_state")
    if rank() != root_rank:
        tensors = []
        state = _map(shells, _Shell, lambda shell: _fill(shell, tensors))
    for number, tensor in enumerate(tensors):
        broadcast_(tensor, root_rank, name=f"optimizer_state.{number}")
    if rank() != root_rank:
        optimizer.load_state_dict(state)


def _hull(tensor: torch.Tensor, seen: list[torch.Tensor]) -> _Shell:
    seen.append(tensor)
    return _Shell(tuple(tensor.shape), tensor.dtype)


def _fill(shell: _Shell, seen: list[torch.Tensor]) -> torch.Tensor:
    seen.append(torch.empty(shell.shape, dtype=shell.dtype))
    return seen[-1]


def _map(tree: Any, kind: type, function: Any) -> Any:
    """Return `tree` of dicts, lists and tuples with `function` applied to leaves of `kind`."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map(value, kind, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map(value, kind, function) for value in tree)
    return tree
