"""Parameters that several layers share: which names stand for one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from hvdkit.errors import ArgumentError

#: Names of parameters that are one, such as ``("layers.0.weight", "layers.7.weight")``.
Tie = tuple[str, ...]


def merged(ties: Sequence[Tie]) -> list[Tie]:
    """Return the same ties, those that have a name in common as one."""
    groups: list[dict[str, None]] = []
    for tie in ties:
        group = dict.fromkeys(tie)
        apart = []
        for other in groups:
            if other.keys() & group.keys():
                group = other | group
            else:
                apart.append(other)
        groups = [*apart, group]
    return [tuple(group) for group in groups]


def check_ties(ties: Sequence[Tie], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse ties of what cannot be one parameter.

    Args:
        shapes: of all layers' parameters, by name.

    Raises:
        ArgumentError: no such parameter, or parameters of different shapes.
    """
    for tie in ties:
        for name in tie:
            if name not in shapes:
                near = difflib.get_close_matches(name, shapes, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ArgumentError(f"tied: there is no parameter {name!r}{hint}")
        if len({shapes[name] for name in tie}) > 1:
            each = ", ".join(f"{name} {shapes[name]}" for name in tie)
            raise ArgumentError(f"tied parameters must have one shape, not {each}")


def layer_of(name: str) -> int:
    """Return the layer that has a parameter.

    Raises:
        ArgumentError: `name` is not ``layers.<number>.<parameter>``.
    """
    parts = name.split(".", 2)
    if len(parts) < 3 or parts[0] != "layers" or not parts[1].isdigit():
        raise ArgumentError(f"{name!r} is no parameter's name, such as 'layers.0.weight'")
    return int(parts[1])
