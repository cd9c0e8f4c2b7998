"""Interleaved 1F1B: several stages a rank, so that the pipeline fills in smaller steps.

Narayanan et al., "Efficient large-scale language model training on GPU clusters using Megatron-LM",
SC 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

from hvdkit.parallel.pipeline.instructions import Backward, Forward, Instruction, Memory, Times


def interleaved(rank: int, ranks: int, microbatches: int, chunks: int = 1) -> Iterator[Instruction]:
    """Run 1F1B over v chunks of layers a rank, a round of microbatches at a time.  [SC 2021, 2.2.2]

    Chunk c of rank r is stage c*p + r.  A round of p microbatches goes through the first chunk of
    all ranks, then through the second, and so on; backward goes through the chunks in reverse.

    The paper wants m divisible by p.  Here rounds are as equal as can be and never smaller than p
    (where m >= p), which gives the paper's bubble for every such m: a smaller last round idles
    more, and deadlocks for some m.  The price is (v-1)(q-p) more in flight, for rounds of q > p.

    Bubble (p-1)/(vm+p-1) of the time; rank r has at most 2(p-r-1) + (v-1)q + 1 stages' microbatches
    in flight, each a v-th of a rank's layers.
    p = 3, m = 4, v = 2 (b: backward, drawn as long as forward; 0': through stage r+3)::

        rank 0  0   1   2   3   0'  1'  2'  3'  ·   b0' ·   b1' ·   b2' ·   b3' b0  b1  b2  b3
        rank 1  ·   0   1   2   3   0'  1'  2'  b0' 3'  b1' ·   b2' ·   b3' b0  b1  b2  b3  ·
        rank 2  ·   ·   0   1   2   3   0'  b0' 1'  b1' 2'  b2' 3'  b3' b0  b1  b2  b3  ·   ·
    """
    forward, backward = [], []
    for first, end in _rounds(ranks, microbatches):
        for chunk in range(chunks):
            stage, mirrored = chunk * ranks + rank, (chunks - 1 - chunk) * ranks + rank
            forward += [Forward(stage, i) for i in range(first, end)]
            backward += [Backward(mirrored, i) for i in range(first, end)]
    warm_up = _warm_up(rank, ranks, microbatches, chunks)
    steady = len(forward) - warm_up
    yield from forward[:warm_up]
    for i in range(steady):
        yield forward[warm_up + i]
        yield backward[i]
    yield from backward[steady:]


def interleaved_bubble(ranks: int, microbatches: int, chunks: int, _times: Times) -> Fraction:
    """Return the idle share of the time, (p-1)/(vm+p-1), whatever the durations.

    The paper has m >= p.  With fewer, each chunk but the last takes as long as with p, for a round
    must come out of the last rank before it can enter the first again: vp + m-1 slots each way.
    """
    slots = chunks * max(microbatches, ranks) + min(microbatches, ranks) - 1
    return Fraction(slots - chunks * microbatches, slots)


def interleaved_memory(rank: int, ranks: int, microbatches: int, chunks: int) -> Memory:
    """Return the most that rank r holds: its warm-up and one more, or all where there are fewer."""
    held = min(_warm_up(rank, ranks, microbatches, chunks) + 1, chunks * microbatches)
    return Memory(held, held)


def _rounds(ranks: int, microbatches: int) -> list[tuple[int, int]]:
    """Return the half-open runs of microbatches that go through a chunk before the next chunk."""
    rounds = max(microbatches // ranks, 1)
    size, larger = divmod(microbatches, rounds)
    starts = [i * size + min(i, larger) for i in range(rounds + 1)]
    return list(pairwise(starts))


def _warm_up(rank: int, ranks: int, microbatches: int, chunks: int) -> int:
    """Return how many forwards come before the first backward follows one at once."""
    largest = -(-microbatches // max(microbatches // ranks, 1))
    return min(2 * (ranks - rank - 1) + (chunks - 1) * largest, chunks * microbatches)
