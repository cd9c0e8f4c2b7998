"""A pipeline schedule's table, from the very run that proves it: what to draw, and as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from hvdkit.errors import ArgumentError
from hvdkit.parallel.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    Memory,
    Time,
    Times,
)
from hvdkit.parallel.pipeline.registry import PipelineSchedule
from hvdkit.parallel.pipeline.simulate import Slot, Timeline, simulate
from hvdkit.parallel.pipeline.verify import verify

#: Beyond these nobody can read the table.
MAX_RANKS, MAX_MICROBATCHES, MAX_CHUNKS, MAX_COLUMNS = 64, 256, 16, 10_000

_MARKS = {Forward: "", Backward: "b", BackwardInput: "b", BackwardWeight: "w"}


@dataclass(frozen=True, slots=True)
class Drawing:
    """What both kinds of picture show.

    Args:
        title: schedule, ranks, microbatches and chunks.
        ranks: how many there are.
        timeline: when each rank does what.
        unit: the longest time of which every duration is a multiple.
        legend: how to read a cell.
        totals: lines with bubble and memory.
    """

    title: str
    ranks: int
    timeline: Timeline
    unit: Fraction
    legend: str
    totals: list[str]

    def columns(self, time: Time) -> int:
        """Return a time in units."""
        return int(Fraction(time) / self.unit)

    def label(self, instruction: Instruction) -> str:
        """Return ``"3"`` for a forward, ``"b3"`` or ``"w3"`` for a backward; a ``'`` a chunk."""
        ticks = "'" * (instruction.stage // self.ranks)
        return f"{_MARKS[type(instruction)]}{instruction.microbatch}{ticks}"


def plan(
    schedule: PipelineSchedule,
    ranks: int,
    microbatches: int,
    *,
    chunks: int = 1,
    times: Times | None = None,
) -> Drawing:
    """Prove the schedule, play it in time and return what is to be drawn.

    Raises:
        ArgumentError: a number or a duration with which it cannot be drawn.
        ScheduleError: the schedule is wrong.
    """
    times = Times() if times is None else times
    for count, most, what in (
        (ranks, MAX_RANKS, "stages"),
        (microbatches, MAX_MICROBATCHES, "microbatches"),
        (chunks, MAX_CHUNKS, "chunks"),
    ):
        if not 1 <= count <= most:
            raise ArgumentError(f"cannot draw {count} {what}; choose 1 to {most}")
    schedule.check(ranks, microbatches, chunks)
    unit = _unit(schedule, times)
    timeline = simulate(schedule.plan(ranks, microbatches, chunks), chunks=chunks, times=times)
    columns = Fraction(timeline.makespan) / unit
    if columns > MAX_COLUMNS:
        raise ArgumentError(
            f"the table would be {columns} columns wide, for each is the durations' common unit, "
            f"{unit}; choose fewer microbatches, or durations that are small multiples of one unit"
        )
    report = verify(schedule.steps, ranks, microbatches, chunks)
    cut = f", {_count(chunks, 'chunk')} a rank" if schedule.chunked else ""
    return Drawing(
        title=f"{schedule.name} [{schedule.source}]: {_count(ranks, 'rank')}, "
        f"{_count(microbatches, 'microbatch', 'microbatches')}{cut}",
        ranks=ranks,
        timeline=timeline,
        unit=unit,
        legend=_legend(schedule, chunks),
        totals=[
            f"bubble: {_share(timeline.bubble)} of the time (formula "
            f"{_share(schedule.bubble(ranks, microbatches, chunks, times))})",
            *_memory_lines(schedule, report.memory, chunks),
        ],
    )


def draw_text(drawing: Drawing, *, width: int = 96) -> str:
    """Return the table as text: a row a rank, time across, at most `width` columns wide.

    What does not fit goes on in a second table, and so on.
    """
    head = len(f"rank {drawing.ranks - 1}  ")
    cell = _cell_width(drawing)
    units = drawing.columns(drawing.timeline.makespan)
    tables = -(-units // max(1, (width - head) // cell))
    per_table = -(-units // tables)  # tables of equal width
    rows = [_row(drawing, row, units, cell) for row in drawing.timeline.rows]
    lines = [drawing.title]
    for first in range(0, units, per_table):
        end = min(first + per_table, units)
        lines += ["", f"{'time':<{head}}{_axis(drawing, (first, end), cell)}".rstrip()]
        for rank, row in enumerate(rows):
            lines.append(f"{f'rank {rank}':<{head}}{row[first * cell : end * cell]}".rstrip())
    return "\n".join([*lines, "", drawing.legend, *drawing.totals])


def _cell_width(drawing: Drawing) -> int:
    """Return the fewest characters a unit in which every label fits, with a space after it."""
    return max(
        -(-(len(drawing.label(slot.instruction)) + 1) // drawing.columns(slot.end - slot.start))
        for row in drawing.timeline.rows
        for slot in row
    )


def _row(drawing: Drawing, slots: Sequence[Slot], units: int, cell: int) -> str:
    row, now = "", 0
    idle = f"{'·':<{cell}}"
    for slot in slots:
        start, end = drawing.columns(slot.start), drawing.columns(slot.end)
        label = drawing.label(slot.instruction)
        lasts = "─" if end - start > 1 else " "
        row += idle * (start - now) + label.ljust((end - start) * cell - 1, lasts) + " "
        now = end
    return row + idle * (units - now)


def _axis(drawing: Drawing, span: tuple[int, int], cell: int) -> str:
    """Return the times above a table, as often as they fit."""
    step = -(-10 // cell)
    axis = ""
    for column in range(span[0], span[1], step):
        axis += f"{number(column * drawing.unit):<{step * cell}}"
    return axis


def _unit(schedule: PipelineSchedule, times: Times) -> Fraction:
    """Return the longest time of which every duration is a multiple."""
    forward, b, w = (
        Fraction(time) for time in (times.forward, times.backward_input, times.backward_weight)
    )
    durations = (forward, b, w) if schedule.splits_backward else (forward, b + w)
    if min(durations) == 0:
        raise ArgumentError("cannot draw what takes no time; choose durations above 0")
    common = math.lcm(*(duration.denominator for duration in durations))
    return Fraction(math.gcd(*(int(duration * common) for duration in durations)), common)


def _legend(schedule: PipelineSchedule, chunks: int) -> str:
    back = "b3: its gradient of the input, w3: of the weights"
    legend = f"3: microbatch 3 forward, {back if schedule.splits_backward else 'b3: backward'}"
    if chunks > 1:
        legend += ", 3': through the rank's second chunk"
    return f"{legend}, ·: idle"


def _memory_lines(schedule: PipelineSchedule, memory: Sequence[Memory], chunks: int) -> list[str]:
    of = (
        f"stages' microbatches, a stage being 1/{chunks} of a rank"
        if chunks > 1
        else "microbatches"
    )
    lines = [f"in flight at most, by rank: {_list(held.in_flight for held in memory)} {of}"]
    if schedule.splits_backward:
        lines.append(
            f"of these with all activations: {_list(held.activations for held in memory)}; "
            f"the others wait for the gradient of the weights"
        )
    return lines


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _share(fraction: Fraction) -> str:
    return f"{fraction} = {float(fraction):.1%}" if fraction else "0"


def number(time: Time) -> str:
    """Return a time in short form."""
    return f"{float(time):g}"


def _count(number: int, what: str, plural: str | None = None) -> str:
    return f"{number} {what if number == 1 else plural or what + 's'}"
