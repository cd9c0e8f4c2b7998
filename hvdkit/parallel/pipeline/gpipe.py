"""GPipe: all microbatches forward, then all of them back.

Huang et al., "GPipe: efficient training of giant neural networks using pipeline parallelism",
NeurIPS 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from hvdkit.parallel.pipeline.instructions import Backward, Forward, Instruction, Memory, Times


def gpipe(rank: int, _ranks: int, microbatches: int, _chunks: int = 1) -> Iterator[Instruction]:
    """Run every microbatch forward, flush, and run every one back.  [Huang et al. 2019, 2.3]

    Bubble (p-1)/(m+p-1) of the time; all m microbatches are in flight on every rank.
    p = 3, m = 4 (backward, marked b, takes twice as long as forward)::

        rank 0  0 1 2 3 · · · · · · b0─ b1─ b2─ b3─
        rank 1  · 0 1 2 3 · · · b0─ b1─ b2─ b3─ · ·
        rank 2  · · 0 1 2 3 b0─ b1─ b2─ b3─ · · · ·
    """
    for i in range(microbatches):
        yield Forward(rank, i)
    for i in range(microbatches):
        yield Backward(rank, i)


def gpipe_bubble(ranks: int, microbatches: int, _chunks: int, _times: Times) -> Fraction:
    """Return the idle share of the time, (p-1)/(m+p-1), whatever the durations."""
    return Fraction(ranks - 1, microbatches + ranks - 1)


def gpipe_memory(_rank: int, _ranks: int, microbatches: int, _chunks: int) -> Memory:
    """Return the most that a rank holds: all m microbatches."""
    return Memory(microbatches, microbatches)
