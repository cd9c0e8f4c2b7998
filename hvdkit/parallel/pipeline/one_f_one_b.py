"""1F1B: each microbatch goes back as soon as it can, so that few are in flight.

Narayanan et al., "Memory-efficient pipeline-parallel DNN training", ICML 2021 (PipeDream-Flush);
Narayanan et al., "Efficient large-scale language model training on GPU clusters using Megatron-LM",
SC 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from hvdkit.parallel.pipeline.instructions import Backward, Forward, Instruction, Memory, Times


def one_f_one_b(
    rank: int, ranks: int, microbatches: int, _chunks: int = 1
) -> Iterator[Instruction]:
    """Warm up, alternate one forward with one backward, drain.  [Narayanan et al., SC 2021, 2.2.1]

    Bubble (p-1)/(m+p-1) of the time, as GPipe's; at most p-r microbatches are in flight on rank r.
    p = 3, m = 4 (backward, marked b, takes twice as long as forward)::

        rank 0  0 1 2 · · · · b0─ 3 b1─ · b2─ · b3─
        rank 1  · 0 1 · · b0─ 2 b1─ 3 b2─ · b3─ · ·
        rank 2  · · 0 b0─ 1 b1─ 2 b2─ 3 b3─ · · · ·
    """
    warm_up = min(ranks - rank - 1, microbatches)
    for i in range(warm_up):
        yield Forward(rank, i)
    for i in range(microbatches - warm_up):
        yield Forward(rank, warm_up + i)
        yield Backward(rank, i)
    for i in range(microbatches - warm_up, microbatches):
        yield Backward(rank, i)


def one_f_one_b_bubble(ranks: int, microbatches: int, _chunks: int, _times: Times) -> Fraction:
    """Return the idle share of the time, (p-1)/(m+p-1), whatever the durations."""
    return Fraction(ranks - 1, microbatches + ranks - 1)


def one_f_one_b_memory(rank: int, ranks: int, microbatches: int, _chunks: int) -> Memory:
    """Return the most that rank r holds: p-r microbatches, or all where there are fewer."""
    held = min(ranks - rank, microbatches)
    return Memory(held, held)
