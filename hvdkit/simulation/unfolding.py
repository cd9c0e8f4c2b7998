"""From an algorithm to the rounds of all ranks' messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hvdkit.schedules.phases import Phase
from hvdkit.schedules.registry import Algorithm
from hvdkit.schedules.steps import Schedule
from hvdkit.simulation.evaluation import evaluate, takes_arrays
from hvdkit.simulation.expansion import expand
from hvdkit.simulation.rounds import Round, placed, side_by_side
from hvdkit.simulation.timetable import by_timetable


def rounds(algorithm: Algorithm, size: int, chunks: int) -> Iterator[Round]:
    """Yield the rounds of an algorithm, in an order in which they can pass.

    Raises:
        ScheduleError: messages do not match, or ranks wait for each other.
    """
    if algorithm.phases is not None:
        for phase in algorithm.phases(size):
            yield from _of_phase(phase)
    elif algorithm.edges is not None:
        yield from by_timetable(algorithm.edges(size), chunks)
    else:
        yield from _of_schedule(algorithm.steps, size, chunks, chunks)


def _of_phase(phase: Phase) -> Iterator[Round]:
    by_size: dict[int, list[Sequence[int]]] = {}
    for group in phase.groups:
        by_size.setdefault(len(group), []).append(group)
    playing = []
    for size, groups in by_size.items():
        chunks = phase.chunks(range(size))
        some = _of_schedule(phase.steps, size, chunks, min(phase.held, chunks))
        playing.append(placed(some, np.array(groups, np.int64), phase.width))
    yield from side_by_side(playing)


def _of_schedule(steps: Schedule, size: int, chunks: int, held: int) -> Iterator[Round]:
    """Yield the rounds of one schedule; chunks from `held` on are empty."""
    if takes_arrays(steps, size, chunks):
        yield from evaluate(steps, size, chunks, held)
    else:
        yield from expand(steps, size, chunks, held)
