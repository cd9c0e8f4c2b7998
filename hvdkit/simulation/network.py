"""The machine that a schedule is played on: what messages cost, and who is slow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from hvdkit.config import SEGMENT_BYTES
from hvdkit.errors import ArgumentError
from hvdkit.schedules.machine import USUAL, Machine
from hvdkit.simulation.rounds import Ints
from hvdkit.simulation.topologies import Crossbar, Topology

#: How ranks are numbered: node by node, or a rank of each node in turn.
Placement = Literal["block", "round-robin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Ranks on nodes, and the links between them.

    Args:
        size: number of ranks.
        ranks_per_node: of a full node; None: all ranks are on one node.
        machine: what messages cost within a node and between nodes, where no link is shared.
            Messages within a node do not slow each other down.
        topology: the links between nodes.
        placement: how ranks are numbered.
        switch: seconds more for each switch, or other node, that a message passes.
        segment_bytes: of a message, at most: longer ones are cut, and each segment is reduced while
            the next ones travel (see `hvdkit.collectives.executor`).

    Raises:
        ArgumentError: a number that makes no sense, or that the topology is not for.
    """

    size: int
    ranks_per_node: int | None = None
    machine: Machine = USUAL
    topology: Topology = field(default_factory=Crossbar)
    placement: Placement = "block"
    switch: float = 0.0
    segment_bytes: float = SEGMENT_BYTES

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("ranks_per_node", self.per_node)):
            if value < 1:
                raise ArgumentError(f"{name} is {value}; it must be 1 or more")
        if not self.segment_bytes > 0:
            raise ArgumentError(f"segments of {self.segment_bytes:g} bytes; they must have some")
        if not self.switch >= 0:
            raise ArgumentError(f"a switch takes {self.switch:g} s; it must take 0 or more")
        if self.placement not in get_args(Placement):
            raise ArgumentError(f"unknown placement {self.placement!r}; give block or round-robin")
        if self.placement == "round-robin" and self.size % self.per_node:
            raise ArgumentError(
                f"{self.size} ranks do not fill nodes of {self.per_node}: they cannot be placed "
                "round-robin"
            )
        self.topology.check(self.nodes)

    @property
    def per_node(self) -> int:
        """The ranks of a full node."""
        return self.size if self.ranks_per_node is None else min(self.ranks_per_node, self.size)

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return -(-self.size // self.per_node)

    def node_of(self) -> Ints:
        """Return the node of each rank."""
        ranks = np.arange(self.size)
        return ranks % self.nodes if self.placement == "round-robin" else ranks // self.per_node

    def by_node(self) -> Ints:
        """Return the ranks node by node."""
        return np.argsort(self.node_of(), kind="stable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What makes a machine worse than its figures.

    Args:
        stragglers: by rank, how many times as long its messages and its reductions take; of two
            stragglers, the slower one's factor counts for a message between them.
        jitter: how much longer a message takes on the average, as a share of its time: the delays
            are exponentially distributed, and independent.
        seed: of the jitter.

    Raises:
        ArgumentError: a factor that is not above 0, or a negative jitter.
    """

    stragglers: Mapping[int, float] = field(default_factory=dict)
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for rank, factor in self.stragglers.items():
            if not 1 <= factor < float("inf"):
                raise ArgumentError(f"rank {rank} is {factor:g} times as slow; give 1 or more")
        if not 0 <= self.jitter < float("inf"):
            raise ArgumentError(f"a jitter of {self.jitter:g}; give 0 or more")

    def check(self, size: int) -> None:
        """Raise ArgumentError if a straggler is not among so many ranks."""
        for rank in self.stragglers:
            if not 0 <= rank < size:
                raise ArgumentError(f"straggler {rank} is not among the ranks 0 to {size - 1}")


#: Nobody is slow.
CALM = Disturbance()
