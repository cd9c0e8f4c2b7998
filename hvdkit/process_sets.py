"""`ProcessSet`: some of the ranks, to which collectives can be limited."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hvdkit.errors import ArgumentError, format_ranks

if TYPE_CHECKING:
    from hvdkit.engine.communicator import Communicator


class ProcessSet:
    """Some of the ranks.  Of use once `init` or `add_process_set` has been given it.

    Args:
        ranks: of all ranks, those in the set, in any order.

    Raises:
        ArgumentError: a rank twice, or what is not a rank.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        try:
            numbers = sorted(operator.index(rank) for rank in ranks)
        except TypeError:
            raise ArgumentError(f"a process set is a list of ranks, not {ranks!r}") from None
        if len(set(numbers)) < len(numbers) or (numbers and numbers[0] < 0):
            raise ArgumentError(f"a process set has each rank once, from 0 up; not {numbers}")
        self.ranks: list[int] | None = numbers
        self.process_set_id: int | None = None
        """The set's number; None while hvdkit does not know it."""
        self._communicator: Communicator | None = None

    def bind(self, number: int, ranks: Iterable[int], communicator: Communicator | None) -> None:
        """Make the set of use; `communicator` is None where this rank is not in it."""
        self.process_set_id, self.ranks = number, list(ranks)
        self._communicator = communicator

    def unbind(self) -> None:
        """Make the set of no use any more."""
        self.process_set_id = self._communicator = None

    def size(self) -> int | None:
        """Return the number of ranks in the set; None while hvdkit does not know it.  Local."""
        return None if self.process_set_id is None else len(self.ranks or ())

    def rank(self) -> int | None:
        """Return this process's place in the set, or None if it is not in it.  Local."""
        return None if self._communicator is None else self._communicator.rank

    def included(self) -> bool | None:
        """Return whether this process is in the set; None while hvdkit does not know it.  Local."""
        return None if self.process_set_id is None else self._communicator is not None

    def communicator(self) -> Communicator:
        """Return what does this set's collectives.

        Raises:
            ArgumentError: hvdkit does not know the set, or this rank is not in it.
        """
        if self._communicator is not None:
            return self._communicator
        if self.process_set_id is None:
            raise ArgumentError(f"{self} is not known: call hvd.add_process_set() with it first")
        ranks = format_ranks(self.ranks or [])
        raise ArgumentError(f"this rank is not in the process set of {ranks}")

    def __deepcopy__(self, memo: dict[int, object]) -> ProcessSet:
        """Return the set itself: a copy of a model communicates as the model does."""
        return self

    def __reduce__(self) -> str | tuple[type[ProcessSet], tuple[list[int]]]:
        """Pickle the ranks: what communicates does not travel."""
        if self is global_process_set:
            return "global_process_set"
        return ProcessSet, (list(self.ranks or ()),)

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


#: All ranks.
global_process_set = ProcessSet([])
