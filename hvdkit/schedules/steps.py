"""The vocabulary in which every schedule is written: one `Exchange` a step.

A schedule is a pure generator ``steps(rank, size, chunks)`` of `Exchange` objects.  It never sees
data, a communicator or a clock, so the same definition is executed, proved, drawn and counted.

The model is the papers' own: one-ported and full duplex.  In one step a rank sends at most one
message and receives at most one, both in flight together; the next step begins when both are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

#: The chunks a message carries, in the order in which they travel: one index, a contiguous
#: ``range``, or any tuple of indices.
Chunks: TypeAlias = int | range | tuple[int, ...]

#: ``(peer, chunks)``: the other rank of a message, and what the message carries.
Transfer: TypeAlias = tuple[int, Chunks]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One step of one rank: at most one message out and one in, in flight together.

    Args:
        send: ``(destination, chunks)``: the chunks are read as they were before the step.
        reduce: ``(source, chunks)``: the arriving chunks are combined with this rank's own.
        store: ``(source, chunks)``: the arriving chunks replace this rank's own.

    A step receives to reduce or to store, never both.
    """

    send: Transfer | None = None
    reduce: Transfer | None = None
    store: Transfer | None = None

    def __post_init__(self) -> None:
        if self.reduce is not None and self.store is not None:
            raise ValueError("an Exchange receives to reduce or to store, not both")
        if self.send is None and self.reduce is None and self.store is None:
            raise ValueError("an Exchange must send or receive something")

    @property
    def receive(self) -> Transfer | None:
        """The incoming message, whatever is done with it."""
        return self.reduce if self.reduce is not None else self.store


#: ``steps(rank, size, chunks)`` yields the steps of one rank among `size`, over `chunks` chunks.
Schedule: TypeAlias = Callable[[int, int, int], Iterator[Exchange]]


def chunk_indices(chunks: Chunks) -> tuple[int, ...]:
    """Return the chunk indices of a message as a tuple, in the order in which they travel."""
    return (chunks,) if isinstance(chunks, int) else tuple(chunks)


def contiguous_runs(chunks: Chunks) -> list[tuple[int, int]]:
    """Return the half-open runs ``[(first, last + 1), ...]`` of consecutive chunk indices."""
    runs: list[tuple[int, int]] = []
    for index in chunk_indices(chunks):
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
