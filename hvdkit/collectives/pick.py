"""Which algorithm ``"auto"`` stands for: a pure function of what is known on every rank alike."""

from __future__ import annotations

from functools import lru_cache

from hvdkit.config import KIB
from hvdkit.errors import ArgumentError
from hvdkit.schedules.registry import ALGORITHMS

#: The ranks' shared memory, and the MPI library's own collective.
OTHER_WAYS = ("shm", "mpi")

#: What an all-reduce can be as well: see `hvdkit.collectives.gathered` and `.hierarchical`.
_ALLREDUCES = ("gathered", "hierarchical")

#: Up to how many bytes an all-reduce is gathered: of all ranks together where they are on one
#: node, and into one node from the others where they are not.  Two ranks exchange as many bytes
#: with any other algorithm.
GATHERED_WITHIN = 64 * KIB
GATHERED_ACROSS = 32 * KIB
GATHERED_BY_TWO = 64 * KIB

#: What is taken for the links between nodes: seconds a step, and seconds a byte (1 Gbit/s).
STEP_ACROSS = 100e-6
BYTE_ACROSS = 8e-9

#: Up to how many bytes every rank may reduce everything; beyond that, work is shared out.
LARGEST_WHOLE = 512 * KIB

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


@lru_cache
def pick_across(nbytes: int, size: int) -> str:
    """Return the all-reduce algorithm among `size` ranks, each on a node of its own.

    Gathered, or the schedule that costs least by its formula: a byte costs more between nodes than
    in a node's memory, and a number of ranks that is no power of two more bytes with doubling than
    in a ring.
    """
    if _gathers(nbytes, size, per_node=1):
        return "gathered"
    names = ["halving_doubling", "ring"]
    if nbytes <= LARGEST_WHOLE:
        names.insert(0, "recursive_doubling")

    def seconds(name: str) -> float:
        known = ALGORITHMS["allreduce"][name]
        cost = known.cost(size, known.chunks(size, 1))
        return cost.steps * STEP_ACROSS + float(cost.sent_fraction) * nbytes * BYTE_ACROSS

    return min(names, key=seconds)


def _gathers(nbytes: int, size: int, per_node: int) -> bool:
    """Return whether an all-reduce among ranks on several nodes, or on one (0), is gathered."""
    if size <= 2:
        return nbytes <= GATHERED_BY_TWO
    if not per_node:
        return size * nbytes <= GATHERED_WITHIN
    return per_node * (size - per_node) * nbytes <= GATHERED_ACROSS


def pick(kind: str, algorithm: str, nbytes: int, *, no_arena: str) -> str:
    """Return the algorithm to run, ``"auto"`` resolved.

    Args:
        kind: the collective.
        algorithm: what the user asked for.
        nbytes: bytes of the message, as the algorithms' formulas count them.
        no_arena: why the ranks share no memory; empty if they do.

    Raises:
        ArgumentError: an unknown algorithm, with the known ones, or one that cannot be had here.
    """
    if algorithm == "auto":
        return pick_schedule(kind, nbytes) if no_arena else "shm"
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
) -> str:
    """Return the algorithm of an all-reduce, ``"auto"`` resolved.

    Args:
        algorithm, nbytes, no_arena: as `pick` has them.
        size: number of ranks.
        no_hierarchy: why the ranks have no hierarchy of nodes; empty if they do.
        per_node: how many ranks the fullest node of the hierarchy has.

    Raises:
        ArgumentError: as `pick`.
    """
    if algorithm == "hierarchical" and no_hierarchy:
        raise ArgumentError(f"algorithm 'hierarchical' cannot be had here: {no_hierarchy}")
    if algorithm == "auto" and no_arena:
        if _gathers(nbytes, size, per_node):
            return "gathered"
        algorithm = "auto" if no_hierarchy else "hierarchical"
    if algorithm == "hierarchical":
        return algorithm if per_node > 1 else pick_across(nbytes, size)
    return pick("allreduce", algorithm, nbytes, no_arena=no_arena)
