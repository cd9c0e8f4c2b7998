"""Layers that only a pipeline needs: ends of skip connections, and layers that are yet to be made.

layers = [encoder_1, Stash("skip"), encoder_2, decoder_2, Pop("skip", torch.add), decoder_1]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hvdkit.errors import ArgumentError
from hvdkit.parallel.pipeline.pipeline import check_skips

#: A layer, or what makes one when it is known which rank needs it.
Layer = torch.nn.Module | Callable[[], torch.nn.Module]


class Stash(torch.nn.Module):
    """Lets tensors through, and keeps one for the `Pop` of the same name.

    Args:
        name: of the skip connection; of one `Stash` and one `Pop` behind it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Pop(torch.nn.Module):
    """Combines what comes with what was stashed: ``combine(x, stashed)``.

    Args:
        name: of the skip connection.
        combine: a function, or a module, whose parameters are then this layer's.
    """

    def __init__(self, name: str, combine: Callable[[Any, Any], Any] = torch.add) -> None:
        super().__init__()
        self.name = name
        self.combine = combine

    def forward(self, x: Any, stashed: torch.Tensor) -> Any:
        return self.combine(x, stashed)


def made(layer: Layer, index: int, seed: int | None) -> torch.nn.Module:
    """Return a layer, made now if it is yet to be.

    Args:
        layer: a module, or a function that makes one.
        index: of all layers.
        seed: from which the weights of what is made follow, whatever rank makes it.

    Raises:
        ArgumentError: what is made is no module.
    """
    if isinstance(layer, torch.nn.Module):
        return layer
    if seed is None:
        module = layer()
    else:
        with torch.random.fork_rng(devices=[]):  # layers are made on the CPU
            torch.manual_seed(seed + index)
            module = layer()
    if not isinstance(module, torch.nn.Module):
        raise ArgumentError(
            f"layer {index} is neither a module nor a function that makes one: {layer!r}"
        )
    return module


def skips_of(layers: list[torch.nn.Module]) -> dict[str, tuple[int, int]]:
    """Return, by name, at which layer each skip connection begins and ends.

    Raises:
        ArgumentError: they do not fit.
    """
    begins, ends = (
        [(layer.name, index) for index, layer in enumerate(layers) if isinstance(layer, kind)]
        for kind in (Stash, Pop)
    )
    check_skips(begins, ends)
    last = dict(ends)
    return {name: (index, last[name]) for name, index in begins}
