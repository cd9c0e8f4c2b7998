"""What the tests run over: every algorithm, every size, and schedules with a fault in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hvdkit.schedules.registry import ALGORITHMS, Algorithm
from hvdkit.schedules.steps import Chunks, Exchange, Schedule

EVERY = [known for by_name in ALGORITHMS.values() for known in by_name.values()]
SIZES = range(1, 65)
SEGMENTS = (1, 2, 3, 8)


def identify(algorithm: Algorithm) -> str:
    return f"{algorithm.collective}-{algorithm.name}"


def chunk_counts(algorithm: Algorithm, size: int) -> list[int]:
    return [algorithm.chunks(size, s) for s in (SEGMENTS if algorithm.pipelined else (1,))]


def scripted(*by_rank: list[Exchange]) -> Schedule:
    """A schedule written out by hand, a list of steps for each rank."""
    return lambda rank, _size, _chunks: iter(by_rank[rank])


def send(peer: int, chunks: Chunks) -> Exchange:
    return Exchange(send=(peer, chunks))


def reduce(peer: int, chunks: Chunks) -> Exchange:
    return Exchange(reduce=(peer, chunks))


def store(peer: int, chunks: Chunks) -> Exchange:
    return Exchange(store=(peer, chunks))


def with_fault(steps: Schedule, rank: int, step: int, fault: str) -> Schedule:
    """The same schedule, but for one rank that does one step wrongly."""

    def faulty(this: int, size: int, chunks: int) -> Iterator[Exchange]:
        for number, exchange in enumerate(steps(this, size, chunks)):
            if this == rank and number == step:
                yield from _wrong(exchange, fault, size, chunks)
            else:
                yield exchange

    return faulty


def _wrong(exchange: Exchange, fault: str, size: int, chunks: int) -> list[Exchange]:
    if fault == "missing step":
        return []
    if fault == "step done twice":
        return [exchange, exchange]
    if fault == "store instead of reduce":
        return [replace(exchange, store=exchange.reduce, reduce=None)]
    if fault == "reduce instead of store":
        return [replace(exchange, reduce=exchange.store, store=None)]
    if fault == "swapped peers":
        assert exchange.send is not None and exchange.receive is not None
        kind = "reduce" if exchange.reduce is not None else "store"
        (to, sent), (source, received) = exchange.send, exchange.receive
        return [Exchange(**{"send": (source, sent), kind: (to, received)})]
    changes: dict[str, tuple[int, Chunks]] = {}
    for half in ("send", "reduce", "store"):
        transfer = getattr(exchange, half)
        if transfer is None:
            continue
        peer, carried = transfer
        if fault == "next peer":
            changes[half] = ((peer + 1) % size, carried)
        elif fault == "next chunk":
            indices = (carried,) if isinstance(carried, int) else tuple(carried)
            changes[half] = (peer, tuple((index + 1) % chunks for index in indices))
        else:
            raise AssertionError(fault)
    return [replace(exchange, **changes)]
