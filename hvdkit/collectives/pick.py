"""Which algorithm ``"auto"`` stands for: a pure function of what is known on every rank alike.

Where the machine was measured, by ``hvdkit tune``, its times decide between the ways there are;
what is written here is for machines that were not, and stays where another way is no better.
"""

from __future__ import annotations

from functools import lru_cache

from hvdkit.config import KIB, MIB
from hvdkit.errors import ArgumentError
from hvdkit.schedules.all_pairs import all_pairs_flights
from hvdkit.schedules.flights import LONGEST, MOST_AT_ONCE
from hvdkit.schedules.machine import AT_ONCE
from hvdkit.schedules.registry import ALGORITHMS
from hvdkit.tuning.estimates import Estimates

#: The ranks' shared memory, and the MPI library's own collective.
OTHER_WAYS = ("shm", "mpi")

#: What an all-reduce can be as well: see `hvdkit.collectives.gathered` and `.hierarchical`.
_ALLREDUCES = ("gathered", "hierarchical")

#: Gathering is not thought of beyond so many bytes of all ranks together.
GATHERED_AT_ALL = 4 * MIB

#: Up to how many bytes an all-reduce is gathered: of all ranks together where they are on one
#: node, and into one node from the others where each has a node of its own; the ranks of a node
#: reduce theirs first.  Two ranks exchange as many bytes with any other algorithm.
GATHERED_WITHIN = 64 * KIB
GATHERED_ACROSS = 8 * KIB
GATHERED_BY_TWO = 64 * KIB

#: What is taken for the links between nodes: seconds a step, seconds a message more that is in
#: flight with others, and seconds a byte (1 Gbit/s).
STEP_ACROSS = 50e-6
MESSAGE_ACROSS = AT_ONCE * STEP_ACROSS
BYTE_ACROSS = 8e-9

#: Up to how many bytes every rank may reduce everything across nodes; beyond that, work is shared
#: out: one half is reduced while the other is on its way, and a link takes less at once.  Over
#: 1 Gbit/s, halves are as fast from 8 KiB on, and at 16 KiB faster.
LARGEST_WHOLE = 12 * KIB

#: Why a group has no hierarchy that was made without one.
NO_HIERARCHY = "the ranks are not known to be on several nodes"

#: Up to how many bytes an algorithm is the one to take, without shared memory: first the ones
#: with the fewest messages, then the ones with the fewest bytes.
_BY_SIZE: dict[str, tuple[tuple[float, str], ...]] = {
    "allreduce": (
        (32 * KIB, "recursive_doubling"),
        (512 * KIB, "halving_doubling"),
        (float("inf"), "ring"),
    ),
    "allgather": ((64 * KIB, "bruck"), (float("inf"), "ring")),
    "reducescatter": ((128 * KIB, "recursive_halving"), (float("inf"), "ring")),
    "broadcast": ((512 * KIB, "binomial"), (float("inf"), "chain")),
    "alltoall": ((float("inf"), "pairwise"),),
    "barrier": ((float("inf"), "dissemination"),),
}


def known_algorithms(kind: str) -> tuple[str, ...]:
    """Return every name that `kind` takes as its algorithm."""
    others = _ALLREDUCES if kind == "allreduce" else ()
    return ("auto", *OTHER_WAYS, *others, *ALGORITHMS[kind])


def pick_schedule(kind: str, nbytes: int) -> str:
    """Return the schedule for a message of `nbytes`."""
    return next(name for limit, name in _BY_SIZE[kind] if nbytes <= limit)


def ways(
    kind: str, nbytes: int, size: int, *, no_arena: str, no_hierarchy: str = NO_HIERARCHY
) -> tuple[str, ...]:
    """Return what ``"auto"`` chooses from where the machine was measured.

    In shared memory all collectives but the all-reduce are part of its own agreement, and the MPI
    library's own promises no equal bits on all ranks.
    """
    if not no_arena:
        return ("shm", *ALGORITHMS[kind]) if kind == "allreduce" else ("shm",)
    found = list(ALGORITHMS[kind])
    if kind == "allreduce" and size * nbytes <= GATHERED_AT_ALL:
        found.append("gathered")
    if kind == "allreduce" and not no_hierarchy:
        found.append("hierarchical")
    return tuple(found)


def pick_across(nbytes: int, size: int, estimates: Estimates | None = None) -> str:
    """Return the all-reduce algorithm among `size` ranks, each on a node of its own."""
    usual = usual_across(nbytes, size, short=_is_short(nbytes, estimates))
    if estimates is None:
        return usual
    others = ways("allreduce", nbytes, size, no_arena="one rank a node")
    return estimates.best("allreduce", nbytes, _first(usual, others))


def _is_short(nbytes: int, estimates: Estimates | None) -> bool:
    return nbytes <= LONGEST if estimates is None else estimates.is_short(nbytes)


def _first(usual: str, others: tuple[str, ...]) -> tuple[str, ...]:
    return (usual, *[name for name in others if name != usual])


@lru_cache
def usual_across(nbytes: int, size: int, *, short: bool) -> str:
    """Return what to take across nodes that were not measured.

    Gathered, or the schedule that costs least by its formula: a byte costs more between nodes than
    in a node's memory, and a number of ranks that is no power of two more bytes with doubling than
    in a ring.

    Args:
        nbytes: of the message.
        size: number of ranks.
        short: whether steps that need nothing of each other are in flight at once.
    """
    if _gathers(nbytes, size, per_node=1):
        return "gathered"
    names = ["halving_doubling", "ring"]
    if nbytes <= LARGEST_WHOLE:
        names.insert(0, "recursive_doubling")
    if short and size <= 1 + MOST_AT_ONCE:  # two flights; more were not measured
        names.append("all_pairs")

    def seconds(name: str) -> float:
        known = ALGORITHMS["allreduce"][name]
        cost = known.cost(size, known.chunks(size, 1))
        waits = all_pairs_flights(size) if name == "all_pairs" else cost.steps
        more = (cost.steps - waits) * MESSAGE_ACROSS
        return waits * STEP_ACROSS + more + float(cost.sent_fraction) * nbytes * BYTE_ACROSS

    return min(names, key=seconds)


def _gathers(nbytes: int, size: int, per_node: int) -> bool:
    """Return whether an all-reduce among ranks on several nodes, or on one (0), is gathered."""
    if per_node > 1:
        return False
    if size <= 2:
        return nbytes <= (LARGEST_WHOLE if per_node else GATHERED_BY_TWO)
    if per_node:
        return (size - 1) * nbytes <= GATHERED_ACROSS
    return size * nbytes <= GATHERED_WITHIN


def pick(
    kind: str,
    algorithm: str,
    nbytes: int,
    *,
    no_arena: str,
    estimates: Estimates | None = None,
) -> str:
    """Return the algorithm to run, ``"auto"`` resolved.

    Args:
        kind: the collective.
        algorithm: what the user asked for.
        nbytes: bytes of the message, as the algorithms' formulas count them.
        no_arena: why the ranks share no memory; empty if they do.
        estimates: what was measured of the ranks.

    Raises:
        ArgumentError: an unknown algorithm, with the known ones, or one that cannot be had here.
    """
    if algorithm == "auto":
        usual = pick_schedule(kind, nbytes) if no_arena else "shm"
        if estimates is None or estimates.tuning is None:
            return usual
        others = ways(kind, nbytes, estimates.size, no_arena=no_arena)
        return estimates.best(kind, nbytes, _first(usual, others))
    if algorithm not in known_algorithms(kind):
        known = ", ".join(known_algorithms(kind))
        raise ArgumentError(f"unknown {kind} algorithm {algorithm!r}; known are {known}")
    if algorithm == "shm" and no_arena:
        raise ArgumentError(f"algorithm 'shm' cannot be had here: {no_arena}")
    return algorithm


def pick_allreduce(
    algorithm: str,
    nbytes: int,
    *,
    size: int,
    no_arena: str,
    no_hierarchy: str = NO_HIERARCHY,
    per_node: int = 0,
    estimates: Estimates | None = None,
) -> str:
    """Return the algorithm of an all-reduce, ``"auto"`` resolved.

    Args:
        algorithm, nbytes, no_arena, estimates: as `pick` has them.
        size: number of ranks.
        no_hierarchy: why the ranks have no hierarchy of nodes; empty if they do.
        per_node: how many ranks the fullest node of the hierarchy has.

    Raises:
        ArgumentError: as `pick`.
    """
    if algorithm == "hierarchical" and no_hierarchy:
        raise ArgumentError(f"algorithm 'hierarchical' cannot be had here: {no_hierarchy}")
    flat = per_node <= 1
    if algorithm == "hierarchical" and flat:
        return pick_across(nbytes, size, estimates)
    if algorithm != "auto" or not no_arena:
        return pick("allreduce", algorithm, nbytes, no_arena=no_arena, estimates=estimates)
    if _gathers(nbytes, size, per_node):
        usual = "gathered"
    elif no_hierarchy:
        usual = pick_schedule("allreduce", nbytes)
    else:
        short = _is_short(nbytes, estimates)
        usual = usual_across(nbytes, size, short=short) if flat else "hierarchical"
    if estimates is None:
        return usual
    nested = (no_hierarchy or "one rank a node") if flat else ""
    others = ways("allreduce", nbytes, size, no_arena=no_arena, no_hierarchy=nested)
    return estimates.best("allreduce", nbytes, _first(usual, others))
