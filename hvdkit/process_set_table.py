"""The process sets of a job: which there are, and what each communicates with.

Number 0 is that of all ranks.  Some are made for something else than a user's wish, such as the
axes of a mesh: these stay, and a user's own of the same ranks is let share them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.engine.channels import Channels
from hvdkit.engine.communicator import Communicator
from hvdkit.engine.couriers import Couriers
from hvdkit.engine.grouping import GroupMaker
from hvdkit.engine.progress import Progress
from hvdkit.errors import ArgumentError, format_ranks
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.transport.base import JobTransport


class ProcessSetTable:
    """The process sets of one job, as this rank sees them.  Of use after `open`.

    Args:
        transport: messages among all ranks.
        groups: makes the groups of operations by name.
        channels: those of each set.
        couriers: let go of with their sets.
    """

    def __init__(
        self, transport: JobTransport, groups: GroupMaker, channels: Channels, couriers: Couriers
    ) -> None:
        self._transport = transport
        self._groups = groups
        self._channels = channels
        self._couriers = couriers
        self.members: dict[int, tuple[int, ...]] = {0: tuple(range(transport.size))}
        """The ranks of every process set, by its number."""
        self.named: dict[int, Group] = {}
        """Where operations by name run, of each set that this rank is in."""
        self._sets: dict[int, ProcessSet] = {0: global_process_set}
        self._next = 1
        self._made_here: set[int] = set()  # those that no user has asked for
        self._adopted: dict[int, ProcessSet] = {}  # the users' own for these

    def open(self, progress: Progress) -> Communicator:
        """Return the collectives of all ranks.  Collective, blocking.

        Args:
            progress: runs what has a name, in the groups of `named` and among `members`.
        """
        self._progress = progress
        self._world = self._communicator(0, self._transport.duplicate())
        global_process_set.bind(0, self.members[0], self._world)
        return self._world

    def close(self) -> None:
        """Let go of the groups of operations by name, and make the sets of no use any more."""
        for group in self.named.values():
            group.close()
        for process_set in (*self._sets.values(), *self._adopted.values()):
            process_set.unbind()

    def communicators(self) -> list[Communicator]:
        """Return those of the sets that this rank is in."""
        return [known.communicator() for known in self._sets.values() if known.included()]

    def add(self, process_set: ProcessSet | Iterable[int]) -> ProcessSet:
        """Make a process set of use.  Collective among all ranks, in the same order.

        Raises:
            ArgumentError: the set is known already, or has a rank that there is not.
            MismatchError: ranks gave different sets.
        """
        if not isinstance(process_set, ProcessSet):
            process_set = ProcessSet(process_set)
        ranks = tuple(process_set.ranks or ())
        known = self._number_of(ranks)
        if known in self._made_here and known not in self._adopted:
            return self._world.call(self._adopt, process_set, known)
        try:
            if not ranks or ranks[-1] >= self._transport.size:
                raise ArgumentError(
                    f"{list(ranks)} is no process set: ranks are 0 to {self._transport.size - 1}"
                )
            if known is not None:
                raise ArgumentError(f"there is a process set of ranks {list(ranks)} already")
        except ArgumentError as exc:
            self._world.lane.call(self._world.group.refuse, "add_process_set", None, exc)
        return self._world.call(self._add, process_set, ranks)

    def _add(self, group: Group, process_set: ProcessSet, ranks: tuple[int, ...]) -> ProcessSet:
        group.agree(Call("add_process_set", None, (("ranks", str(list(ranks))),)))
        number, self._next = self._next, self._next + 1
        communicator = None
        if self._transport.rank in ranks:
            communicator = self._communicator(number, self._transport.subset(ranks), ranks)
        self.members[number] = ranks
        self._sets[number] = process_set
        process_set.bind(number, ranks, communicator)
        self._progress.reconsider()
        return process_set

    def find(self, ranks: Iterable[int]) -> ProcessSet | None:
        """Return the process set of `ranks`, if there is one.  Local."""
        number = self._number_of(tuple(sorted(ranks)))
        return None if number is None else self._sets[number]

    def find_or_add(self, ranks: Iterable[int]) -> ProcessSet:
        """Return the process set of `ranks`, which is added if there is none.  Collective."""
        found = self.find(ranks)
        if found is None:
            found = self.add(ranks)
            assert found.process_set_id is not None
            self._made_here.add(found.process_set_id)
        return found

    def _number_of(self, ranks: tuple[int, ...]) -> int | None:
        return next((number for number, known in self.members.items() if known == ranks), None)

    def _adopt(self, group: Group, process_set: ProcessSet, number: int) -> ProcessSet:
        """Let a user's process set be one that was made for something else, and stays for it."""
        ranks = self.members[number]
        group.agree(Call("add_process_set", None, (("ranks", str(list(ranks))),)))
        mine = self._sets[number]
        process_set.bind(number, ranks, mine.communicator() if mine.included() else None)
        self._adopted[number] = process_set
        return process_set

    def remove(self, process_set: ProcessSet) -> bool:
        """Let go of a process set; return whether it was one.  Collective among all ranks.

        Raises:
            ArgumentError: on every rank, if named operations are under way in the set on any.
        """
        number = process_set.process_set_id
        if number is not None and self._adopted.get(number) is process_set:
            self._adopted.pop(number).unbind()
            return True
        if number is None or number == 0 or self._sets.get(number) is not process_set:
            return False
        self._world.call(self._remove, number)
        return True

    def _remove(self, group: Group, number: int) -> None:
        call = Call("remove_process_set", None, (("process_set", str(number)),))
        busy = np.flatnonzero(group.agree(call, [int(self._progress.in_use(number))]))
        if busy.size:
            raise ArgumentError(
                f"{self._sets[number]} cannot be removed: operations are under way in it on "
                f"{format_ranks(busy.tolist())}; synchronize them first"
            )
        self._progress.release(number)
        process_set = self._sets.pop(number)
        del self.members[number]
        if process_set.included():
            self._channels.release_set(process_set.communicator())
            self._groups.release(self.named.pop(number))
            self._couriers.release(number)
        process_set.unbind()

    def _communicator(
        self, number: int, transport: JobTransport, ranks: tuple[int, ...] | None = None
    ) -> Communicator:
        """Return the collectives of a set of ranks, this one among them.  Collective among them."""
        ranks = self.members[0] if ranks is None else ranks
        label = "all ranks" if number == 0 else f"process set {number}"
        channel = self._channels.make(label, ranks, transport, beside=False)
        by_name = self._groups.make(transport.duplicate(), f"{label}, by name", beside=True)
        self.named[number] = by_name
        return Communicator(number, ranks, channel, self._progress)
