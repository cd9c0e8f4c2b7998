"""What a distributed optimizer can be asked for: checked and laid out alike for every framework."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any

from hvdkit.dtypes import ReduceOp, as_op
from hvdkit.errors import ArgumentError


def gradient_op(op: Any, predivide: float = 1.0) -> ReduceOp:
    """Return how gradients are to be combined.

    Raises:
        ArgumentError: an operation that is not for gradients, or has no division to split.
    """
    operation = as_op(op)
    if operation not in (ReduceOp.AVERAGE, ReduceOp.SUM, ReduceOp.ADASUM):
        raise ArgumentError(f"gradients can be combined by Average, Sum or Adasum, not {operation}")
    if predivide != 1.0 and operation is not ReduceOp.AVERAGE:
        raise ArgumentError("gradient_predivide_factor is for op=Average: it splits the division")
    return operation


def check_passes(passes: int) -> None:
    """Refuse what is no number of backward passes.

    Raises:
        ArgumentError: less than 1.
    """
    if passes < 1:
        raise ArgumentError(f"backward_passes_per_step must be 1 or more, not {passes}")


def check_groups(groups: Any, kind: Any, of: str) -> None:
    """Refuse what are no groups.

    Args:
        groups: so many, or lists of things to reduce together; None: by size.
        kind: the class of the things, or a tuple of classes.
        of: what they are called.

    Raises:
        ArgumentError: neither a number nor lists of them, or one that is in two groups.
    """
    if groups is None:
        return
    if isinstance(groups, int):
        if groups < 1:
            raise ArgumentError(f"groups must be 1 or more, or lists of {of}")
        return
    listed = [thing for group in groups for thing in group]
    if not all(isinstance(thing, kind) for thing in listed):
        raise ArgumentError(f"groups must be lists of {of}")
    if len({id(thing) for thing in listed}) < len(listed):
        raise ArgumentError(f"one of the {of} is in two groups")


def places_of(
    things: Sequence[Hashable], groups: int | Sequence[Sequence[Hashable]] | None
) -> list[list[int]] | None:
    """Return groups of things as groups of their places in `things`; others are left out."""
    if groups is None:
        return None
    if isinstance(groups, int):
        bounds = [i * len(things) // groups for i in range(groups + 1)]
        places = [list(range(*ends)) for ends in pairwise(bounds)]
        return [group for group in places if group]
    place = {thing: index for index, thing in enumerate(things)}
    chosen = [[place[thing] for thing in group if thing in place] for group in groups]
    return [group for group in chosen if group]
