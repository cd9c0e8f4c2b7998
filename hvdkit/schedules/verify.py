"""Proof that a schedule does what its collective promises, for one number of ranks and chunks.

All ranks run together without buffering (see `rendezvous`), over symbols instead of numbers.  A
symbol is an expression: a rank's own contribution, or two expressions combined.  The operation is
taken to be commutative, as IEEE addition is, but not associative: two chunks hold the same symbol
exactly if every such operation gives them bitwise the same value.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdkit.schedules import rendezvous
from hvdkit.schedules.promises import contents
from hvdkit.schedules.rendezvous import Message
from hvdkit.schedules.steps import Schedule


@dataclass(frozen=True, slots=True)
class Report:
    """What a proved schedule was measured to cost.

    Args:
        rounds: communication steps on the critical path, every message taking one.
        messages: messages of all ranks together.
        max_sends: messages sent by the rank that sends most.
        max_chunks_sent: chunks sent by the rank that sends most.
    """

    rounds: int
    messages: int
    max_sends: int
    max_chunks_sent: int


def verify(steps: Schedule, size: int, chunks: int, collective: str) -> Report:
    """Prove the schedule correct for `size` ranks and `chunks` chunks, and count what it costs.

    Raises:
        ScheduleError: it is not; the message names the rank, its step and the chunk.
        ArgumentError: no such collective.
    """
    report, _ = trace(steps, size, chunks, collective)
    return report


def trace(steps: Schedule, size: int, chunks: int, collective: str) -> tuple[Report, list[Message]]:
    """Do as `verify`, and return the messages as well, in an order in which they can pass."""
    held = contents(collective, size, chunks)
    messages = []
    for message in rendezvous.run(steps, size, chunks, in_place=collective != "alltoall"):
        held.deliver(message)
        messages.append(message)
    held.conclude()
    sends, chunks_sent = [0] * size, [0] * size
    for message in messages:
        sends[message.source] += 1
        chunks_sent[message.source] += len(message.sent)
    report = Report(
        rounds=max((message.round for message in messages), default=0),
        messages=len(messages),
        max_sends=max(sends),
        max_chunks_sent=max(chunks_sent),
    )
    return report, messages
