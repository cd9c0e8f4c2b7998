"""The hierarchical all-reduce: rings in the nodes, and across them an all-reduce of every shard.

Cho, Finkler, Kung & Hunter, "BlueConnect: decomposing all-reduce for deep learning on heterogeneous
network hierarchy", SysML 2019.

Ranks are numbered node by node, k on each; the last node may have fewer.  A message is cut in
shards, as many as the smallest node has ranks, and a shard in chunks, as the all-reduce across has
them: one a node where that is the paper's ring.

hvdkit runs the same three phases with a node's shared memory in the place of its rings (see
`hvdkit.collectives.hierarchical`); here they are messages, so that they can be proved, drawn and
simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

from hvdkit.errors import ArgumentError
from hvdkit.schedules.cost import Cost
from hvdkit.schedules.phases import Phase
from hvdkit.schedules.registry import Algorithm, get
from hvdkit.schedules.steps import Exchange


def hierarchical_allreduce(rank: int, size: int, ranks_per_node: int) -> Iterator[Exchange]:
    """Reduce-scatter in a node, all-reduce across nodes, all-gather in a node.  [Cho et al. 2019]

    With m full nodes, steps 2(k-1) + 2(m-1), where a ring over all ranks takes 2(km-1); bytes sent
    a rank 2n(p-1)/p, which is the bound, but only 2n(m-1)/p of them to another node.
    p = 4, k = 2: ranks 0 and 2 hold shard c0 c1, ranks 1 and 3 hold c2 c3::

        step   from 0      from 1      from 2      from 3
        1      0→1 c2-3+   1→0 c0-1+   2→3 c2-3+   3→2 c0-1+
        2      0→2 c0+     1→3 c2+     2→0 c1+     3→1 c3+
        3      0→2 c1=     1→3 c3=     2→0 c0=     3→1 c2=
        4      0→1 c0-1=   1→0 c2-3=   2→3 c0-1=   3→2 c2-3=
    """
    for phase in hierarchical_phases(size, ranks_per_node):
        yield from phase.steps_of(rank)


@lru_cache(maxsize=16)  # one set of phases serves all ranks
def hierarchical_phases(
    size: int, ranks_per_node: int, across: str = "ring", segments: int = 1
) -> tuple[Phase, ...]:
    """Return the three phases; a rank begins each when it has done the one before.

    Args:
        size: number of ranks.
        ranks_per_node: k.
        across: the all-reduce of a shard, by its name in the registry.
        segments: of a shard, where `across` is pipelined.
    """
    k, shards = ranks_per_node, _shards(size, ranks_per_node)
    nodes = tuple(range(first, min(first + k, size)) for first in range(0, size, k))
    holders = tuple(range(local, size, k) for local in range(shards))
    crossing = get("allreduce", across)
    shard = crossing.chunks(len(nodes), segments)
    scatter, gather = (
        Phase(
            steps=get(collective, "ring").steps,
            groups=nodes,
            chunks=len,
            width=shard,
            held=shards,
            apart=0,
        )
        for collective in ("reducescatter", "allgather")
    )
    return (
        scatter,
        Phase(
            steps=crossing.steps,
            groups=holders,
            chunks=lambda _: shard,
            width=1,
            held=shard,
            apart=shard,
        ),
        gather,
    )


def hierarchical(ranks_per_node: int, across: str = "ring", segments: int = 1) -> Algorithm:
    """Return the algorithm for that many ranks a node.

    Args:
        ranks_per_node: k.
        across: the all-reduce of a shard, by its name in the registry.
        segments: of a shard, where `across` is pipelined.
    """

    def phases(size: int) -> tuple[Phase, ...]:
        return hierarchical_phases(size, ranks_per_node, across, segments)

    def steps(rank: int, size: int, _chunks: int) -> Iterator[Exchange]:
        for phase in phases(size):
            yield from phase.steps_of(rank)

    return Algorithm(
        collective="allreduce",
        name="hierarchical" if across == "ring" else f"hierarchical/{across}",
        steps=steps,
        chunks=lambda size, _: hierarchical_chunks(size, ranks_per_node, across, segments),
        cost=lambda size, _: hierarchical_cost(size, ranks_per_node, across, segments),
        source="Cho et al. 2019",
        phases=phases,
    )


def hierarchical_chunks(
    size: int, ranks_per_node: int, across: str = "ring", segments: int = 1
) -> int:
    """Return into how many chunks the message is cut: those of a shard, a shard."""
    shard = get("allreduce", across).chunks(-(-size // ranks_per_node), segments)
    return _shards(size, ranks_per_node) * shard


def hierarchical_cost(
    size: int, ranks_per_node: int, across: str = "ring", segments: int = 1
) -> Cost:
    """Return 2(k-1) steps and 2n(k-1)/k bytes and those across: with a ring 2(m-1) and 2n(m-1)/p.

    Raises:
        ArgumentError: the last node has fewer ranks, for which there is no formula.
    """
    if size % ranks_per_node:
        raise ArgumentError(
            f"{size} ranks do not fill nodes of {ranks_per_node}: the formula is for full nodes"
        )
    k, nodes = ranks_per_node, size // ranks_per_node
    crossing = get("allreduce", across)
    cost = crossing.cost(nodes, crossing.chunks(nodes, segments))
    return Cost(2 * (k - 1) + cost.steps, Fraction(2 * (k - 1), k) + cost.sent_fraction / k)


def _shards(size: int, ranks_per_node: int) -> int:
    """Return how many ranks the smallest node has."""
    if size <= ranks_per_node:
        return size
    return size % ranks_per_node or ranks_per_node
