"""All ranks of a schedule run together, with rendezvous semantics and no buffering at all.

A message passes only when its sender stands in a step that sends it and its receiver in one that
receives it; a rank's next step begins when both halves of the step are done.  A schedule that gets
through here gets through whatever a transport buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hvdkit.errors import ScheduleError
from hvdkit.schedules.steps import Chunks, Exchange, Schedule, Transfer, chunk_indices


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it passed.

    Args:
        source: sending rank.
        destination: receiving rank.
        sent: chunks as the sender names them.
        received: chunks as the receiver names them, as many.
        reduces: whether the receiver combines them with its own; else they replace its own.
        source_step: the sender's step, counted from 0.
        destination_step: the receiver's step, counted from 0.
        round: the unit of time in which it passed, counted from 1.
    """

    source: int
    destination: int
    sent: tuple[int, ...]
    received: tuple[int, ...]
    reduces: bool
    source_step: int
    destination_step: int
    round: int


@dataclass(slots=True, eq=False)
class _Rank:
    """Where one rank stands: its present step, and the halves of it that still have to pass."""

    rank: int
    steps: Iterator[Exchange]
    chunks: int
    size: int
    in_place: bool
    step: int = -1
    send: Transfer | None = None
    receive: Transfer | None = None
    reduces: bool = False
    begun: int = 0  # the time at which the present step began
    done: int = 0  # the time at which the latest half was done
    ended: bool = False

    def advance(self) -> None:
        """Enter the next step, checked, or end."""
        exchange = next(self.steps, None)
        self.begun = self.done
        if exchange is None:
            self.ended = True
            return
        self.step += 1
        self.send, self.receive = exchange.send, exchange.receive
        self.reduces = exchange.reduce is not None
        for transfer in (self.send, self.receive):
            if transfer is not None:
                self._check(transfer)
        if self.in_place and exchange.send is not None and exchange.store is not None:
            both = set(chunk_indices(exchange.send[1])) & set(chunk_indices(exchange.store[1]))
            if both:
                raise ScheduleError(
                    f"rank {self.rank}, step {self.step}: stores {describe(tuple(sorted(both)))} "
                    f"while it is being sent"
                )

    def _check(self, transfer: Transfer) -> None:
        peer, carried = transfer
        where = f"rank {self.rank}, step {self.step}"
        if not 0 <= peer < self.size:
            raise ScheduleError(f"{where}: peer {peer} is not among the ranks 0 to {self.size - 1}")
        if peer == self.rank:
            raise ScheduleError(f"{where}: {describe(carried)} would go from the rank to itself")
        indices = chunk_indices(carried)
        for index in indices:
            if not 0 <= index < self.chunks:
                raise ScheduleError(
                    f"{where}: chunk {index} is not among the chunks 0 to {self.chunks - 1}"
                )
        if not indices:
            raise ScheduleError(f"{where}: a message carries no chunk")
        if len(set(indices)) != len(indices):
            raise ScheduleError(f"{where}: {describe(carried)}: a message carries distinct chunks")

    def waits_for(self) -> list[int]:
        """Return the peers of the halves that have not passed."""
        return [half[0] for half in (self.send, self.receive) if half is not None]

    def __str__(self) -> str:
        halves = []
        if self.send is not None:
            halves.append(f"to send {describe(self.send[1])} to rank {self.send[0]}")
        if self.receive is not None:
            halves.append(f"to receive {describe(self.receive[1])} from rank {self.receive[0]}")
        return f"rank {self.rank}, step {self.step}: waits " + " and ".join(halves)


def describe(chunks: Chunks) -> str:
    """Return ``"chunk 2"`` or ``"chunks 0, 1"``."""
    indices = chunk_indices(chunks)
    return f"chunk{'' if len(indices) == 1 else 's'} {', '.join(map(str, indices))}"


def run(steps: Schedule, size: int, chunks: int, *, in_place: bool) -> Iterator[Message]:
    """Yield the messages of all ranks, in an order in which they can pass.

    A receive is to be taken as visible to its rank from the rank's next step on: the messages of
    one step come in either order, and a send reads what was there before the step.

    Args:
        steps: the schedule.
        size: number of ranks.
        chunks: number of chunks.
        in_place: whether chunks are received into the buffer that they are sent from.  Then both
            sides of a message must name the same chunks, and no step may store into a chunk that
            it sends.

    Raises:
        ScheduleError: a peer or a chunk is out of range, a rank sends to itself, the two sides of
            a message disagree on its chunks, a message has one side only, or a deadlock.
    """
    ranks = [_Rank(rank, steps(rank, size, chunks), chunks, size, in_place) for rank in range(size)]
    entered = list(ranks)  # those that may have changed step since they were last looked at
    for rank in ranks:
        rank.advance()
    while entered:
        here = entered.pop()
        meetings = []
        if here.send is not None:
            meetings.append((here, ranks[here.send[0]]))
        if here.receive is not None:
            meetings.append((ranks[here.receive[0]], here))
        for source, destination in meetings:
            message = _meet(source, destination)
            if message is None:
                continue
            yield message
            for rank in (source, destination):
                if rank.send is None and rank.receive is None:
                    rank.advance()
                    entered.append(rank)
    if not all(rank.ended for rank in ranks):
        raise ScheduleError(_describe_stall(ranks))


def _meet(source: _Rank, destination: _Rank) -> Message | None:
    """Pass the message from `source` to `destination` if both now stand ready for it."""
    sent, received = source.send, destination.receive
    if sent is None or received is None:
        return None
    if sent[0] != destination.rank or received[0] != source.rank:
        return None
    message = Message(
        source=source.rank,
        destination=destination.rank,
        sent=chunk_indices(sent[1]),
        received=chunk_indices(received[1]),
        reduces=destination.reduces,
        source_step=source.step,
        destination_step=destination.step,
        round=max(source.begun, destination.begun) + 1,
    )
    agreed = (
        message.sent == message.received
        if source.in_place
        else len(message.sent) == len(message.received)
    )
    if not agreed:
        raise ScheduleError(
            f"rank {source.rank}, step {source.step}: sends {describe(message.sent)} to rank "
            f"{destination.rank}, which in its step {destination.step} receives "
            f"{describe(message.received)}"
        )
    source.send = destination.receive = None
    for rank in (source, destination):
        rank.done = max(rank.done, message.round)
    return message


def _describe_stall(ranks: Sequence[_Rank]) -> str:
    """Say why nothing moves: a peer that has ended, or else a cycle of ranks that wait."""
    stalled = [rank for rank in ranks if not rank.ended]
    for rank in stalled:
        for peer in rank.waits_for():
            if ranks[peer].ended:
                taken = ranks[peer].step + 1
                steps = "1 step" if taken == 1 else f"{taken} steps"
                return f"{rank}, but rank {peer} has ended after {steps}"
    path = [stalled[0]]
    while True:
        following = ranks[path[-1].waits_for()[0]]
        if following in path:
            break
        path.append(following)
    cycle = path[path.index(following) :]
    lines = [f"  {rank}" for rank in (*cycle, following)]
    return "deadlock: each of these ranks waits for the next\n" + "\n".join(lines)
