"""Parameters that several layers share: which names stand for one."""

from __future__ import annotations

from collections.abc import Sequence

from hvdkit.parallel.pipeline.pipeline import Tie


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
