"""Parameters that several layers share, such as a tied embedding, when these are on several ranks.

Each rank that needs one has a copy.  The copies start equal and get the same gradient, the sum of
what each rank's layers contribute; so an optimizer keeps them equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hvdkit.dtypes import Sum
from hvdkit.parallel.pipeline.pipeline import Holders
from hvdkit.parallel.pipeline.ties import Tie
from hvdkit.process_sets import ProcessSet
from hvdkit.torch.all_reduce import allreduce_
from hvdkit.torch.movements import broadcast_


def ties_of(layers: Sequence[object]) -> list[Tie]:
    """Return the names of parameters that are in several layers, as far as these are made."""
    names: dict[int, list[str]] = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, torch.nn.Module):
            for name, parameter in layer.named_parameters():
                names.setdefault(id(parameter), []).append(f"layers.{index}.{name}")
    return [tuple(several) for several in names.values() if len(several) > 1]


def shapes_of(layers: Sequence[torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all layers' parameters, by name."""
    return {
        f"layers.{index}.{name}": tuple(parameter.shape)
        for index, layer in enumerate(layers)
        for name, parameter in layer.named_parameters(remove_duplicate=False)
    }


class Ties:
    """The parameters that this rank shares with others, which it makes equal.  Collective.

    Args:
        holders: of each, the ranks that have it, and the one where it counts.
        parameters: of this rank, by name.
        rank: this rank.
    """

    def __init__(
        self,
        holders: Mapping[Tie, Holders],
        parameters: Mapping[str, torch.nn.Parameter],
        rank: int,
    ) -> None:
        self._shared: list[tuple[str, torch.nn.Parameter, ProcessSet]] = []
        self.copies: set[int] = set()
        """The parameters that count on another rank, by identity."""
        for tie, those in holders.items():
            mine = next(parameters[name] for name in tie if name in parameters)
            self._shared.append((tie[0], mine, those.ranks))
            if rank != those.root:
                self.copies.add(id(mine))
            with torch.no_grad():
                broadcast_(mine, those.root, name=tie[0], process_set=those.ranks)

    def begin(self) -> None:
        """Keep what gradients there are in one copy alone, that `add_up` counts them once."""
        for _, parameter, _ in self._shared:
            if id(parameter) in self.copies and parameter.grad is not None:
                parameter.grad.zero_()

    def add_up(self) -> None:
        """Give all copies the sum of their gradients.  Collective, blocking."""
        for name, parameter, ranks in self._shared:
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            allreduce_(gradient, name=name, op=Sum, process_set=ranks)
            if parameter.requires_grad:  # what is frozen has none, or weight decay would change it
                parameter.grad = gradient
