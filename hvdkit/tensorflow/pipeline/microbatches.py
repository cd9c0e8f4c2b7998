"""Microbatches: a batch in parts, each of which goes through the pipeline by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hvdkit.errors import ArgumentError
from hvdkit.tensorflow.pipeline.batches import rows_of, sizes_of, split


@dataclass
class Microbatch:
    """What the ends of the pipeline are given of a microbatch, and make of it."""

    inputs: Any
    target: Any
    weight: float
    """Of its loss in that of the whole batch."""
    output: Any = None


def cut(inputs: Any, target: Any, most: int, *, first: bool, last: bool) -> list[Microbatch]:
    """Return the microbatches of a batch, which have what this rank's stages need.

    Args:
        inputs: of the first layer.
        target: for the loss; None: none.
        most: how many there are, if the batch has as many rows.
        first: whether this rank has the first stage.
        last: whether it has the last.

    Raises:
        ArgumentError: `inputs` and `target` differ in their rows.
    """
    rows = rows_of(inputs)
    if target is not None and rows_of(target) != rows:
        raise ArgumentError(f"inputs of {rows} rows have a target of {rows_of(target)}")
    sizes = sizes_of(rows, min(most, rows))
    nothing = [None] * len(sizes)
    return [
        Microbatch(part, wanted, size / rows)
        for part, wanted, size in zip(
            split(inputs, sizes) if first else nothing,
            split(target, sizes) if last and target is not None else nothing,
            sizes,
            strict=True,
        )
    ]
