"""What each collective starts from and what it promises to end with, held against the messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hvdkit.errors import ArgumentError, ScheduleError, format_ranks
from hvdkit.schedules.rendezvous import Message
from hvdkit.schedules.symbols import Symbols


class Contents(Protocol):
    """The buffers of all ranks, as symbols."""

    def deliver(self, message: Message) -> None:
        """Carry out one message."""

    def conclude(self) -> None:
        """Raise ScheduleError unless every rank holds what the collective promises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """Start and end of a collective that works in one buffer.

    Args:
        starts: ``starts(rank, chunk)``: whether the chunk holds the rank's contribution at first;
            else nothing may read it.
        ends: ``ends(rank, chunk, size)``: whose contributions the chunk must hold at last, rank r
            as bit r; None where it may hold anything.
        exactly_once: whether a contribution may not come in twice, and ranks that end with the
            same chunk must have combined it in the same order.
    """

    starts: Callable[[int, int], bool]
    ends: Callable[[int, int, int], int | None]
    exactly_once: bool = True


PROMISES = {
    "allreduce": Promise(
        starts=lambda _rank, _chunk: True,
        ends=lambda _rank, _chunk, size: (1 << size) - 1,
    ),
    "reducescatter": Promise(
        starts=lambda _rank, _chunk: True,
        ends=lambda rank, chunk, size: (1 << size) - 1 if chunk == rank else None,
    ),
    "allgather": Promise(
        starts=lambda rank, chunk: chunk == rank,
        ends=lambda _rank, chunk, _size: 1 << chunk,
    ),
    "broadcast": Promise(
        starts=lambda rank, _chunk: rank == 0,
        ends=lambda _rank, _chunk, _size: 1,
    ),
    "barrier": Promise(
        starts=lambda _rank, _chunk: True,
        ends=lambda _rank, _chunk, size: (1 << size) - 1,
        exactly_once=False,
    ),
}


class OneBuffer:
    """Ranks that send from and receive into the same chunks."""

    def __init__(self, promise: Promise, size: int, chunks: int) -> None:
        self._promise, self._size, self._chunks = promise, size, chunks
        self._symbols = Symbols()
        self._held: list[list[int | None]] = [
            [self._symbols.contribution(r) if promise.starts(r, c) else None for c in range(chunks)]
            for r in range(size)
        ]
        self._written_in = [[-1] * chunks for _ in range(size)]
        # The receive of a rank's present step: a send of the same step must not see it.
        self._arriving: list[tuple[int, dict[int, int]]] = [(-1, {}) for _ in range(size)]

    def deliver(self, message: Message) -> None:
        """Carry out one message; the receiver sees it from its next step on."""
        self._settle(message.source, message.source_step)
        self._settle(message.destination, message.destination_step)
        mine = self._held[message.destination]
        arriving = {}
        for chunk in message.sent:
            symbol = self._held[message.source][chunk]
            if symbol is None:
                raise ScheduleError(
                    f"rank {message.source}, step {message.source_step}: sends chunk {chunk} "
                    f"to rank {message.destination} before it was written"
                )
            if message.reduces:
                own = mine[chunk]
                if own is None:
                    raise ScheduleError(
                        f"rank {message.destination}, step {message.destination_step}: reduces "
                        f"into chunk {chunk} before it was written"
                    )
                symbol = self._symbols.combine(own, symbol)
            arriving[chunk] = symbol
        self._arriving[message.destination] = (message.destination_step, arriving)

    def _settle(self, rank: int, step: int) -> None:
        """Make what `rank` received before `step` visible."""
        received_in, arrived = self._arriving[rank]
        if received_in >= step:
            return
        for chunk, symbol in arrived.items():
            self._held[rank][chunk] = symbol
            self._written_in[rank][chunk] = received_in
        self._arriving[rank] = (received_in, {})

    def conclude(self) -> None:
        """Hold what every rank has against the promise."""
        first_holder: dict[int, tuple[int, int]] = {}
        for rank in range(self._size):
            self._settle(rank, self._arriving[rank][0] + 1)
            for chunk in range(self._chunks):
                wanted = self._promise.ends(rank, chunk, self._size)
                if wanted is None:
                    continue
                symbol = self._conclude_chunk(rank, chunk, wanted)
                holder, other = first_holder.setdefault(chunk, (rank, symbol))
                if self._promise.exactly_once and symbol != other:
                    raise self._wrong(
                        rank, chunk, f"combined in another order than on rank {holder}"
                    )

    def _conclude_chunk(self, rank: int, chunk: int, wanted: int) -> int:
        symbol = self._held[rank][chunk]
        if symbol is None:
            raise self._wrong(rank, chunk, "never written")
        # No other contributions can be in it: in place, a chunk travels under its own name only.
        if missing := wanted & ~self._symbols.heard(symbol):
            raise self._wrong(rank, chunk, f"without the contribution of {_ranks(missing)}")
        repeated = self._symbols.repeated(symbol)
        if repeated and self._promise.exactly_once:
            raise self._wrong(
                rank, chunk, f"with the contribution of {_ranks(repeated)} more than once"
            )
        return symbol

    def _wrong(self, rank: int, chunk: int, what: str) -> ScheduleError:
        step = self._written_in[rank][chunk]
        where = "as it was at the start" if step < 0 else f"last written in its step {step}"
        return ScheduleError(f"rank {rank} ends with chunk {chunk} ({where}) {what}")


class TwoBuffers:
    """The all-to-all: sends name the input's chunks, receives the output's."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._written: list[set[int]] = [set() for _ in range(size)]

    def deliver(self, message: Message) -> None:
        """Check each chunk of one message; sends read input only, so a wrong one stays wrong."""
        where = f"rank {message.destination}, step {message.destination_step}"
        if message.reduces:
            raise ScheduleError(f"{where}: an all-to-all has nothing to reduce")
        for sent, received in zip(message.sent, message.received, strict=True):
            if sent != message.destination or received != message.source:
                raise ScheduleError(
                    f"{where}: stores what rank {message.source} has for rank {sent} as chunk "
                    f"{received}; from that rank it wants chunk {message.destination}, "
                    f"to be stored as chunk {message.source}"
                )
            self._written[message.destination].add(received)

    def conclude(self) -> None:
        """Check that every rank has a chunk from every other."""
        for rank, written in enumerate(self._written):
            missing = set(range(self._size)) - {rank} - written
            if missing:
                raise ScheduleError(
                    f"rank {rank} ends with chunk {min(missing)} never written: "
                    f"nothing came from {format_ranks(sorted(missing))}"
                )


def contents(collective: str, size: int, chunks: int) -> Contents:
    """Return the buffers of all ranks as they are when `collective` begins.

    Raises:
        ArgumentError: no such collective.
        ScheduleError: the collective has one chunk a rank, and `chunks` is not that.
    """
    if collective in ("reducescatter", "allgather", "alltoall") and chunks != size:
        raise ScheduleError(
            f"{collective} has one chunk a rank: {size} ranks cannot have {chunks} chunks"
        )
    if collective == "alltoall":
        return TwoBuffers(size)
    if collective not in PROMISES:
        known = ", ".join([*PROMISES, "alltoall"])
        raise ArgumentError(f"unknown collective {collective!r}; the known ones are {known}")
    return OneBuffer(PROMISES[collective], size, chunks)


def _ranks(bits: int) -> str:
    return format_ranks([rank for rank in range(bits.bit_length()) if bits >> rank & 1])
