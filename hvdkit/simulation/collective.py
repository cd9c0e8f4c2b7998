"""A collective, simulated: its schedule played on a network."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from hvdkit.errors import ArgumentError
from hvdkit.schedules.cost import lower_bound
from hvdkit.schedules.hierarchical import hierarchical
from hvdkit.schedules.registry import ALGORITHMS, Algorithm, get
from hvdkit.simulation.fares import Fares
from hvdkit.simulation.network import CALM, Disturbance, Network
from hvdkit.simulation.play import play
from hvdkit.simulation.rounds import placed
from hvdkit.simulation.unfolding import rounds

HIERARCHICAL = "hierarchical"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a simulated collective took.

    Args:
        collective: ``"allreduce"``, ...
        algorithm: its name.
        nbytes: of the message, as `hvdkit.schedules.cost` counts them.
        size: number of ranks.
        seconds: until the last rank is done.
        parts: what these are made of, by name: of the messages, each of which waited for the one
            before, that led to the last one.
        least: seconds that no algorithm can be below; see `least_seconds`.
        messages: of all ranks.
    """

    collective: str
    algorithm: str
    nbytes: float
    size: int
    seconds: float
    parts: dict[str, float]
    least: float
    messages: int

    @property
    def busbw(self) -> float:
        """Bytes a second, times the share of the message that each link must carry at the least.

        As nccl-tests has it: 2(p-1)/p for an all-reduce, (p-1)/p for the others, 1 for a broadcast.
        """
        share = float(lower_bound(self.collective, self.size).sent_fraction)
        return share * self.nbytes / self.seconds if self.seconds else 0.0

    @property
    def times_least(self) -> float:
        """How many times the lower bound the time is."""
        return self.seconds / self.least if self.least else 1.0

    @property
    def bound_by(self) -> str:
        """The largest part; empty if nothing takes any time."""
        largest = max(self.parts, key=self.parts.__getitem__)
        return largest if self.parts[largest] > 0 else ""


def simulate(
    algorithm: str,
    nbytes: float,
    network: Network,
    *,
    collective: str = "allreduce",
    disturbance: Disturbance = CALM,
) -> Outcome:
    """Play an algorithm on a network.  Local: no other rank is involved.

    Args:
        algorithm: of the registry; of an all-reduce also ``"hierarchical"``, with rings within the
            nodes and across them, or ``"hierarchical/NAME"``, with another all-reduce across.  It
            goes by nodes, wherever ranks are placed.
        nbytes: of the message, as `hvdkit.schedules.cost` counts them.
        network: the ranks, and what messages between them cost.
        collective: ``"allreduce"``, ...
        disturbance: who is slow.

    Raises:
        ArgumentError: there is no such collective or algorithm, or a number makes no sense.
    """
    if not (nbytes >= 0 and isfinite(nbytes)):
        raise ArgumentError(f"a message of {nbytes:g} bytes; give 0 or more")
    disturbance.check(network.size)
    found = find(collective, algorithm, network, nbytes)
    chunks = found.chunks(network.size, segments_of(nbytes, network))
    playing = rounds(found, network.size, chunks)
    if found.phases is not None and network.placement != "block":
        playing = placed(playing, network.by_node()[None, :])
    fares = Fares(network, disturbance, nbytes / chunks)
    played = play(playing, fares, network.size, disturbance=disturbance)
    return Outcome(
        collective=collective,
        algorithm=algorithm,
        nbytes=nbytes,
        size=network.size,
        seconds=played.seconds,
        parts=played.parts,
        least=least_seconds(collective, nbytes, network),
        messages=played.messages,
    )


def find(collective: str, name: str, network: Network, nbytes: float) -> Algorithm:
    """Return the algorithm called `name`, as it is for a message of so many bytes.

    Raises:
        ArgumentError: there is no such collective or algorithm; the message lists what there is.
    """
    first, _, across = name.partition("/")
    if collective == "allreduce" and first == HIERARCHICAL:
        segments = segments_of(nbytes / network.per_node, network)
        return hierarchical(network.per_node, across or "ring", segments)
    if collective in ALGORITHMS and name not in ALGORITHMS[collective]:
        known = ", ".join(names(collective, network))
        raise ArgumentError(f"unknown algorithm {name!r} for {collective}; here are {known}")
    return get(collective, name)


def names(collective: str, network: Network) -> list[str]:
    """Return the algorithms that are worth a comparison here.

    Raises:
        ArgumentError: there is no such collective; the message lists the known ones.
    """
    if collective not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise ArgumentError(f"unknown collective {collective!r}; the known ones are {known}")
    found = list(ALGORITHMS[collective])
    if collective == "allreduce" and network.nodes > 1 and network.per_node > 1:
        found += [HIERARCHICAL, *(f"{HIERARCHICAL}/{name}" for name in found if name != "ring")]
    return found


def least_seconds(collective: str, nbytes: float, network: Network) -> float:
    """Return a time that no algorithm can be below on this network, nobody being slow.

    The largest of: the fewest steps, each of the least latency; the bytes that a rank must send, on
    the fastest link there is; and the bytes that must leave a node, on all links that leave one.
    Reductions count for nothing.
    """
    size, per_node, nodes = network.size, network.per_node, network.nodes
    machine = network.machine
    levels = [machine.within] * (per_node > 1) + [machine.across] * (nodes > 1)
    if not levels:
        return 0.0
    bound = lower_bound(collective, size)
    least = [
        bound.steps * min(level.alpha for level in levels),
        float(bound.sent_fraction) * nbytes * min(level.beta for level in levels),
    ]
    if nodes > 1:
        beta = machine.across.beta / network.topology.ports(per_node)
        least += [machine.across.alpha, _leaves(collective, network) * nbytes * beta]
    return max(least)


def _leaves(collective: str, network: Network) -> float:
    """Return what must leave some node, or enter it, as a multiple of the message."""
    outside = (network.size - network.per_node) / network.size
    by_collective = {
        "allreduce": 2 * (network.nodes - 1) / network.nodes,
        "allgather": outside,
        "reducescatter": outside,
        "alltoall": network.per_node * outside,
    }
    return by_collective.get(collective, 1.0)


def segments_of(nbytes: float, network: Network) -> int:
    """Return in how many segments a pipelined algorithm cuts a message, as hvdkit does."""
    return max(1, -int(-nbytes // network.segment_bytes))
