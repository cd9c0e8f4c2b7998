"""What a schedule costs in the papers' model, and the least that any schedule can cost.

The model is one-ported and full duplex: a message takes one unit of time whatever it carries, and a
rank sends at most one and receives at most one at a time.

The size n of a message is what the literature on lower bounds takes:

=============  =====================================================================
allreduce      the vector that every rank contributes and ends with
reducescatter  the vector that every rank contributes; each ends with n/p of it
allgather      the gathered vector that every rank ends with; each contributes n/p
broadcast      the root's vector
alltoall       all that one rank has to send, the p-th part it keeps included
barrier        one token
=============  =====================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Cost:
    """Steps and bytes of a schedule.

    Args:
        steps: communication steps on the critical path, every message taking one.
        sent_fraction: bytes sent by the rank that sends most, as a multiple of n; exact where
            n is a multiple of the number of chunks.
    """

    steps: int
    sent_fraction: Fraction


def log2_floor(size: int) -> int:
    """Return the largest k with 2**k <= size, for size >= 1."""
    return size.bit_length() - 1


def log2_ceil(size: int) -> int:
    """Return the smallest k with 2**k >= size, for size >= 1."""
    return (size - 1).bit_length()


def lower_bound(collective: str, size: int) -> Cost:
    """Return the fewest steps and the fewest bytes of any schedule; one may cost the other.

    Steps: what one rank knows can reach at most twice as many ranks with each step, so that
    ceil(log2 p) are needed wherever each rank, or the root, must be heard by all.  Chan, Heimlich,
    Purkayastha & van de Geijn, "Collective communication: theory, practice, and experience",
    Concurrency and Computation 19 (2007).

    Bytes: all-gather, reduce-scatter and all-to-all must move (p-1)/p n into (or out of) each rank;
    all-reduce must do both (Patarasuk & Yuan 2009); the root of a broadcast must send each byte
    once; and in a barrier every rank must be heard of, so that it sends a token.
    """
    share = Fraction(size - 1, size)
    sent = {
        "allreduce": 2 * share,
        "reducescatter": share,
        "allgather": share,
        "broadcast": Fraction(min(size - 1, 1)),
        "alltoall": share,
        "barrier": Fraction(min(size - 1, 1)),
    }
    return Cost(steps=log2_ceil(size), sent_fraction=sent[collective])
