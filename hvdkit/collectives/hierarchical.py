"""The hierarchical all-reduce: shared memory within a node, messages across nodes.

Nodes of two and of three ranks, hence two shards, s and t; * has been reduced::

                 node 0             node 1
    rank         0      1           2      3      4
                 st     st          st     st     st
    [1]          s.     .t          s.     .t     ..      reduce-scatter in each node's arena
    [2]          s*  <--------->    s*                    all-reduce of s: ranks 0 and 2
                        t*  <--------->    t*             all-reduce of t: ranks 1 and 3
    [3]          s*t*   s*t*        s*t*   s*t*   s*t*    all-gather in each node's arena

There are as many shards as the smallest node has ranks, and all of them cross at the same time.
A short message is one shard: a few bytes cost what their messages cost.
With m nodes a node sends 2n(m-1)/m bytes, which is the bound, in as few steps as m ranks need.
A shard is reduced on one rank of a node and, across, by an algorithm whose ranks end with the same
bits: so all ranks do.  The other collectives of a group over several nodes are flat: messages
between ranks, whichever nodes they are on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.gathered import bind_gathered
from hvdkit.collectives.group import Group
from hvdkit.collectives.nodewise import NodewiseAllgather
from hvdkit.collectives.pick import pick_across
from hvdkit.collectives.program import even_bounds
from hvdkit.collectives.reduction import Reduction
from hvdkit.collectives.scheduled import run_schedule
from hvdkit.collectives.short_hierarchical import HierarchicalWay
from hvdkit.config import KIB
from hvdkit.dtypes import exported
from hvdkit.errors import HorovodInternalError
from hvdkit.native import Kernels
from hvdkit.transport.arena import Arena
from hvdkit.transport.base import JobTransport, Prepared, Transport
from hvdkit.tuning.estimates import Estimates

#: Bytes of a message that is not cut in shards, at most.
ONE_SHARD = 32 * KIB

#: Why a group on one node has none.
ONE_NODE = "the ranks are on one node"


@dataclass(frozen=True)
class Layout:
    """Which ranks are on which node.

    Args:
        nodes: the ranks of each node, ascending.
    """

    nodes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, leaders: Sequence[int]) -> Layout:
        """Return the layout in which rank r is on the node whose first rank is ``leaders[r]``."""
        return cls(
            tuple(
                tuple(rank for rank, theirs in enumerate(leaders) if theirs == leader)
                for leader in dict.fromkeys(leaders)
            )
        )

    @property
    def shards(self) -> int:
        """Into how many parts a message is cut: as many as the smallest node has ranks."""
        return min(map(len, self.nodes))

    @property
    def per_node(self) -> int:
        """How many ranks the fullest node has."""
        return max(map(len, self.nodes))

    def holders(self, shard: int) -> tuple[int, ...]:
        """Return the ranks that hold a shard: one of each node."""
        return tuple(node[shard] for node in self.nodes)

    def shards_of(self, nbytes: int) -> int:
        """Return into how many parts a message of `nbytes` is cut."""
        return 1 if nbytes <= ONE_SHARD else self.shards

    def counts(self, count: int, local_size: int, shards: int) -> tuple[int, ...]:
        """Return how many of `count` elements each rank of a node of `local_size` holds."""
        bounds = even_bounds(count, shards)
        held = [stop - start for start, stop in pairwise(bounds)]
        return (*held, *[0] * (local_size - shards))


class Hierarchy:
    """The way of a group over several nodes.

    Args:
        layout: which ranks are on which node.
        local_rank: of this rank on its node.
        arena: of the ranks of this node; None if there is no other.
        cross: the ranks that hold this rank's shard, or None if it holds none.
    """

    def __init__(
        self, layout: Layout, local_rank: int, arena: Arena | None, cross: Group | None
    ) -> None:
        self.layout = layout
        self.arena = arena
        self.cross = cross
        self._local_rank = local_rank
        self._local_size = 1 if arena is None else arena.native.size

    def __str__(self) -> str:
        """Return such as ``2 nodes, messages cut in 3 shards``."""
        shards = f"{self.layout.shards} shard{'s' * (self.layout.shards > 1)}"
        return f"{len(self.layout.nodes)} nodes, messages cut in {shards}"

    def adopt(self, estimates: Estimates) -> None:
        """Choose across nodes by what was measured.  Local, and alike on all ranks."""
        if self.cross is not None:
            across = Estimates(
                estimates.tuning,
                self.cross.size,
                1,
                sharing=self.layout.shards,
                segment_bytes=estimates.fixed_segment,
                usual_segment=estimates.usual_segment,
            )
            self.cross.adopt(across)

    def allreduce(
        self, group: Group, plan: Reduction, source: NDArray[Any], target: NDArray[Any]
    ) -> None:
        """Reduce 1-D `source` of all ranks into 1-D `target`, which it may be; blocking.

        Collective among ranks that have agreed on the call.

        Raises:
            PeerError: a rank of this node died.  An error here ends the waits of the other ranks of
                this node as well.
        """
        shards = self.layout.shards_of(source.nbytes)
        counts = self.layout.counts(source.size, self._local_size, shards)
        ends = list(accumulate(counts, initial=0))
        shard = target[ends[self._local_rank] : ends[self._local_rank + 1]]
        self._scatter(group, plan, source, shard, counts)
        if self.cross is not None and self._local_rank < shards:
            try:
                self._cross(self.cross, group, plan, shard)
            except BaseException:
                if self.arena is not None:
                    self.arena.native.abort()
                raise
        self._gather(group, plan, shard, target, counts)

    def short_way(self, group: Group, count: int, dtype: np.dtype[Any]) -> HierarchicalWay:
        """Return the way of arrays of `count` elements that are not worth segments.  Local."""
        return HierarchicalWay(
            group, self.layout, self._local_rank, self.arena, self.cross, count, dtype
        )

    def _scatter(
        self,
        group: Group,
        plan: Reduction,
        source: NDArray[Any],
        shard: NDArray[Any],
        counts: tuple[int, ...],
    ) -> None:
        """Reduce `source` of this node's ranks, each left with its shard."""
        if self.arena is None:
            if shard.ctypes.data != source.ctypes.data:
                np.copyto(shard, source)
            plan.begin(group, shard)
            return
        dtype, op, prescale, _, _, signature = plan.native
        arguments = (exported(source), exported(shard), counts, dtype, op, prescale, 1, 1.0)
        differs = group.arena_call(self.arena.native.reducescatter, *arguments, signature)
        assert not differs, "the ranks have agreed on the call"

    def _cross(self, cross: Group, group: Group, plan: Reduction, shard: NDArray[Any]) -> None:
        """Reduce and finish the shard of all nodes."""
        cross.recorder = group.recorder
        way = pick_across(shard.nbytes, cross.size, cross.estimates)
        if way == "gathered":
            self._cross_gathered(cross, plan, shard)
            return
        run_schedule(cross, "allreduce", way, shard, op=plan.op)
        plan.finish(group, shard)

    def _cross_gathered(self, cross: Group, plan: Reduction, shard: NDArray[Any]) -> None:
        key = ("gathered", plan.call.signature, shard.size)
        bound = cross.recall(key)
        if bound is None:
            dtype, op, _, *others = plan.native  # which is scaled already
            bound = bind_gathered(cross, (dtype, op, 1.0, *others), shard.shape)
            cross.keep(key, bound)
        differs = bound(exported(shard), exported(shard))
        assert not differs, "the ranks have agreed on the call"

    def _gather(
        self,
        group: Group,
        plan: Reduction,
        shard: NDArray[Any],
        target: NDArray[Any],
        counts: tuple[int, ...],
    ) -> None:
        """Collect the shards of this node's ranks in `target`."""
        if self.arena is None:
            return
        nbytes = tuple([count * target.itemsize for count in counts])
        arguments = (exported(shard), exported(target), nbytes, plan.call.signature)
        differs = group.arena_call(self.arena.native.allgather, *arguments)
        assert not differs, "the ranks have agreed on the call"

    def prepare_allgather(self, group: Group, rows: NDArray[np.int64]) -> Prepared:
        """Return an all-gather of small `rows`, each rank's in its place, by way of the nodes."""
        leads = self.cross if self._local_rank == 0 else None
        return NodewiseAllgather(
            self.layout.nodes,
            group.rank,
            rows,
            arena=self.arena,
            arena_call=group.arena_call,
            leaders=None if leads is None else leads.transport,
        )

    def abort(self, error: HorovodInternalError) -> None:
        """End whatever waits here, now and later, with `error`.  From any thread."""
        if self.cross is not None:
            self.cross.abort(error)
        if self.arena is not None:
            self.arena.native.abort()

    def close(self, *, in_step: bool = True) -> None:
        """Let go of the memory and the messages.  Collective if the ranks are in step."""
        if self.arena is not None:
            self.arena.close()
        if self.cross is not None:
            self.cross.close(in_step=in_step)


def open_hierarchy(
    transport: JobTransport,
    local: Transport,
    make_arena: Callable[[], Arena | str],
    *,
    kernels: Kernels,
    segment_bytes: int,
    spin: int,
) -> Hierarchy | str:
    """Return the hierarchy of the ranks of `transport`.  Collective among them.

    Args:
        transport: messages among all ranks of the group, which keeps it.
        local: messages among those of this node; the arena's, or closed here.
        make_arena: makes the arena of the ranks of `local`, or says why there is none: the same on
            all of them.  Called on nodes with several ranks.
        kernels, segment_bytes, spin: as a `Group` has them.

    Returns:
        The hierarchy, or why there is none, the same on every rank.
    """
    leader = local.broadcast_object(transport.rank, 0)
    layout = Layout.of(transport.allgather_ints(np.array([leader], np.int64))[:, 0].tolist())
    if len(layout.nodes) == 1:
        local.close()
        return ONE_NODE
    arena = make_arena() if local.size > 1 else None
    mine = arena if isinstance(arena, str) else ""
    troubles = [text for text in transport.allgather_object(mine) if text]
    if isinstance(arena, Arena) and troubles:
        arena.close()
    elif not isinstance(arena, Arena):
        local.close()
    if troubles:
        return troubles[0]
    assert not isinstance(arena, str)
    cross = None
    if local.rank < layout.shards:
        cross = Group(
            transport.subset(layout.holders(local.rank)),
            kernels,
            "the ranks are on several nodes",
            segment_bytes=segment_bytes,
            spin=spin,
        )
    return Hierarchy(layout, local.rank, arena, cross)
