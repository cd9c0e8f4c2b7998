"""What ranks write, on its way to the user: whole lines, labelled, the first failure's first.

A line of rank 3's stdout is shown as ``[3] text``, one of its stderr as ``[3:err] text``.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from hvdkit.launch.guard import folder_name

#: Whoever writes no newline for as long is shown nevertheless.
_LONGEST_LINE = 2**20

#: How long a traceback, and what others say after it, is kept back: until it is known which rank
#: was the first to fail.
SECONDS_TO_KEEP = 2.0

#: One that more follows: a progress bar's next state.
_CARRIAGE_RETURN = re.compile(rb"(?<=\r)(?!$)")

_TRACEBACK = b"Traceback (most recent call last):"

#: A line that only says that another rank has failed.
_SECONDARY = re.compile(
    rb"(hvdkit\.errors\.)?(PeerError|HorovodInternalError)\b|hvdkit: rank \d+ of \d+ cannot go on"
)

#: Cyan, green, yellow, magenta, blue, red.
_COLOURS = (36, 32, 33, 35, 34, 31)


@dataclass(frozen=True)
class Style:
    """How lines are shown."""

    labels: bool = True
    timestamps: bool = False
    colours: tuple[bool, bool] = (False, False)
    """Whether labels are coloured, on stdout and on stderr."""


def wants_colours(stream: BinaryIO, environ: Mapping[str, str]) -> bool:
    """Return whether `stream` is a terminal that takes colours and whose user wants them."""
    if environ.get("NO_COLOR") or environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


@dataclass
class _Kept:
    """The lines that a rank writes to stderr from a traceback on."""

    since: float
    lines: list[bytes] = field(default_factory=list)
    ended: bool = False


class Display:
    """Show what ranks write.

    Args:
        stdout, stderr: where to.
        style: how.
        folder: rank 3's lines also go to ``rank.3/stdout`` and ``rank.3/stderr`` in it.
        size: how many ranks there are.
    """

    def __init__(
        self,
        stdout: BinaryIO,
        stderr: BinaryIO,
        *,
        style: Style,
        folder: Path | None = None,
        size: int = 1,
    ) -> None:
        self._streams = {"o": stdout, "e": stderr}
        self._style = style
        self._parts: dict[tuple[int, str], bytes] = {}
        self._kept: dict[int, _Kept] = {}
        self._secondary: set[int] = set()
        self._later: list[tuple[int | None, bytes]] = []  # said by others in the meantime
        self._open_line: tuple[int, str] | None = None  # one that ends with a carriage return
        self._files = {} if folder is None else dict(_open_files(folder, size))

    @classmethod
    def nowhere(cls) -> Display:
        """Return one that shows nothing."""
        return cls(io.BytesIO(), io.BytesIO(), style=Style())

    def write(self, rank: int, kind: str, content: bytes) -> None:
        """Take a record's content: ``o`` or ``e`` ends a line, ``O`` or ``E`` does not."""
        stream = kind.lower()
        if (rank, stream) in self._files:
            self._files[rank, stream].write(content if kind.isupper() else content + b"\n")
        data = self._parts.pop((rank, stream), b"") + content
        *lines, rest = _CARRIAGE_RETURN.split(data)
        if kind.islower() or len(rest) > _LONGEST_LINE:
            lines.append(rest + b"\n")
        elif rest.endswith(b"\r"):
            lines.append(rest)
        elif rest:
            self._parts[rank, stream] = rest
        for line in lines:
            self._take(rank, stream, line)

    def write_unlabelled(self, line: bytes) -> None:
        """Show a line that is no rank's on stderr, after a traceback that is kept back."""
        self._take(None, "e", line)

    def end_rank(self, rank: int, *, failed: bool) -> None:
        """Show the rest of what a rank has written, unless another's failure must come first."""
        for stream in "oe":
            rest = self._parts.pop((rank, stream), b"")
            if rest:
                self._take(rank, stream, rest + b"\n")
        kept = self._kept.get(rank)
        if kept is None:
            return
        kept.ended = True
        if not failed:
            self._release(rank)
        elif rank not in self._secondary:
            self._release(rank)
            for other in [other for other, each in self._kept.items() if each.ended]:
                self._release(other)

    def is_secondary(self, rank: int) -> bool:
        """Return whether a rank has failed only because another had."""
        return rank in self._secondary

    def release_overdue(self) -> None:
        """Show what has been kept back for too long."""
        now = time.monotonic()
        for rank, kept in list(self._kept.items()):
            if now - kept.since > SECONDS_TO_KEEP:
                self._release(rank)

    def close(self) -> None:
        """Show everything, what only tells of another's failure last."""
        for rank, stream in list(self._parts):
            self._take(rank, stream, self._parts.pop((rank, stream)) + b"\n")
        for rank in sorted(self._kept, key=lambda rank: rank in self._secondary):
            self._release(rank)
        if self._open_line is not None:
            self._end_open_line()
        for file in self._files.values():
            file.close()
        self._files = {}

    def _take(self, rank: int | None, stream: str, line: bytes) -> None:
        if stream == "o":
            self._show(rank, stream, line)
            return
        if rank is not None:
            if _SECONDARY.match(line):
                self._secondary.add(rank)
            if line.startswith(_TRACEBACK) and rank not in self._kept:
                self._kept[rank] = _Kept(time.monotonic())
        if rank is not None and rank in self._kept:
            self._kept[rank].lines.append(line)
        elif self._kept:
            self._later.append((rank, line))
        else:
            self._show(rank, stream, line)

    def _release(self, rank: int) -> None:
        for line in self._kept.pop(rank).lines:
            self._show(rank, "e", line)
        if not self._kept:
            later, self._later = self._later, []
            for other, line in later:
                self._show(other, "e", line)

    def _show(self, rank: int | None, stream: str, line: bytes) -> None:
        if self._open_line is not None and self._open_line != (rank, stream):
            self._end_open_line()
        target = self._streams[stream]
        target.write(line if rank is None else self._label(rank, stream) + line)
        target.flush()
        open_ended = rank is not None and line.endswith(b"\r")
        self._open_line = (rank, stream) if rank is not None and open_ended else None

    def _end_open_line(self) -> None:
        """Let what a progress bar last showed stand."""
        if self._open_line is not None:
            target = self._streams[self._open_line[1]]
            target.write(b"\n")
            target.flush()
        self._open_line = None

    def _label(self, rank: int, stream: str) -> bytes:
        clock = time.strftime("%Y-%m-%d %H:%M:%S ") if self._style.timestamps else ""
        if not self._style.labels:
            return clock.encode()
        label = f"[{rank}]" if stream == "o" else f"[{rank}:err]"
        if self._style.colours[stream == "e"]:
            label = f"\x1b[{_COLOURS[rank % len(_COLOURS)]}m{label}\x1b[0m"
        return f"{clock}{label} ".encode()


def _open_files(folder: Path, size: int) -> Iterator[tuple[tuple[int, str], BinaryIO]]:
    """Yield an open file for each rank and stream."""
    for rank in range(size):
        place = folder / folder_name(rank, size)
        place.mkdir(parents=True, exist_ok=True)
        for stream, name in (("o", "stdout"), ("e", "stderr")):
            yield (rank, stream), (place / name).open("wb", buffering=0)
