"""The all-reduce of short arrays by a schedule, which ranks that expect it begin without asking.

Ranks have to agree on a call before they make it, which takes them an exchange, as long as all
steps of a short message together.  But a program makes the same calls in the same order again and
again; so, where the same call has come after two others before, all ranks begin with it at once,
and what they exchange says whether all of them have made it::

    as expected         reduce                                  all marks are alike: done
    not as expected     reduce, with another mark  >  agree  >  reduce, or an error

A rank whose call is another takes part first, with a mark that tells the others so, and comes to
the agreement with them.  All ranks have agreed on all calls so far, so they expect the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.frames import LAST, signed
from hvdkit.collectives.group import Group
from hvdkit.collectives.prepared import Recipe, Tracer
from hvdkit.collectives.repeat import Bound
from hvdkit.collectives.scheduled import prepare_schedule
from hvdkit.dtypes import DTYPES
from hvdkit.native import recurring


class Way(Protocol):
    """How all ranks reduce arrays of one length and dtype, and learn whether they all do.

    A `PreparedSchedule` is one, and a `HierarchicalWay`.
    """

    def bind(self, recipe: Recipe, tracer: Tracer) -> Callable[[Any, Any], bool]:
        """Return what reduces a source of all ranks into a target, which it may be.  Collective.

        It returns whether all ranks have given this recipe's signature; otherwise the target is as
        it was.  Both are `exported`.
        """
        ...

    def refuse(self) -> None:
        """Take part although this rank's call is another: all other ranks learn so.  Collective."""
        ...

    def free(self) -> None:
        """Let go of what the transport keeps for it.  Local."""
        ...


class ShortAllreduce:
    """The all-reduce of arrays like one by a `Way`, in Python; fulfils `Bound`.

    Args:
        group, recipe, shape, algorithm: as in `bind_short`.
    """

    def __init__(
        self, group: Group, recipe: Recipe, shape: tuple[int, ...], algorithm: str
    ) -> None:
        self.calls = 0
        self.nanoseconds = 0
        self.quick: Any = None
        """Does the same as this, as long as it is expected."""
        self._group = group
        self._recipe = recipe
        self._signature = recipe[-1]
        self._dtype = DTYPES[recipe[0]]
        self._count = int(np.prod(shape, dtype=np.int64))
        self._algorithm = algorithm
        self._key: Hashable = ("allreduce", algorithm, self._count, self._dtype)
        self._way: Way | None = None
        self._run: Callable[[Any, Any], bool]

    def __call__(self, source: NDArray[Any], target: NDArray[Any]) -> int:
        """Reduce `source` of all ranks into `target`, which it may be; blocking.  Collective.

        Both are as `exported` has them.

        Returns:
            Nonzero if signatures differ: `target` is as it was.
        """
        began = time.perf_counter_ns()
        expected = self._group.frames.expected() == self._key
        if (self._at_once if expected else self._once_agreed)(source, target):
            return 1
        self.calls += 1
        self.nanoseconds += time.perf_counter_ns() - began
        return 0

    def _at_once(self, source: NDArray[Any], target: NDArray[Any]) -> int:
        """Reduce without asking, as all ranks expect this call."""
        frames = self._group.frames
        last = frames.state.item(LAST)
        self._bind(self._group.prepared.find(self._key))
        frames.begin()
        if not self._run(source, target):
            return self._refused(source, target)
        frames.met(self._signature)
        if self.quick is not None:
            how = (last, frames.counts(last), True)
            self.quick.prepare(frames.state, *how, self._run, self._refused)
        return 0

    def _refused(self, source: NDArray[Any], target: NDArray[Any]) -> int:
        """Find out which call the others make, after it was not this one."""
        self._group.frames.refused()
        return self._once_agreed(source, target)

    def _once_agreed(self, source: NDArray[Any], target: NDArray[Any]) -> int:
        """Reduce if the ranks agree on this call."""
        group = self._group
        if not group.frames.agree(group.frames.upcoming(), self._signature, 0, way=self._key):
            return 1
        self._bind(group.prepared.get(self._key, self._make))
        alike = self._run(source, target)
        assert alike, "the ranks have agreed on the call"
        return 0

    def _bind(self, way: Way) -> None:
        if way is not self._way:
            self._way, self._run = way, way.bind(self._recipe, lambda: self._group.tracer)

    def _make(self) -> Way:
        group = self._group
        if self._algorithm == "hierarchical":
            assert group.hierarchy is not None
            return group.hierarchy.short_way(group, self._count, self._dtype)
        return prepare_schedule(group, "allreduce", self._algorithm, self._count, self._dtype)


def bind_short(
    group: Group, recipe: Recipe, shape: tuple[int, ...], nbytes: int, algorithm: str
) -> Bound | None:
    """Return the all-reduce of short arrays by a schedule, with all else bound; None: of no use.

    Args:
        group: the ranks, which share no memory.
        recipe: of the call.
        shape, nbytes: of an array.
        algorithm: a schedule's name, or ``"hierarchical"``.
    """
    if group.arena is not None or not group.estimates.is_short(nbytes):
        return None
    general = ShortAllreduce(group, recipe, shape, algorithm)
    general.quick = recurring(general, signed(recipe[-1]))
    return general if general.quick is None else cast("Bound", general.quick)
