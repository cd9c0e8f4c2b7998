"""Rounds of messages played in time.

As in `hvdkit.collectives.executor` and `hvdkit.schedules.verify`: a rank begins a step when it has
sent and received all of the step before; a message sets out when both its ends stand in the step
that it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hvdkit.simulation.fares import JITTER, Fare, Fares
from hvdkit.simulation.network import CALM, Disturbance
from hvdkit.simulation.rounds import Ints, Pairs, Round
from hvdkit.simulation.topologies import Floats


@dataclass(frozen=True, slots=True)
class Played:
    """What came of it.

    Args:
        seconds: until the last rank is done.
        parts: what these are made of, by its name: of the messages, each of which waited for the
            one before, that led to the last one.
        messages: of all ranks.
    """

    seconds: float
    parts: dict[str, float]
    messages: int


def play(
    rounds: Iterable[Round], fares: Fares, size: int, *, disturbance: Disturbance = CALM
) -> Played:
    """Play the rounds of `size` ranks, all of which begin at time 0.

    Args:
        rounds: in an order in which they can pass.
        fares: what messages cost, stragglers included.
        size: number of ranks.
        disturbance: whose jitter is added.
    """
    clocks = _Clocks(size, len(fares.parts))
    delays = np.random.default_rng(disturbance.seed)
    messages = 0
    for some in rounds:
        fare, count = fares.of(some), len(some.pairs.source)
        late = None
        if disturbance.jitter:
            late = disturbance.jitter * delays.standard_exponential(count) * fare.sent
        if count == len(some.entering) == size:
            clocks.step_of_all(some.pairs, fare, late)
        else:
            clocks.step_of_some(some, fare, late)
        messages += count
    last = int(clocks.done.argmax())
    parts = dict(zip(fares.parts, clocks.done_parts[last].tolist(), strict=True))
    return Played(float(clocks.done[last]), parts, messages)


class _Clocks:
    """When each rank began its step and when it is done, in seconds and in what they are made of.

    Of the parts of a step's time those count that led to its end: of the message that was done
    last, and of the one of its two ranks that began later.
    """

    def __init__(self, size: int, parts: int) -> None:
        self.begun, self.done = np.zeros(size), np.zeros(size)
        self.begun_parts, self.done_parts = np.zeros((size, parts)), np.zeros((size, parts))
        self._pairs: Pairs | None = None
        self._by_source = self._by_destination = np.arange(0)

    def step_of_some(self, some: Round, fare: Fare, late: Floats | None) -> None:
        """Let the messages of a round pass."""
        source, destination, entering = some.pairs.source, some.pairs.destination, some.entering
        self.begun[entering] = self.done[entering]
        self.begun_parts[entering] = self.done_parts[entering]
        waits = self.begun[destination] > self.begun[source]
        latest = np.where(waits, destination, source)
        start, parts = self.begun[latest], self.begun_parts[latest]
        if late is not None:
            start += late
            parts[:, JITTER] += late
        count = len(source)
        self._advance(source, start + fare.sent, parts + fare.parts[:count])
        self._advance(destination, start + fare.received, parts + fare.parts[count:])

    def _advance(self, ranks: Ints, seconds: Floats, parts: Floats) -> None:
        """Move ranks on to the times given, but for those that are later already."""
        later = seconds >= self.done[ranks]
        if not later.all():
            ranks, seconds, parts = ranks[later], seconds[later], parts[later]
        self.done[ranks] = seconds
        self.done_parts[ranks] = parts

    def step_of_all(self, pairs: Pairs, fare: Fare, late: Floats | None) -> None:
        """Do as `step_of_some` where every rank begins a step, and sends and receives in it.

        Which of a rank's two messages ends last is found before any parts are looked at: of
        thousands of ranks these are by far the most to be moved.
        """
        source, destination, begun = pairs.source, pairs.destination, self.done
        if pairs is not self._pairs:
            self._pairs = pairs
            self._by_source, self._by_destination = _inverse(source), _inverse(destination)
        from_source, from_destination = begun[source], begun[destination]
        start = np.maximum(from_source, from_destination)
        latest = np.where(from_destination > from_source, destination, source)
        if late is not None:
            start += late
        sent = (start + fare.sent)[self._by_source]
        received = (start + fare.received)[self._by_destination]
        by_receipt = received >= sent
        ending = np.where(by_receipt, self._by_destination, self._by_source)
        parts = self.done_parts.take(latest[ending], axis=0)
        parts += fare.parts.take(ending + by_receipt * len(source), axis=0)
        if late is not None:
            parts[:, JITTER] += late[ending]
        self.begun, self.begun_parts = self.done, self.done_parts
        self.done, self.done_parts = np.maximum(sent, received), parts


def _inverse(order: Ints) -> Ints:
    """Return where in `order`, a permutation, each number is."""
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse
