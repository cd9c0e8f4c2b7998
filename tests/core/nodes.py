"""Ranks that are threads of this process, said to be on several nodes, each with an arena.

on_nodes((2, 3), body)                 ranks 0 and 1 on one node, 2 to 4 on another
on_nodes(((0, 2), (1, 3, 4)), body)    ranks in turns
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from hvdkit.collectives.group import Group
from hvdkit.collectives.hierarchical import Hierarchy, open_hierarchy
from hvdkit.native import Kernels, load
from hvdkit.transport.arena import Arena
from hvdkit.transport.threads import ThreadTransport, ThreadWorld

#: Small, so that messages go in several pieces.
SLOT_BYTES = 4096
SECONDS = 60.0


#: Of each node how many ranks it has, or which.
Nodes = Sequence[int | Sequence[int]]


class Cluster:
    """The worlds of all ranks together and of each part of them; one that fails fails them all."""

    def __init__(self, nodes: Nodes) -> None:
        sizes = [node if isinstance(node, int) else len(node) for node in nodes]
        ends = [0, *accumulate(sizes)]
        self.nodes = [
            tuple(range(ends[i], ends[i + 1]) if isinstance(node, int) else node)
            for i, node in enumerate(nodes)
        ]
        self.everyone = ThreadWorld(ends[-1])
        self._parts: dict[tuple[str, tuple[int, ...]], ThreadWorld] = {}
        self._lock = threading.Lock()

    def part(self, label: str, ranks: Sequence[int]) -> ThreadWorld:
        """Return the world of `ranks`, the same one for each of them."""
        with self._lock:
            return self._parts.setdefault((label, tuple(ranks)), ThreadWorld(len(ranks)))

    def fail(self, error: BaseException) -> None:
        """End the waits of all ranks."""
        with self._lock:
            for world in (self.everyone, *self._parts.values()):
                world.failure = world.failure or error
                world.barrier.abort()


class NodeTransport(ThreadTransport):
    """The end of a rank that knows its node."""

    def __init__(self, cluster: Cluster, rank: int) -> None:
        super().__init__(cluster.everyone, rank)
        self.cluster = cluster

    def subset(self, ranks: Sequence[int]) -> ThreadTransport:
        return self._among("subset", ranks)

    def local(self) -> ThreadTransport:
        """Return a transport among the ranks of this node."""
        return self._among("node", next(node for node in self.cluster.nodes if self.rank in node))

    def _among(self, label: str, ranks: Sequence[int]) -> ThreadTransport:
        place = sorted(ranks).index(self.rank)
        return ThreadTransport(self.cluster.part(label, sorted(ranks)), place)


def open_nodes(
    transport: NodeTransport,
    *,
    segment_bytes: int = 64,
    trouble: Callable[[int], str] = lambda _rank: "",
) -> Hierarchy | str:
    """Return this rank's hierarchy; `trouble` says of a node's first rank why it has no arena."""
    local = transport.local()

    def arena() -> Arena | str:
        reason: str = local.broadcast_object(trouble(transport.rank), 0)
        directory = Path("/dev/shm")
        return reason or Arena.create(local, slot_bytes=SLOT_BYTES, spin=0, directory=directory)

    how: dict[str, Any] = {"kernels": load(), "segment_bytes": segment_bytes, "spin": 0}
    return open_hierarchy(transport, local, arena, **how)  # type: ignore[arg-type]


def on_nodes(
    nodes: Nodes,
    body: Callable[[Group], Any],
    *,
    kernels: Kernels | None = None,
    segment_bytes: int = 64,
    trouble: Callable[[int], str] = lambda _rank: "",
) -> list[Any]:
    """Call `body` on each rank of a group over nodes of so many ranks; its results in order."""
    cluster = Cluster(nodes)

    def rank(plain: ThreadTransport) -> Any:
        hierarchy: Hierarchy | str = ""
        try:
            transport = NodeTransport(cluster, plain.rank)
            hierarchy = open_nodes(transport, segment_bytes=segment_bytes, trouble=trouble)
            group = Group(
                transport,
                kernels or load(),
                "threads on several nodes",
                segment_bytes=segment_bytes,
                spin=0,
                hierarchy=hierarchy,
            )
            return body(group)
        except BaseException as exc:
            cluster.fail(exc)
            if isinstance(hierarchy, Hierarchy) and hierarchy.arena is not None:
                hierarchy.arena.native.abort()
            raise

    return cluster.everyone.run(rank, timeout=SECONDS)
