"""What each rank did when: a trace that Perfetto and chrome://tracing open.

        rank 0   trace.rank0.json  --+
        rank 1   trace.rank1.json  --+--> merge --> trace.json
        rank 2   trace.rank2.json  --+

Each rank streams its events to a part file of its own, with times on rank 0's clock; rank 0 joins
the parts in the end.  The format is Chrome's trace events as a JSON array, whose closing bracket
may be missing, so that what a killed job leaves behind can be opened as well [Trace Event Format,
section "JSON Array Format"].
"""

from __future__ import annotations

import json
import mmap
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from hvdkit.errors import ArgumentError, HvdkitError, format_ranks
from hvdkit.transport.base import Backoff, Transport

#: Times are whole multiples of 1/8 us: exact in binary and as nanoseconds, so that no viewer's
#: rounding makes a span end after the next one begins.  Perfetto drops spans that overlap.
TICKS_PER_SECOND = 8_000_000

#: Track k of rank r has the thread number ``r * TRACKS + k``, k > 0: different on all ranks, since
#: Perfetto looks threads up by that number, and never the rank, which would be its main thread.
TRACKS = 1000

#: This many events waiting wake the writer before its time.
LARGE = 10_000

#: The writer offers the GIL to others after so many events, so that no collective waits for it.
BATCH = 50

#: Round trips to rank 0 of which the shortest counts.
TRIPS = 20

_encode = json.JSONEncoder(separators=(",", ":"), default=str, allow_nan=False).encode


class Timeline:
    """One rank's part of a trace.  Creating it is local; threads may share it.

    Args:
        path: where the merged trace will be; this rank's part is `part_path(path, rank)`.
        rank: this rank, the trace's process number.
        size: how many ranks there are.
        offset_seconds: what `measure_offset` returned; added to every time.
        flush_seconds: how long an event may wait before it is in the file.

    Raises:
        ArgumentError: the part file cannot be written.
    """

    now = staticmethod(time.perf_counter)
    """The clock of all times, in seconds; CLOCK_MONOTONIC on Linux."""

    def __init__(
        self,
        path: Path | str,
        *,
        rank: int,
        size: int,
        offset_seconds: float,
        flush_seconds: float = 1.0,
    ) -> None:
        self.path = part_path(path, rank)
        self._rank = rank
        self._offset = offset_seconds
        self._flush_seconds = flush_seconds
        self._tracks: dict[str, int] = {}
        self._events: deque[_Event] = deque()
        self._append: Callable[[_Event], None] = self._events.append
        self._wake = threading.Event()
        self._closing = False
        try:
            self._file = self.path.open("w", encoding="ascii")
            self._write("[\n" + self._describe("process", 0, f"rank {rank}", rank))
        except OSError as exc:
            raise ArgumentError(
                f"rank {rank} of {size} cannot write its part of the timeline, {self.path}: {exc}\n"
                "Give a path in a directory that exists on every node and can be written to."
            ) from exc
        self._writer = threading.Thread(target=self._stream, name="hvdkit-timeline", daemon=True)
        self._writer.start()

    def span(self, track: str, name: str, begin: float, end: float, /, **args: Any) -> None:
        """Record what took from `begin` to `end`; costs about a microsecond, never blocks.

        Args:
            track: the row of the trace, such as ``"main"``; its spans must follow each other or
                nest, so that threads need tracks of their own.
            name: what is written on the span.
            begin, end: seconds of `Timeline.now`.
            args: shown when the span is clicked on; numbers, strings or what prints well.
        """
        self._append((track, name, begin, end, args))
        if len(self._events) == LARGE:
            self._wake.set()

    def close(self) -> None:
        """Write what was recorded and end the part; what comes later is dropped.  Local."""
        self._append = _ignore
        self._closing = True
        self._wake.set()
        self._writer.join()

    def _stream(self) -> None:
        """Write events as they come, until the timeline is closed: the writer's thread."""
        try:
            closing = False
            while not closing:
                self._wake.wait(self._flush_seconds)
                self._wake.clear()
                closing = self._closing
                self._flush()
            self._write("\n]\n")
            self._file.close()
        except OSError as exc:
            self._append = _ignore
            self._events.clear()
            what = f"the timeline of rank {self._rank} ends here"
            warnings.warn(f"{what}: {self.path} cannot be written: {exc}", stacklevel=1)

    def _flush(self) -> None:
        lines: list[str] = []
        for number in range(len(self._events)):
            if number % BATCH == 0:
                time.sleep(0)
            track, name, begin, end, args = self._events.popleft()
            thread = self._tracks.get(track)
            if thread is None:
                position = len(self._tracks) + 1
                thread = self._tracks[track] = self._rank * TRACKS + position
                lines.append(self._describe("thread", thread, track, position))
            lines.append(self._format(thread, name, begin, end, args))
        if lines:
            self._write(",\n" + ",\n".join(lines))

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()

    def _describe(self, what: str, thread: int, name: str, position: int) -> str:
        """Return the metadata that give a process or thread its name and its place."""
        common = {"ph": "M", "pid": self._rank, "tid": thread}
        named = common | {"name": f"{what}_name", "args": {"name": name}}
        placed = common | {"name": f"{what}_sort_index", "args": {"sort_index": position}}
        return f"{_encode(named)},\n{_encode(placed)}"

    def _format(
        self, thread: int, name: str, begin: float, end: float, args: dict[str, Any]
    ) -> str:
        start = self._ticks(begin)
        event = {"name": name, "ph": "X", "ts": start / 8, "pid": self._rank, "tid": thread}
        event["dur"] = (self._ticks(end) - start) / 8
        if args:
            event["args"] = args
        try:
            return _encode(event)
        except (TypeError, ValueError):  # such as infinity, which JSON has not
            return _encode(event | {"args": {key: str(value) for key, value in args.items()}})

    def _ticks(self, seconds: float) -> int:
        return round((seconds + self._offset) * TICKS_PER_SECOND)


#: Track, name, begin, end, args.
_Event = tuple[str, str, float, float, dict[str, Any]]


def _ignore(_event: _Event) -> None:
    """Drop an event."""


# One clock


def measure_offset(transport: Transport, *, clock: Callable[[], float] = Timeline.now) -> float:
    """Return what to add to this rank's clock for the seconds since rank 0 came here.  Collective.

    Each rank asks rank 0 for the time, and trusts the shortest of `TRIPS` round trips, of whose two
    ways it believes that they took equally long: the error is at most half of that trip
    [Cristian, Probabilistic clock synchronization, 1989, section 3].  Drift is not measured: the
    clocks of different nodes may part by microseconds a second.
    """
    if transport.rank != 0:
        return _ask_for_time(transport, clock)
    # After 104 days of a clock its nanoseconds are no longer whole numbers in a double.
    start = clock()
    for peer in range(1, transport.size):
        _tell_time(transport, peer, lambda: clock() - start)
    return -start


def _ask_for_time(transport: Transport, clock: Callable[[], float]) -> float:
    backoff = Backoff(0)
    ping, told = np.zeros(1, np.uint8), np.empty(1)
    trips = []
    for _ in range(TRIPS):
        answer = transport.irecv(told.view(np.uint8), 0)
        sent = clock()
        backoff.wait(transport.isend(ping, 0))
        backoff.wait(answer)
        returned = clock()
        trips.append((returned - sent, float(told[0]) - (sent + returned) / 2))
    return min(trips)[1]


def _tell_time(transport: Transport, peer: int, clock: Callable[[], float]) -> None:
    backoff = Backoff(0)
    ping, told = np.empty(1, np.uint8), np.empty(1)
    for _ in range(TRIPS):
        backoff.wait(transport.irecv(ping, peer))
        told[0] = clock()
        backoff.wait(transport.isend(told.view(np.uint8), peer))


# One file


def part_path(path: Path | str, rank: int) -> Path:
    """Return where a rank's part lies: ``trace.rank3.json`` beside ``trace.json``."""
    whole = Path(path)
    return whole.with_name(f"{whole.stem}.rank{rank}{whole.suffix}")


def remove_parts(path: Path | str, size: int) -> None:
    """Remove the parts that are here, such as those of an earlier job that was killed.  Local."""
    for rank in range(size):
        part_path(path, rank).unlink(missing_ok=True)


def merge(path: Path | str, size: int) -> None:
    """Join the parts into `path`, one JSON array in order of time, and remove them.  Local.

    For one rank, once all have closed their timelines.  An event that was cut off as its rank was
    killed is left out.  So are parts that lie on another node: a warning names their ranks.

    Raises:
        HvdkitError: the parts cannot be read or `path` not be written; the parts stay.
    """
    target = Path(path)
    absent = [rank for rank in range(size) if not part_path(target, rank).exists()]
    if absent:
        warnings.warn(
            f"the timeline {target} is without {format_ranks(absent)}, whose parts are not here. "
            "Open them where they are, or give a path that all nodes share",
            stacklevel=2,
        )
    here = [part_path(target, rank) for rank in range(size) if rank not in absent]
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        with ExitStack() as files:
            _join([_view(part, files) for part in here if part.stat().st_size], unfinished)
        unfinished.replace(target)
        remove_parts(target, size)
    except OSError as exc:
        unfinished.unlink(missing_ok=True)
        raise HvdkitError(
            f"the timeline cannot be joined into {target}: {exc}\n"
            f"The parts, such as {part_path(target, 0)}, stay; each can be opened by itself."
        ) from exc


def _view(part: Path, files: ExitStack) -> mmap.mmap:
    file = files.enter_context(part.open("rb"))
    return files.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _join(parts: list[mmap.mmap], path: Path) -> None:
    """Write the events of all parts to `path`, by time and, where that is equal, parents first.

    Only where the events lie is kept in memory.  A span is recorded after those that it encloses,
    hence the last first among spans that begin and end together.
    """
    found = [np.fromiter(_find(part, number), _PLACE) for number, part in enumerate(parts)]
    places = np.concatenate([np.empty(0, _PLACE), *found])
    order = np.lexsort((-np.arange(len(places)), -places["duration"], places["time"]))
    with path.open("wb") as out:
        out.write(b"[")
        for count, place in enumerate(order):
            _, _, part, start, stop = places[place]
            out.write(b",\n" if count else b"\n")
            out.write(parts[part][start:stop])
        out.write(b"\n]\n")


_PLACE = np.dtype(
    [("time", "f8"), ("duration", "f8"), ("part", "i8"), ("start", "i8"), ("stop", "i8")]
)


def _find(part: mmap.mmap, number: int) -> Iterator[tuple[float, float, int, int, int]]:
    """Yield a `_PLACE` for each event of part `number`; metadata come before all times."""
    while line := part.readline():
        text = line.rstrip(b",\n")
        try:
            event = json.loads(text)
        except ValueError:  # a bracket, or an event that was cut off
            continue
        start = part.tell() - len(line)
        time_of_event = event.get("ts", -np.inf)
        yield time_of_event, event.get("dur", 0.0), number, start, start + len(text)
