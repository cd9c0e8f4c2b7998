"""Which algorithm ``"auto"`` stands for: a pure function of what is known on every rank alike."""

from __future__ import annotations

from hvdkit.config import KIB
from hvdkit.errors import ArgumentError
from hvdkit.schedules.registry import ALGORITHMS

#: The ranks' shared memory, and the MPI library's own collective.
OTHER_WAYS = ("shm", "mpi")

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
    return ("auto", *OTHER_WAYS, *ALGORITHMS[kind])


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
        if not no_arena:
            return "shm"
        return next(name for limit, name in _BY_SIZE[kind] if nbytes <= limit)
    if algorithm not in known_algorithms(kind):
        known = ", ".join(known_algorithms(kind))
        raise ArgumentError(f"unknown {kind} algorithm {algorithm!r}; known are {known}")
    if algorithm == "shm" and no_arena:
        raise ArgumentError(f"algorithm 'shm' cannot be had here: {no_arena}")
    return algorithm
