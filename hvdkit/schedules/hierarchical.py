"""The hierarchical all-reduce: rings within the nodes, and a ring across them for every shard.

Cho, Finkler, Kung & Hunter, "BlueConnect: decomposing all-reduce for deep learning on heterogeneous
network hierarchy", SysML 2019.

Ranks are numbered node by node, k on each; the last node may have fewer.  A message is cut in
shards, as many as the smallest node has ranks, and a shard in chunks, one a node.

hvdkit runs the same three phases with a node's shared memory in the place of its rings (see
`hvdkit.collectives.hierarchical`); here they are messages, so that they can be proved and drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from hvdkit.errors import ArgumentError
from hvdkit.schedules.cost import Cost
from hvdkit.schedules.registry import Algorithm
from hvdkit.schedules.ring import ring_allgather, ring_allreduce, ring_reducescatter
from hvdkit.schedules.steps import Exchange, Transfer


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
    nodes, shards = -(-size // ranks_per_node), _shards(size, ranks_per_node)
    node, local = divmod(rank, ranks_per_node)
    first = node * ranks_per_node
    here = min(ranks_per_node, size - first)

    def within(transfer: Transfer | None) -> Transfer | None:
        """Place a transfer of a shard; ranks beyond the number of shards hold none."""
        if transfer is None or not isinstance(transfer[1], int) or transfer[1] >= shards:
            return None
        return first + transfer[0], range(transfer[1] * nodes, (transfer[1] + 1) * nodes)

    def across(transfer: Transfer | None) -> Transfer | None:
        """Place a transfer of a chunk of this rank's shard."""
        if transfer is None or not isinstance(transfer[1], int):
            return None
        return transfer[0] * ranks_per_node + local, local * nodes + transfer[1]

    for step in ring_reducescatter(local, here, here):
        send, reduce = within(step.send), within(step.reduce)
        if send is not None or reduce is not None:
            yield Exchange(send=send, reduce=reduce)
    if local < shards:
        for step in ring_allreduce(node, nodes, nodes):
            yield Exchange(
                send=across(step.send), reduce=across(step.reduce), store=across(step.store)
            )
    for step in ring_allgather(local, here, here):
        send, store = within(step.send), within(step.store)
        if send is not None or store is not None:
            yield Exchange(send=send, store=store)


def hierarchical(ranks_per_node: int) -> Algorithm:
    """Return the algorithm for that many ranks a node."""

    def steps(rank: int, size: int, _chunks: int) -> Iterator[Exchange]:
        return hierarchical_allreduce(rank, size, ranks_per_node)

    return Algorithm(
        collective="allreduce",
        name="hierarchical",
        steps=steps,
        chunks=lambda size, _segments: hierarchical_chunks(size, ranks_per_node),
        cost=lambda size, _chunks: hierarchical_cost(size, ranks_per_node),
        source="Cho et al. 2019",
    )


def hierarchical_chunks(size: int, ranks_per_node: int) -> int:
    """Return into how many chunks the message is cut: one a shard and node."""
    return _shards(size, ranks_per_node) * -(-size // ranks_per_node)


def hierarchical_cost(size: int, ranks_per_node: int) -> Cost:
    """Return 2(k-1) + 2(m-1) steps and 2n(p-1)/p bytes, for full nodes.

    Raises:
        ArgumentError: the last node has fewer ranks, for which there is no formula.
    """
    if size % ranks_per_node:
        raise ArgumentError(
            f"{size} ranks do not fill nodes of {ranks_per_node}: the formula is for full nodes"
        )
    nodes = size // ranks_per_node
    return Cost(2 * (ranks_per_node - 1) + 2 * (nodes - 1), Fraction(2 * (size - 1), size))


def _shards(size: int, ranks_per_node: int) -> int:
    """Return how many ranks the smallest node has."""
    if size <= ranks_per_node:
        return size
    return size % ranks_per_node or ranks_per_node
