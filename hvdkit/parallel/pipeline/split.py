"""Which layers each stage of a pipeline gets, as its user wishes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvdkit.errors import ArgumentError
from hvdkit.parallel.partition import Layer, Partition, by_hand, partition
from hvdkit.parallel.splitting import InFlight


@dataclass(frozen=True)
class Wishes:
    """What a user wants of the split; see `hvdkit.torch.PipelineModule`."""

    how: str | Sequence[int]
    stages: int
    ranks: int
    speeds: Sequence[float] | None
    limit: float | None
    in_flight: InFlight


def split_layers(
    wishes: Wishes,
    counted: Callable[[], list[Layer]],
    measured: Callable[[], list[Layer]] | None,
) -> Partition:
    """Return which layers each stage has, the same on every rank.

    Args:
        wishes: of the user.
        counted: what layers take, by their parameters.
        measured: what they take, by a dry run, which is collective; None: there can be none.

    Raises:
        ArgumentError: there is no such split, or none fits; shows the sizes.
    """
    if wishes.how == "time" and measured is None:
        raise ArgumentError('partition="time" measures the layers: give it an example')
    layers = counted() if measured is None else measured()
    how: dict[str, Any] = {
        "ranks": wishes.ranks,
        "speeds": wishes.speeds,
        "limit": wishes.limit,
        "in_flight": wishes.in_flight,
    }
    if not isinstance(wishes.how, str):
        if len(wishes.how) != wishes.stages:
            raise ArgumentError(
                f"partition={list(wishes.how)} is for {len(wishes.how)} stages, and there are "
                f"{wishes.stages}"
            )
        return by_hand(layers, wishes.how, **how)
    if wishes.how == "parameters":
        sizes = counted()
        layers = [replace(layer, cost=size.cost) for layer, size in zip(layers, sizes, strict=True)]
    elif wishes.how != "time":
        raise ArgumentError(
            f'partition={wishes.how!r}: give "parameters", "time", or the layers of each stage'
        )
    return partition(layers, wishes.stages, **how)
