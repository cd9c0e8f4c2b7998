"""What the messages of a round cost, each with the parts that its time is made of.

A message of n bytes is cut in k segments of s bytes, which travel one after the other while those
before are reduced (see `hvdkit.collectives.executor`); it takes

    k (alpha + s beta) + s gamma            where the link is slower than reducing
    alpha + s beta + k s gamma              where it is faster

and its sender is free after k (alpha + s beta).  Chunks are equally long, and not rounded to whole
elements; the chunks of a message are taken to be next to each other.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.simulation.network import Disturbance, Network
from hvdkit.simulation.rounds import Ints, Pairs, Round
from hvdkit.simulation.topologies import Floats

#: What a time is made of, in this order; then the topology's kinds of link.
LATENCY, REDUCTION, STRAGGLERS, JITTER, WITHIN = range(5)
PARTS = ("latency", "reduction", "stragglers", "jitter", "links within nodes")

#: Of how many sets of pairs it is remembered what their messages cost: a pipeline has two in turn.
REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class Fare:
    """The seconds of each message of a round.

    Args:
        sent: until its sender is done with it.
        received: until its receiver is, which may reduce it.
        parts: what these are made of, a column a part: of all `sent`, then of all `received`.
    """

    sent: Floats
    received: Floats
    parts: Floats


@dataclass(frozen=True, slots=True)
class _Way:
    """What the messages of some pairs meet: an entry for each."""

    alpha: NDArray[np.floating[Any]]
    beta: Floats
    gamma: Floats
    link: Ints  # the part that the time of its bytes is


class Fares:
    """What messages cost, found once for pairs that come again soon."""

    def __init__(self, network: Network, disturbance: Disturbance, chunk_bytes: float) -> None:
        """Take chunks of so many bytes."""
        self.parts = (*PARTS, *network.topology.kinds)
        self._network = network
        self._chunk_bytes = chunk_bytes
        self._node = network.node_of()
        self._slow = np.ones(network.size)
        for rank, factor in disturbance.stragglers.items():
            self._slow[rank] = factor
        self._any_slow = bool((self._slow != 1).any())
        self._numbers = np.arange(network.size)
        self._known: OrderedDict[Pairs, tuple[_Way, dict[tuple[int, bool], Fare]]] = OrderedDict()

    def of(self, some: Round) -> Fare:
        """Return what the messages of a round cost."""
        if some.pairs not in self._known:
            self._known[some.pairs] = self._find_way(some.pairs), {}
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        way, known = self._known[some.pairs]
        if not isinstance(some.units, int) or not isinstance(some.reduces, bool):
            return self._fare(some, way)
        key = some.units, some.reduces
        if key not in known:
            known[key] = self._fare(some, way)
        return known[key]

    def _find_way(self, pairs: Pairs) -> _Way:
        source, destination = self._node[pairs.source], self._node[pairs.destination]
        levels, leaving = self._network.machine, source != destination
        if leaving.all():
            return self._way_across(source, destination)
        alpha, beta, gamma = (
            np.full(len(source), value)
            for value in (levels.within.alpha, levels.within.beta, levels.within.gamma)
        )
        link = np.full(len(source), WITHIN)
        across = np.flatnonzero(leaving)
        if len(across):
            out = self._way_across(source[across], destination[across])
            alpha[across], beta[across] = out.alpha, out.beta
            gamma[across], link[across] = out.gamma, out.link
        return _Way(alpha, beta, gamma, link)

    def _way_across(self, source: Ints, destination: Ints) -> _Way:
        level = self._network.machine.across
        load = self._network.topology.load(source, destination)
        return _Way(
            level.alpha + load.switches * self._network.switch,
            level.beta * load.slowdown,
            np.full(len(source), level.gamma),
            len(PARTS) + load.kind,
        )

    def _fare(self, some: Round, way: _Way) -> Fare:
        nbytes = some.units * self._chunk_bytes
        gamma = way.gamma * some.reduces
        longest = self._network.segment_bytes
        segments = np.maximum(1, np.ceil(nbytes / longest))
        last = nbytes - (segments - 1) * longest
        travelled = segments * way.alpha + nbytes * way.beta
        full = way.alpha + longest * way.beta
        reduced = full + (segments - 2) * np.maximum(full, longest * gamma) + longest * gamma
        behind = (segments > 1) & (reduced > travelled)  # the receiver, with its reductions
        received = np.where(behind, reduced, travelled) + last * gamma
        parts = np.zeros((2 * len(way.link), len(self.parts)))
        latency, bandwidth = segments * way.alpha, nbytes * way.beta
        self._fill(parts[: len(way.link)], way, latency, bandwidth)
        if behind.any():
            latency = np.where(behind, way.alpha, latency)
            bandwidth = np.where(behind, longest * way.beta, bandwidth)
        receivers = parts[len(way.link) :]
        self._fill(receivers, way, latency, bandwidth)
        receivers[:, REDUCTION] = received - (latency + bandwidth)
        if not self._any_slow:
            return Fare(travelled, received, parts)
        return self._slowed(some.pairs, travelled, received, parts)

    def _fill(
        self, parts: Floats, way: _Way, latency: NDArray[Any], bandwidth: NDArray[Any]
    ) -> None:
        parts[:, LATENCY] = latency
        parts[self._numbers[: len(way.link)], way.link] = bandwidth

    def _slowed(
        self, pairs: Pairs, sent: NDArray[Any], received: NDArray[Any], parts: Floats
    ) -> Fare:
        """Return the fare with what stragglers add to it."""
        sender, receiver = self._slow[pairs.source], self._slow[pairs.destination]
        message = np.maximum(sender, receiver)
        more_sent = (message - 1) * sent
        more_received = (message - 1) * sent + (receiver - 1) * (received - sent)
        parts[:, STRAGGLERS] = np.concatenate((more_sent, more_received))
        return Fare(sent + more_sent, received + more_received, parts)
