"""The rounds of a schedule that goes by a timetable: the times of `hvdkit.schedules.double_tree`.

Thousands of ranks times hundreds of segments are millions of steps, but the messages of one time
are a selection of the trees' edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hvdkit.schedules.double_tree import Edge
from hvdkit.simulation.rounds import Pairs, Round


def by_timetable(edges: Sequence[Edge], chunks: int) -> Iterator[Round]:
    """Yield what passes at each time: the reduction at those below 0, then the broadcast."""
    if not edges:
        return
    times = [edge.times(chunks) for edge in edges]
    begin, end = (np.array([getattr(t, name) for t in times]) for name in ("start", "stop"))
    parent, child = (np.array([getattr(e, name) for e in edges]) for name in ("parent", "child"))
    pairs: dict[bytes, tuple[Pairs, np.ndarray[tuple[int], np.dtype[np.int64]]]] = {}
    for time in range(-int(end.max()), int(end.max())):
        up = time < 0
        now = -1 - time if up else time
        passing = (begin <= now) & (now < end) & ((now - begin) % 2 == 0)
        if not passing.any():
            continue
        source, destination = (child, parent) if up else (parent, child)
        key = bytes([up]) + passing.tobytes()
        if key not in pairs:
            found = Pairs(source[passing], destination[passing])
            pairs[key] = found, np.union1d(found.source, found.destination)
        yield Round(pairs[key][0], 1, up, entering=pairs[key][1])
