"""Groups of ranks that communicate at the same time, and so share links."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hvdkit.simulation.collective import find, names, segments_of
from hvdkit.simulation.fares import Fares
from hvdkit.simulation.job import BEST
from hvdkit.simulation.network import Disturbance, Network
from hvdkit.simulation.play import Played, play
from hvdkit.simulation.rounds import Ints, Pairs, Round, placed
from hvdkit.simulation.topologies import Crossbar
from hvdkit.simulation.unfolding import rounds


@dataclass(frozen=True, slots=True)
class Reduced:
    """What an all-reduce of all groups took.

    Args:
        algorithm: its name.
        played: until the slowest group is done.
    """

    algorithm: str
    played: Played


class Groups:
    """Groups as large as each other, each of which all-reduces a message of its own.

    Args:
        network: of all ranks.
        lines: the ranks of a group in each row.
        disturbance: who is slow.
    """

    def __init__(self, network: Network, lines: Ints, disturbance: Disturbance) -> None:
        self._network, self._lines, self._disturbance = network, lines, disturbance
        self._known: dict[tuple[str, float], Reduced] = {}
        nodes = network.node_of()[lines[0]]
        self._group = replace(
            network,
            size=len(nodes),
            ranks_per_node=int((nodes == nodes[0]).sum()),
            topology=Crossbar(),  # only the algorithms are made for the group: messages are not
            placement="block",
        )

    def allreduce(self, algorithm: str, nbytes: float) -> Reduced:
        """Return what it takes all groups to reduce `nbytes` each; `BEST`: by what is fastest.

        Raises:
            ArgumentError: no such algorithm.
        """
        if algorithm == BEST:
            every = (self.allreduce(name, nbytes) for name in names("allreduce", self._group))
            return min(every, key=lambda some: some.played.seconds)
        key = algorithm, nbytes
        if key not in self._known:
            self._known[key] = Reduced(algorithm, self._play(algorithm, nbytes))
        return self._known[key]

    def _play(self, algorithm: str, nbytes: float) -> Played:
        size = self._group.size
        found = find("allreduce", algorithm, self._group, nbytes)
        chunks = found.chunks(size, segments_of(nbytes, self._group))
        return play(
            placed(rounds(found, size, chunks), self._lines),
            Fares(self._network, self._disturbance, nbytes / chunks),
            self._network.size,
            disturbance=self._disturbance,
        )


def transfer_seconds(
    network: Network, source: Ints, destination: Ints, nbytes: float, disturbance: Disturbance
) -> float:
    """Return until the last of the messages from `source` to `destination` is there."""
    some = Round(Pairs(source, destination), 1, False, np.union1d(source, destination))
    fares = Fares(network, disturbance, nbytes)
    return play([some], fares, network.size, disturbance=disturbance).seconds
