"""ZB-H1: gradients of weights wait, and fill the time in which 1F1B would idle.

Qi et al., "Zero bubble pipeline parallelism", ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from hvdkit.parallel.pipeline.instructions import (
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    Memory,
    Times,
)


def zb_h1(rank: int, ranks: int, microbatches: int, _chunks: int = 1) -> Iterator[Instruction]:
    """Do as 1F1B, but let rank r's gradients of weights lag r microbatches.  [Qi et al. 2024, 2.1]

    Bubble (p-1)(F+B-W) in time, a third of 1F1B's where F = B = W; at most p microbatches are in
    flight on every rank, and on rank r at most p-r of them hold all of their activations.
    p = 3, m = 4 (b: gradient of the input, w: of the weights)::

        rank 0  0  1  2  ·  ·  b0 w0 3  b1 w1 b2 w2 b3 w3
        rank 1  ·  0  1  ·  b0 2  b1 w0 3  b2 w1 b3 w2 w3
        rank 2  ·  ·  0  b0 1  b1 2  b2 w0 3  b3 w1 w2 w3
    """
    warm_up = min(ranks - rank - 1, microbatches)
    for i in range(warm_up):
        yield Forward(rank, i)
    for i in range(microbatches):
        if warm_up + i < microbatches:
            yield Forward(rank, warm_up + i)
        yield BackwardInput(rank, i)
        if i >= rank:
            yield BackwardWeight(rank, i - rank)
    for i in range(max(microbatches - rank, 0), microbatches):
        yield BackwardWeight(rank, i)


def zb_h1_bubble(ranks: int, microbatches: int, _chunks: int, times: Times) -> Fraction:
    """Return the idle share of the time.

    The paper (table 2) has m >= p, and a W no longer than F and than B: each rank then idles for
    (p-1)(F+B-W).  In general W fills min(m, p) - 1 of the gaps F+B, each for min(F, B, W).
    """
    durations = (times.forward, times.backward_input, times.backward_weight)
    f, b, w = (Fraction(duration) for duration in durations)
    idle = (ranks - 1) * (f + b) - (min(microbatches, ranks) - 1) * min(f, b, w)
    makespan = microbatches * (f + b + w) + idle
    return idle / makespan if makespan else Fraction(0)


def zb_h1_memory(rank: int, ranks: int, microbatches: int, _chunks: int) -> Memory:
    """Return the most that rank r holds: p microbatches, of which p-r with all activations.

    That is section 2.3's (p-r) M_B + r M_W.
    """
    return Memory(min(ranks - rank, microbatches), min(ranks, microbatches))
