"""A schedule laid out on a message: which elements travel in each step.  Once; run many times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from hvdkit.schedules.steps import Chunks, Exchange, chunk_indices, contiguous_runs

#: Where chunks begin and end: chunk i is the elements ``bounds[i]`` to ``bounds[i + 1]``.
Bounds = Sequence[int]


def even_bounds(count: int, chunks: int) -> Bounds:
    """Cut `count` elements in `chunks` parts whose lengths differ by one at the most."""
    return [i * count // chunks for i in range(chunks + 1)]


def bounds_of(counts: Iterable[int]) -> Bounds:
    """Return the bounds of chunks of `counts` elements."""
    return list(accumulate(counts, initial=0))


@dataclass(frozen=True, slots=True)
class Move:
    """One step of one rank, with peers as ranks and chunks as segments of the buffers.

    Args:
        source: the rank that sends to this one.
        incoming: where its segments go.
        reduces: whether they are combined with what is there.
        destination: the rank that this one sends to.
        outgoing: the segments it gets.
        in_turn: whether a segment must have left before it is reduced into.
    """

    source: int
    incoming: tuple[slice, ...]
    reduces: bool
    destination: int
    outgoing: tuple[slice, ...]
    in_turn: bool

    def __str__(self) -> str:
        """Return such as ``send to 1, reduce from 3``."""
        words = [f"send to {self.destination}"] if self.outgoing else []
        if self.incoming:
            words.append(f"{'reduce' if self.reduces else 'store'} from {self.source}")
        return ", ".join(words)


def lay_out(
    steps: Iterable[Exchange],
    size: int,
    target: Bounds,
    *,
    source: Bounds | None = None,
    longest: int,
    root: int = 0,
) -> tuple[Move, ...]:
    """Lay out this rank's `steps`.  Pure and local.

    Args:
        steps: for the rank relative to `root`.
        size: number of ranks.
        target: of the buffer that is received into.
        source: of the buffer that is sent from, if another.
        longest: elements of a segment, at most.
        root: the rank that the schedule calls 0.
    """
    moves = []
    for step in steps:
        incoming, outgoing = step.receive, step.send
        moves.append(
            Move(
                source=(incoming[0] + root) % size if incoming else -1,
                incoming=_segments(incoming[1], target, longest) if incoming else (),
                reduces=step.reduce is not None,
                destination=(outgoing[0] + root) % size if outgoing else -1,
                outgoing=_segments(outgoing[1], source or target, longest) if outgoing else (),
                in_turn=_overlaps(step),
            )
        )
    return tuple(moves)


def _segments(chunks: Chunks, bounds: Bounds, longest: int) -> tuple[slice, ...]:
    runs = ((bounds[first], bounds[stop]) for first, stop in contiguous_runs(chunks))
    return tuple(
        slice(begin, min(begin + longest, end))
        for start, end in runs
        for begin in range(start, end, longest)
    )


def _overlaps(step: Exchange) -> bool:
    """Return whether a step reduces into the chunks that it sends."""
    if step.send is None or step.reduce is None:
        return False
    sent, reduced = chunk_indices(step.send[1]), chunk_indices(step.reduce[1])
    if sent == reduced:
        return True
    assert set(sent).isdisjoint(reduced), "a step may reduce into all or none of what it sends"
    return False
