"""Flights: steps of a schedule that need nothing of each other, and so are in flight together.

Schedules are written for ranks that send one message and receive one at a time.  A rank that can
have more under way need not wait between two steps of which the second neither sends nor replaces
nor combines what the first one received, nor replaces what it sends; sums alone may be added to in
turn, when all have come.  In all pairs, that is each half::

    steps      1   2   3   4   5   6        p = 4
    flights    ---------   ---------

It is done for short messages (see `hvdkit.collectives.prepared`).

Before whatever comes after a flight, a rank waits for the same messages as step by step; some it
has begun earlier.  So what cannot deadlock step by step cannot in flights.
"""

from __future__ import annotations

from collections.abc import Iterable

from hvdkit.config import KIB
from hvdkit.schedules.steps import Exchange, Transfer, chunk_indices

#: Steps of a flight, at most: what is to be reduced lands in memory of its own.  Each may be with
#: two ranks, and an exchange over sockets in the native module is with 16 at the most.
MOST_AT_ONCE = 8

#: Bytes of a short message, at most: where copying it twice takes as long as Python does for a few
#: steps of a schedule.
LONGEST = 128 * KIB

#: So many segments of a message are one still.
SEGMENTS = 4


def is_short(nbytes: float, segment_bytes: int) -> bool:
    """Return whether a message of so many bytes is not worth cutting in segments."""
    return nbytes <= min(LONGEST, SEGMENTS * segment_bytes)


def flights_of(steps: Iterable[Exchange]) -> list[list[Exchange]]:
    """Divide one rank's steps in flights, in order.  Pure.

    In a flight there is one message at the most to any rank, and one from it.  What is to be
    combined may be so when all have come, in the steps' order: it lands beside the message.
    """
    flights: list[list[Exchange]] = []
    for step in steps:
        if not flights or len(flights[-1]) >= MOST_AT_ONCE or not _joins(step, flights[-1]):
            flights.append([])
        flights[-1].append(step)
    return flights


def _joins(step: Exchange, flight: list[Exchange]) -> bool:
    """Return whether a step needs nothing of those before it in a flight."""
    sends, stores, reduces = map(_chunks, (step.send, step.store, step.reduce))
    for earlier in flight:
        received = _chunks(earlier.receive)
        if sends & received or stores & (received | _chunks(earlier.send)):
            return False
        if reduces & _chunks(earlier.store):
            return False
        if _same_rank(step.send, earlier.send) or _same_rank(step.receive, earlier.receive):
            return False
    return True


def _same_rank(one: Transfer | None, other: Transfer | None) -> bool:
    return one is not None and other is not None and one[0] == other[0]


def _chunks(transfer: Transfer | None) -> set[int]:
    return set() if transfer is None else set(chunk_indices(transfer[1]))
