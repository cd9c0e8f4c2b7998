"""A schedule run for every rank, and its messages sorted into the rounds in which they can pass.

The rounds are those of `hvdkit.schedules.rendezvous`: a message passes when its sender and its
receiver both stand in its step, and takes one unit of time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from hvdkit.errors import ScheduleError
from hvdkit.schedules.steps import Chunks, Schedule
from hvdkit.simulation.rounds import Ints, Pairs, Round

NOBODY = -1


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps of all ranks, those of rank r from ``first[r]`` to ``first[r + 1] - 1``.

    Args:
        rank: whose each step is.
        to: the rank that it sends to, or `NOBODY`.
        source: the rank that it receives from, or `NOBODY`.
        units: chunks that it sends.
        reduces: whether what it receives is combined with its own.
        first: of each rank; one more at the end.
    """

    rank: Ints
    to: Ints
    source: Ints
    units: Ints
    reduces: Ints
    first: Ints


@lru_cache(maxsize=32)
def expand(steps: Schedule, size: int, chunks: int, held: int) -> tuple[Round, ...]:
    """Return the rounds of a schedule; chunks from `held` on are empty.

    Raises:
        ScheduleError: a message has one end only, or ranks wait for each other.
    """
    table = _collect(steps, size, chunks, held)
    senders, receivers = _match(table)
    return tuple(_rounds(table, senders, receivers))


def _collect(steps: Schedule, size: int, chunks: int, held: int) -> _Steps:
    rank, to, source, units, reduces, first = (array("q") for _ in range(6))
    for here in range(size):
        first.append(len(rank))
        for step in steps(here, size, chunks):
            send, receive = step.send, step.receive
            sent = 0 if send is None else _count(send[1], held)
            received = 0 if receive is None else _count(receive[1], held)
            if sent or received:
                rank.append(here)
                to.append(send[0] if send is not None and sent else NOBODY)
                source.append(receive[0] if receive is not None and received else NOBODY)
                units.append(sent)
                reduces.append(step.reduce is not None)
    first.append(len(rank))
    return _Steps(*(np.array(column) for column in (rank, to, source, units, reduces, first)))


def _count(carried: Chunks, held: int) -> int:
    """Return how many of the chunks are not empty."""
    if isinstance(carried, int):
        return int(carried < held)
    if isinstance(carried, range) and carried.step == 1:
        return max(0, min(carried.stop, held) - carried.start)
    return sum(chunk < held for chunk in carried)


def _match(table: _Steps) -> tuple[Ints, Ints]:
    """Return the sending and the receiving step of each message: between two ranks, in order."""
    senders, receivers = np.flatnonzero(table.to >= 0), np.flatnonzero(table.source >= 0)
    by_pair = np.lexsort((senders, table.to[senders], table.rank[senders]))
    senders = senders[by_pair]
    by_pair = np.lexsort((receivers, table.rank[receivers], table.source[receivers]))
    receivers = receivers[by_pair]
    if (
        len(senders) != len(receivers)
        or (table.rank[senders] != table.source[receivers]).any()
        or (table.to[senders] != table.rank[receivers]).any()
    ):
        raise ScheduleError(
            "the schedule's sends and receives do not match; hvdkit.schedules.verify says where"
        )
    return senders, receivers


def _rounds(table: _Steps, senders: Ints, receivers: Ints) -> Iterator[Round]:
    """Yield what passes in each unit of time."""
    sent = np.full(len(table.rank), NOBODY)
    received = sent.copy()
    sent[senders], received[receivers] = np.arange(len(senders)), np.arange(len(receivers))
    halves = (sent >= 0).astype(np.int64) + (received >= 0)
    left = halves.copy()
    current, end = table.first[:-1].copy(), table.first[1:]
    entered = current[current < end]
    passed = 0
    while len(entered):
        met = np.unique(np.concatenate([sent[entered], received[entered]]))
        met = met[met >= 0]
        here, there = senders[met], receivers[met]
        both = (current[table.rank[here]] == here) & (current[table.rank[there]] == there)
        here, there = here[both], there[both]
        if not len(here):
            break
        passed += len(here)
        touched = np.union1d(here, there)
        begun = touched[left[touched] == halves[touched]]
        yield Round(
            Pairs(table.rank[here], table.rank[there]),
            _one_or_all(table.units[here]),
            _one_or_all(table.reduces[there].astype(bool)),
            entering=table.rank[begun],
        )
        left[here] -= 1
        left[there] -= 1
        ranks = table.rank[touched[left[touched] == 0]]
        current[ranks] += 1
        entered = current[ranks][current[ranks] < end[ranks]]
    if passed < len(senders):
        raise ScheduleError(
            f"ranks wait for each other: {len(senders) - passed} of {len(senders)} messages never "
            "pass; hvdkit.schedules.verify says where"
        )


def _one_or_all(values: Any) -> Any:
    """Return what all the values are, as a number, if they are the same."""
    return values[0].item() if (values == values[0]).all() else values
