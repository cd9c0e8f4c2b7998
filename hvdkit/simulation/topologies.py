"""How nodes are linked, and how many messages share a link.

Links are full duplex, and each end of one has the bandwidth of a node's link.  The messages of a
round are taken to be in flight together, and a link is shared by its messages alike: one that
shares its fullest link with c - 1 others takes c times as long.  That is exact where ranks are in
step and their messages equally long; where they drift apart, or messages differ, it is an
approximation: who comes late still counts, and what others leave unused is not handed on.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hvdkit.errors import ArgumentError
from hvdkit.simulation.rounds import Ints

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Load:
    """What messages between nodes meet on their ways.

    Args:
        slowdown: for each message, how many times as long its bytes take as on a link of its own.
        kind: for each message, the number, among the topology's, of the kind of link that is so.
        switches: for each message, how many switches, or other nodes, it passes.
    """

    slowdown: Floats
    kind: Ints
    switches: Ints


class Topology(Protocol):
    """The links between nodes."""

    kinds: ClassVar[tuple[str, ...]]
    """What kinds of link there are, for people."""

    def check(self, nodes: int) -> None:
        """Raise ArgumentError unless so many nodes can be linked so."""

    def load(self, source: Ints, destination: Ints) -> Load:
        """Return what messages in flight together meet, from node to another node."""
        ...

    def ports(self, per_node: int) -> int:
        """Return how many messages can leave a node of so many ranks at full bandwidth."""
        ...


@dataclass(frozen=True, slots=True)
class Crossbar:
    """A link of its own for every message: ranks have what ports they need, and nothing is shared.

    It stands for one switch as well, with a node a rank.
    """

    kinds: ClassVar[tuple[str, ...]] = ("links between nodes",)

    def check(self, nodes: int) -> None:
        """Take any number of nodes."""

    def load(self, source: Ints, destination: Ints) -> Load:
        """Return that nothing is shared."""
        del destination
        zeros = np.zeros(len(source), np.int64)
        return Load(np.ones(len(source)), zeros, zeros)

    def ports(self, per_node: int) -> int:
        """Return one a rank."""
        return per_node


@dataclass(frozen=True, slots=True)
class SharedNic:
    """One link a node, to a switch without limits: all that leaves a node shares it."""

    kinds: ClassVar[tuple[str, ...]] = ("NICs",)

    def check(self, nodes: int) -> None:
        """Take any number of nodes."""

    def load(self, source: Ints, destination: Ints) -> Load:
        """Return how many messages share the link of their source, or of their destination."""
        zeros = np.zeros(len(source), np.int64)
        return Load(_fuller(source, destination), zeros, zeros)

    def ports(self, per_node: int) -> int:
        """Return 1."""
        del per_node
        return 1


@dataclass(frozen=True, slots=True)
class FatTree:
    """Leaf switches with fewer links up than down; what is above the leaves has no limits.

    Args:
        radix: ports of a leaf switch.
        oversubscription: links down for each link up; 1 for none.

    The messages that leave a leaf are spread over its uplinks alike.  C. E. Leiserson, "Fat-trees:
    universal networks for hardware-efficient supercomputing", IEEE Transactions on Computers 34
    (1985).

    Raises:
        ArgumentError: there would be no link up, or none down.
    """

    kinds: ClassVar[tuple[str, ...]] = ("NICs", "leaf uplinks")

    radix: int = 32
    oversubscription: float = 1.0

    def __post_init__(self) -> None:
        if not self.oversubscription >= 1:
            raise ArgumentError(
                f"an oversubscription of {self.oversubscription:g}; give 1 for none, or more"
            )
        if self.radix < 2 or self.up < 1:
            raise ArgumentError(
                f"a leaf switch of {self.radix} ports cannot have {self.oversubscription:g} links "
                "down for each link up; give a larger radix"
            )

    @property
    def down(self) -> int:
        """The nodes of a leaf switch."""
        return int(self.radix * self.oversubscription / (1 + self.oversubscription))

    @property
    def up(self) -> int:
        """The uplinks of a leaf switch."""
        return self.radix - self.down

    def check(self, nodes: int) -> None:
        """Take any number of nodes."""

    def load(self, source: Ints, destination: Ints) -> Load:
        """Return the larger share: of a node's link, or of its leaf's uplinks."""
        slowdown = _fuller(source, destination)
        kind = np.zeros(len(source), np.int64)
        from_leaf, to_leaf = source // self.down, destination // self.down
        leaves = from_leaf != to_leaf
        above = _fuller(from_leaf[leaves], to_leaf[leaves]) / self.up
        kind[leaves] = above > slowdown[leaves]
        slowdown[leaves] = np.maximum(slowdown[leaves], above)
        return Load(slowdown, kind, np.where(leaves, 3, 1))

    def ports(self, per_node: int) -> int:
        """Return 1."""
        del per_node
        return 1


@dataclass(frozen=True, slots=True)
class Torus:
    """Rings of nodes in one or more dimensions; routes go along the first dimension first.

    Args:
        shape: nodes along each dimension; the last one's neighbours have neighbouring numbers.

    Each node has a link to each of its neighbours.  A message takes the shorter way around, and
    upwards where both are as long.
    """

    kinds: ClassVar[tuple[str, ...]] = ("torus links",)

    shape: tuple[int, ...]

    def check(self, nodes: int) -> None:
        """Raise ArgumentError unless the shape has so many nodes."""
        if not self.shape or min(self.shape) < 1 or prod(self.shape) != nodes:
            shape = "x".join(map(str, self.shape))
            raise ArgumentError(f"a torus of {shape} has {prod(self.shape)} nodes, not {nodes}")

    def load(self, source: Ints, destination: Ints) -> Load:
        """Return how many messages share the fullest link on the way of each."""
        here = np.stack(np.unravel_index(source, self.shape))
        there = np.stack(np.unravel_index(destination, self.shape))
        hops: list[tuple[Ints, Ints]] = []  # messages, and the link that each of them is on
        for dim, length in enumerate(self.shape):
            away = (there[dim] - here[dim]) % length
            forth = 2 * away <= length
            distance = np.where(forth, away, length - away)
            for hop in range(int(distance.max(initial=0))):
                moving = np.flatnonzero(distance > hop)
                node = np.ravel_multi_index(tuple(here[:, moving]), self.shape)
                hops.append((moving, (node * len(self.shape) + dim) * 2 + forth[moving]))
                here[dim, moving] = (here[dim, moving] + np.where(forth[moving], 1, -1)) % length
        slowdown, passed = np.ones(len(source)), np.full(len(source), -1)
        messages_on = np.bincount(np.concatenate([links for _, links in hops]))
        for moving, links in hops:
            slowdown[moving] = np.maximum(slowdown[moving], messages_on[links])
            passed[moving] += 1
        return Load(slowdown, np.zeros(len(source), np.int64), passed)

    def ports(self, per_node: int) -> int:
        """Return one a neighbour."""
        del per_node
        return 2 * len(self.shape)


def nearly_square(nodes: int) -> tuple[int, int]:
    """Return the two-dimensional shape for so many nodes whose sides differ least."""
    side = next(side for side in range(int(nodes**0.5), 0, -1) if nodes % side == 0)
    return side, nodes // side


def _fuller(source: Ints, destination: Ints) -> Floats:
    """Return how many messages share each one's place of departure, or of arrival if those more."""
    leaving, arriving = np.bincount(source), np.bincount(destination)
    return np.maximum(leaving[source], arriving[destination]).astype(np.float64)
