"""Processes that a rank forks off, such as a DataLoader's workers, do not hold on to its links."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forgettable(Protocol):
    """What a forked child is to let go of."""

    def forget(self) -> None:
        """Let go of everything, in the child."""
        ...


_held: weakref.WeakSet[Forgettable] = weakref.WeakSet()
_registered: list[bool] = []


def forget_in_children(held: Forgettable) -> None:
    """Have `held` forgotten in every process that is forked off as long as it lives."""
    if not _registered:
        _registered.append(True)
        os.register_at_fork(after_in_child=_forget_all)
    _held.add(held)


def _forget_all() -> None:
    for held in list(_held):
        held.forget()
