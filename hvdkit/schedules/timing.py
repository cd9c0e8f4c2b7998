"""How long each algorithm takes on a machine: closed forms in alpha, beta and gamma.

A step is one message out and one in, at the speed of the slowest link that it uses.  A message of n
bytes is cut in segments, which travel one after the other while those before are reduced (see
`hvdkit.collectives.executor`), so that k segments of s bytes take

    k (alpha + s beta) + s gamma            where the link is slower than reducing
    alpha + s beta + k s gamma              where it is faster

The messages of a node's ranks that cross to other nodes in the same step share the node's link.
Ranks are numbered node by node.  Hockney, Parallel Computing 20 (1994); Thakur, Rabenseifner &
Gropp, International Journal of High Performance Computing Applications 19 (2005).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil

from hvdkit.config import DIRECT_RANKS, SEGMENT_BYTES
from hvdkit.errors import ArgumentError
from hvdkit.schedules.all_pairs import all_pairs_flights
from hvdkit.schedules.cost import log2_ceil, log2_floor
from hvdkit.schedules.double_tree import double_tree_cost
from hvdkit.schedules.flights import is_short
from hvdkit.schedules.machine import USUAL, Level, Machine

#: What shared memory serves.
_ALL = ("allreduce", "allgather", "reducescatter", "broadcast", "alltoall", "barrier")


@dataclass(frozen=True, slots=True)
class _Steps:
    """Steps that are alike.

    Args:
        count: how many.
        nbytes: of each message.
        reduces: whether what arrives is combined.
        distance: between the ranks of a message.
        around: whether every rank sends so far around a ring; else to and fro, in aligned pairs.
        alone: whether one message a node at the most crosses at a time.
    """

    count: int
    nbytes: float
    reduces: bool
    distance: int
    around: bool = False
    alone: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    """What a prediction is for."""

    nbytes: float
    size: int
    per_node: int
    segment_bytes: int


def predict(
    collective: str,
    algorithm: str,
    nbytes: float,
    size: int,
    *,
    ranks_per_node: int | None = None,
    machine: Machine = USUAL,
    segment_bytes: int = SEGMENT_BYTES,
    nested: bool = True,
) -> float:
    """Return the seconds of a collective, without the check that the ranks agree on it.

    Args:
        collective: ``"allreduce"``, ...
        algorithm: of the registry, or ``"shm"``; of an all-reduce also ``"gathered"``, which
            includes the check, and ``"hierarchical"``.
        nbytes: of the message, as `hvdkit.schedules.cost` counts them.
        size: number of ranks.
        ranks_per_node: of a full node; None: all ranks are on one.
        machine: what messages cost.  For ``"shm"``, and within the nodes of ``"hierarchical"`` and
            of a nested ``"gathered"``, `machine.within` is what the shared memory costs.
        segment_bytes: of a message, at most.
        nested: whether the ranks of each of several nodes share memory: ``"gathered"`` then gathers
            within nodes first.

    Raises:
        ArgumentError: there is no such algorithm.
    """
    per_node = size if ranks_per_node is None else min(ranks_per_node, size)
    place = _Place(nbytes, size, per_node, segment_bytes)
    if size == 1:
        return 0.0
    if algorithm == "shm" and collective in _ALL:
        return _shared(collective, place, machine.within)
    if (collective, algorithm) == ("allreduce", "hierarchical"):
        return _hierarchical(place, machine)
    if (collective, algorithm) == ("allreduce", "gathered"):
        if nested and 1 < per_node < size:
            return _gathered_nodewise(place, machine)
        place = replace(place, segment_bytes=ceil(nbytes * size) + 1)  # it is never cut
        if size <= DIRECT_RANKS:
            machine = _overlapped(machine, size - 1, flights=1)
    steps = _STEPS.get((collective, algorithm))
    if steps is None:
        raise ArgumentError(f"no formula for the time of {collective} by {algorithm!r}")
    return sum(some.count * _step(some, place, machine) for some in steps(place))


def in_flights(machine: Machine, size: int) -> Machine:
    """Return the machine as the messages of all pairs see it where most are in flight with others.

    So they are where messages are short: see `hvdkit.schedules.flights`.
    """
    return _overlapped(machine, 2 * max(size - 1, 1), all_pairs_flights(size))


def gathering_alphas(size: int, at_once: float) -> float:
    """Return how many alphas it takes to gather a few bytes of all ranks.

    Args:
        size: number of ranks.
        at_once: as `Level` has it.
    """
    if size <= DIRECT_RANKS:
        return _alphas(size - 1, min(size - 1, 1), at_once)
    return log2_ceil(size)


def _alphas(messages: int, flights: int, at_once: float) -> float:
    """Return what so many messages in so many flights cost, in alphas."""
    return flights + at_once * (messages - flights)


def _overlapped(machine: Machine, messages: int, flights: int) -> Machine:
    """Return the machine as messages see it, of which all but one a flight are beside another."""
    within, across = (
        replace(level, alpha=level.alpha * _alphas(messages, flights, level.at_once) / messages)
        for level in (machine.within, machine.across)
    )
    return Machine(within, across)


def message_seconds(nbytes: float, level: Level, segment_bytes: int, *, reduces: bool) -> float:
    """Return the seconds of a message in segments, each reduced while the next ones travel."""
    segments = max(1, -int(-nbytes // segment_bytes))
    last = nbytes - (segments - 1) * segment_bytes
    gamma = level.gamma if reduces else 0.0
    full = level.alpha + segment_bytes * level.beta
    arrived = (segments - 1) * full + level.alpha + last * level.beta
    if segments == 1:
        return arrived + last * gamma
    reduced = full + (segments - 2) * max(full, segment_bytes * gamma) + segment_bytes * gamma
    return max(arrived, reduced) + last * gamma


def _step(steps: _Steps, place: _Place, machine: Machine) -> float:
    """Return the seconds of one of these steps."""
    level = machine.within
    paired = not steps.around and place.per_node % (2 * steps.distance) == 0
    if place.per_node < place.size and not paired:
        sharing = 1 if steps.alone else min(place.per_node, steps.distance)
        level = replace(machine.across, beta=machine.across.beta * sharing)
    return message_seconds(steps.nbytes, level, place.segment_bytes, reduces=steps.reduces)


def _shared(collective: str, place: _Place, memory: Level) -> float:
    """Return the seconds in shared memory: a round, or two, in which each rank does its share."""
    share = place.nbytes * (place.size - 1) / place.size
    moved, reduced = {
        "allreduce": (2 * share, share),
        "reducescatter": (share, share),
        "broadcast": (place.nbytes, 0.0),
        "barrier": (0.0, 0.0),
    }.get(collective, (share, 0.0))
    rounds = 2 if collective == "allreduce" else 1
    return rounds * memory.alpha + moved * memory.beta + reduced * memory.gamma


def _hierarchical(place: _Place, machine: Machine) -> float:
    """Return the seconds of shared memory within nodes, and of the shards across them."""
    nodes = -(-place.size // place.per_node)
    within = replace(place, size=place.per_node)
    shard = place.nbytes / place.per_node
    shared = replace(machine.across, beta=machine.across.beta * place.per_node)
    plainly = Machine(within=shared, across=shared)
    ways = dict.fromkeys(("ring", "halving_doubling", "recursive_doubling"), plainly)
    if is_short(shard, place.segment_bytes):
        ways |= {"gathered": plainly, "all_pairs": in_flights(plainly, nodes)}
    across = min(
        predict(
            "allreduce",
            name,
            shard,
            nodes,
            ranks_per_node=1,
            machine=seen,
            segment_bytes=place.segment_bytes,
        )
        for name, seen in ways.items()
    )
    if place.per_node == 1:
        return across
    scattered = _shared("reducescatter", within, machine.within)
    return scattered + across + _shared("allgather", within, machine.within)


def _gathered_nodewise(place: _Place, machine: Machine) -> float:
    """Return the seconds in which one rank a node gets everyone's elements, for all of its node."""
    block = place.nbytes * place.per_node
    nodes = -(-place.size // place.per_node)
    within = replace(place, nbytes=block, size=place.per_node)
    spread = replace(within, nbytes=place.nbytes * place.size)
    across = predict("allreduce", "gathered", block, nodes, ranks_per_node=1, machine=machine)
    return (
        _shared("allgather", within, machine.within)
        + across
        + _shared("broadcast", spread, machine.within)
    )


# The steps of the schedules


def _ring_allreduce(place: _Place) -> Iterator[_Steps]:
    yield from _ring(place, reduces=True)
    yield from _ring(place, reduces=False)


def _ring(place: _Place, *, reduces: bool) -> Iterator[_Steps]:
    yield _Steps(place.size - 1, place.nbytes / place.size, reduces, 1, around=True)


def _tree(place: _Place) -> Iterator[_Steps]:
    yield from _binomial(place, reduces=True)
    yield from _binomial(place)


def _binomial(place: _Place, *, reduces: bool = False) -> Iterator[_Steps]:
    for exponent in range(log2_ceil(place.size)):
        yield _Steps(1, place.nbytes, reduces, 1 << exponent, alone=True)


def _double_tree(place: _Place) -> Iterator[_Steps]:
    segments = max(1, -int(-place.nbytes // place.segment_bytes))
    count = double_tree_cost(place.size, 2 * segments).steps // 2
    for reduces in (True, False):
        yield _Steps(count, place.nbytes / (2 * segments), reduces, 1, around=True)


def _chain(place: _Place) -> Iterator[_Steps]:
    segments = max(1, -int(-place.nbytes // place.segment_bytes))
    count = place.size - 2 + segments
    yield _Steps(count, place.nbytes / segments, False, 1, around=True)


def _recursive_doubling(place: _Place) -> Iterator[_Steps]:
    for exponent in range(log2_floor(place.size)):
        yield _Steps(1, place.nbytes, True, 1 << exponent)
    yield from _folding(place, place.nbytes)


def _halving_doubling(place: _Place) -> Iterator[_Steps]:
    core = 1 << log2_floor(place.size)
    for exponent in range(log2_floor(place.size)):
        for reduces in (True, False):
            yield _Steps(1, place.nbytes * (1 << exponent) / core, reduces, 1 << exponent)
    yield from _folding(place, place.nbytes)


def _all_pairs(place: _Place) -> Iterator[_Steps]:
    for reduces in (True, False):
        yield from _pairwise(place, reduces=reduces)


def _recursive_halving(place: _Place) -> Iterator[_Steps]:
    core = 1 << log2_floor(place.size)
    for exponent in range(log2_floor(place.size)):
        yield _Steps(1, place.nbytes * (1 << exponent) / core, True, 1 << exponent)
    yield from _folding(place, place.nbytes / place.size)


def _folding(place: _Place, returned: float) -> Iterator[_Steps]:
    """Yield the two steps by which ranks beyond a power of two take part."""
    if place.size != 1 << log2_floor(place.size):
        yield _Steps(1, place.nbytes, True, 1)
        yield _Steps(1, returned, False, 1)


def _bruck(place: _Place) -> Iterator[_Steps]:
    for exponent in range(log2_ceil(place.size)):
        chunks = min(1 << exponent, place.size - (1 << exponent))
        chunk = place.nbytes / place.size
        yield _Steps(1, chunk * chunks, False, _around(place, 1 << exponent), around=True)


def _pairwise(place: _Place, *, reduces: bool = False) -> Iterator[_Steps]:
    for offset in range(1, place.size):
        yield _Steps(1, place.nbytes / place.size, reduces, _around(place, offset), around=True)


def _dissemination(place: _Place) -> Iterator[_Steps]:
    for exponent in range(log2_ceil(place.size)):
        yield _Steps(1, 0.0, False, _around(place, 1 << exponent), around=True)


def _around(place: _Place, offset: int) -> int:
    """Return the distance of ranks that are `offset` apart on the ring."""
    return min(offset, place.size - offset)


def _gathered(place: _Place) -> Iterator[_Steps]:
    if place.size <= DIRECT_RANKS:
        yield from _pairwise(replace(place, nbytes=place.nbytes * place.size), reduces=True)
        return
    for exponent in range(log2_ceil(place.size)):
        rows = min(1 << exponent, place.size - (1 << exponent))
        yield _Steps(1, place.nbytes * rows, True, _around(place, 1 << exponent), around=True)


_STEPS: dict[tuple[str, str], Callable[[_Place], Iterator[_Steps]]] = {
    ("allreduce", "ring"): _ring_allreduce,
    ("allreduce", "tree"): _tree,
    ("allreduce", "double_tree"): _double_tree,
    ("allreduce", "recursive_doubling"): _recursive_doubling,
    ("allreduce", "halving_doubling"): _halving_doubling,
    ("allreduce", "all_pairs"): _all_pairs,
    ("allreduce", "gathered"): _gathered,
    ("allgather", "ring"): lambda place: _ring(place, reduces=False),
    ("allgather", "bruck"): _bruck,
    ("reducescatter", "ring"): lambda place: _ring(place, reduces=True),
    ("reducescatter", "recursive_halving"): _recursive_halving,
    ("broadcast", "binomial"): _binomial,
    ("broadcast", "chain"): _chain,
    ("alltoall", "pairwise"): _pairwise,
    ("barrier", "dissemination"): _dissemination,
}
