"""The hierarchical all-reduce of short arrays, whose own rounds say whether all ranks make it.

The arena compares signatures in each of its calls, and so do the ranks that cross: so nobody has to
ask first where all ranks expect the call (see `hvdkit.collectives.short`)::

    [1]  reduce-scatter in each node's arena     refused where a node's ranks differ
    [2]  all-reduce of a shard across nodes      refused where nodes differ, or by one of them
    [3]  all-gather in each node's arena         refused where what crossed was

After a refusal in [1] all ranks of the node know, and those that cross refuse in [2], for them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.gathered import bind_gathered
from hvdkit.collectives.group import Group
from hvdkit.collectives.pick import pick_across
from hvdkit.collectives.prepared import Recipe, Tracer
from hvdkit.collectives.scheduled import prepare_schedule
from hvdkit.dtypes import exported
from hvdkit.transport.arena import Arena

if TYPE_CHECKING:
    from hvdkit.collectives.hierarchical import Layout

#: The signature of whoever refuses.
REFUSED = 0x72656675736564


class _Across(Protocol):
    """An all-reduce of a shard among the ranks that hold it, by which they learn if all make it."""

    def bind(self, recipe: Recipe, tracer: Tracer) -> Callable[[Any, Any], bool]: ...

    def refuse(self) -> None: ...

    def free(self) -> None: ...


class _Gathered:
    """By the elements themselves, which travel behind the signature; fulfils `_Across`."""

    def __init__(self, cross: Group, shape: tuple[int, ...]) -> None:
        self._cross = cross
        self._shape = shape

    def bind(self, recipe: Recipe, _tracer: Tracer) -> Callable[[Any, Any], bool]:
        bound = bind_gathered(self._cross, recipe, self._shape)
        return lambda source, target: not bound(source, target)

    def refuse(self) -> None:
        frames = self._cross.frames
        frames.agree(frames.upcoming(), REFUSED, 0)

    def free(self) -> None:
        pass


class HierarchicalWay:
    """Of arrays of one length and dtype; fulfils `Way`.

    Args:
        group: the ranks, on several nodes.
        layout: which ranks are on which node.
        local_rank: of this rank on its node.
        arena: of the ranks of this node; None if there is no other.
        cross: the ranks that hold this rank's shard, or None if it holds none.
        count, dtype: of the elements.
    """

    def __init__(
        self,
        group: Group,
        layout: Layout,
        local_rank: int,
        arena: Arena | None,
        cross: Group | None,
        count: int,
        dtype: np.dtype[Any],
    ) -> None:
        self._group = group
        self._arena = arena
        shards = layout.shards_of(count * dtype.itemsize)
        local_size = 1 if arena is None else arena.native.size
        self._counts = layout.counts(count, local_size, shards)
        self._shard = shard = np.zeros(self._counts[local_rank], dtype)
        self._bytes = tuple([held * dtype.itemsize for held in self._counts])
        self._across: _Across | None = None
        if cross is not None and local_rank < shards:
            algorithm = pick_across(shard.nbytes, cross.size, cross.estimates)
            if algorithm == "gathered":
                self._across = _Gathered(cross, shard.shape)
            else:
                self._across = prepare_schedule(cross, "allreduce", algorithm, shard.size, dtype)

    def bind(self, recipe: Recipe, tracer: Tracer) -> Callable[[Any, Any], bool]:
        dtype, op, prescale, *last, signature = recipe
        scaled = cast("Recipe", (dtype, op, 1.0, *last, signature))
        across = None if self._across is None else self._across.bind(scaled, tracer)
        arena, shard = self._arena, exported(self._shard)
        if arena is None:
            assert across is not None, "a node's only rank holds all shards"
            return lambda source, target: self._alone(across, prescale, source, target)
        scatter, gather = arena.native.reducescatter, arena.native.allgather
        counts, nbytes = self._counts, self._bytes

        def reduce(source: NDArray[Any], target: NDArray[Any]) -> bool:
            if scatter(source, shard, counts, dtype, op, prescale, 1, 1.0, signature):
                if self._across is not None:
                    self._across.refuse()
                return False
            if across is not None and not across(shard, shard):
                arena.native.exchange(b"", REFUSED)
                return False
            return not gather(shard, target, nbytes, signature)

        return lambda source, target: self._whole(reduce, source, target)

    def refuse(self) -> None:
        def refuse() -> None:
            if self._arena is not None:
                self._arena.native.exchange(b"", REFUSED)
            if self._across is not None:
                self._across.refuse()

        self._whole(refuse)

    def free(self) -> None:
        if self._across is not None:
            self._across.free()

    def _alone(
        self,
        across: Callable[[Any, Any], bool],
        prescale: float,
        source: NDArray[Any],
        target: NDArray[Any],
    ) -> bool:
        """Reduce, with no other rank on this node."""
        shard = exported(self._shard)
        shard[:] = source.reshape(-1)
        if prescale != 1.0:
            self._group.kernels.scale(self._shard, factor=prescale)
        if not across(shard, shard):
            return False
        target.reshape(-1)[:] = shard
        return True

    def _whole(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that may end half-way: this node's other ranks would wait for ever."""
        try:
            return self._group.arena_call(function, *arguments)
        except BaseException:
            if self._arena is not None:
                self._arena.native.abort()
            raise
