"""Counters of what was communicated: how often, how much, and how long it took."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

#: Kind, dtype and algorithm of a collective, and its operations, bytes and seconds so far.
Count = tuple[str, str, str, int, int, float]

#: Yields counts that are kept elsewhere, such as in the native module; they never decrease.
Source = Callable[[], Iterable[Count]]


@dataclass(slots=True)
class _Counter:
    operations: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    def add(self, operations: int, nbytes: int, seconds: float) -> None:
        self.operations += operations
        self.nbytes += nbytes
        self.seconds += seconds

    def plain(self) -> dict[str, Any]:
        return {
            "operations": int(self.operations),
            "bytes": int(self.nbytes),
            "seconds": float(self.seconds),
        }


#: By kind, dtype and algorithm.
_Table = defaultdict[tuple[str, str, str], _Counter]


class Stats:
    """One rank's counters.  Threads may share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: _Table = defaultdict(_Counter)
        self._sources: list[Source] = []

    def add(
        self,
        kind: str,
        dtype: str,
        algorithm: str,
        *,
        operations: int,
        nbytes: int,
        seconds: float,
    ) -> None:
        """Count operations that are complete, with their bytes and seconds in all."""
        with self._lock:
            self._counters[kind, dtype, algorithm].add(operations, nbytes, seconds)

    def register(self, source: Source) -> None:
        """Let every `snapshot` include what `source` yields; it must not call this object."""
        with self._lock:
            self._sources.append(source)

    def unregister(self, source: Source) -> None:
        """Keep what `source` has counted so far, and let go of it."""
        with self._lock:
            self._sources.remove(source)
            _add_all(self._counters, source())

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return what was counted so far, as dicts that print well; local.

        Each kind has a total, and below each dtype one counter an algorithm::

            {"allreduce": {"total":   {"operations": 3, "bytes": 12, "seconds": 0.1},
                           "float32": {"shm": {"operations": 3, "bytes": 12, "seconds": 0.1}}}}
        """
        with self._lock:
            table = self._sum()
        totals: defaultdict[str, _Counter] = defaultdict(_Counter)
        result: dict[str, dict[str, Any]] = {}
        for (kind, dtype, algorithm), counter in sorted(table.items()):
            if counter.operations:
                totals[kind].add(counter.operations, counter.nbytes, counter.seconds)
                below = result.setdefault(kind, {"total": {}})
                below.setdefault(dtype, {})[algorithm] = counter.plain()
        for kind, total in totals.items():
            result[kind]["total"] = total.plain()
        return result

    def _sum(self) -> _Table:
        """Return own counters plus the sources'."""
        table: _Table = defaultdict(_Counter)
        for key, counter in self._counters.items():
            table[key].add(counter.operations, counter.nbytes, counter.seconds)
        for source in self._sources:
            _add_all(table, source())
        return table


def _add_all(table: _Table, counts: Iterable[Count]) -> None:
    for kind, dtype, algorithm, operations, nbytes, seconds in counts:
        table[kind, dtype, algorithm].add(operations, nbytes, seconds)
