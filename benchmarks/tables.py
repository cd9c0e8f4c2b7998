"""The figures as tables on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from records import PEER, ROOF, Result


def human_size(nbytes: int) -> str:
    for limit, unit in ((2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= limit:
            return f"{nbytes / limit:.4g} {unit}"
    return f"{nbytes} B"


def human_time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def human_range(low: float, high: float) -> str:
    """Return both ends of a time; a dash if nothing is known of it."""
    return f"{human_time(low)} - {human_time(high)}" if math.isfinite(high) else "-"


def gigabytes(bandwidth: float | None) -> str:
    """Return a bandwidth in GB/s; a dash for none."""
    return "-" if bandwidth is None else f"{bandwidth / 1e9:.3g}"


def by_measurement(results: Iterable[Result]) -> list[list[Result]]:
    """Return the results of each MPI, number of ranks and measurement, in the order measured."""
    found: dict[tuple[str, int, str], list[Result]] = {}
    for result in results:
        found.setdefault((result.mpi, result.ranks, result.what), []).append(result)
    return list(found.values())


def sizes_of(results: Iterable[Result]) -> list[int]:
    return sorted({result.nbytes for result in results})


def show(results: Sequence[Result]) -> None:
    """Print one table a size, the fastest first: ratios to the peers, percentage of the roofs."""
    for nbytes in sizes_of(results):
        rows = sorted((r for r in results if r.nbytes == nbytes), key=lambda r: r.seconds)
        peers = [r for r in rows if r.kind == PEER]
        roofs = [r for r in rows if r.kind == ROOF]
        print(f"\n{rows[0].what}, {human_size(nbytes)}, {rows[0].ranks} ranks")
        notes = list(dict.fromkeys(note for r in rows for note in r.notes))
        columns = [f"x {p.name}" for p in peers] + [f"% {roof.name}" for roof in roofs] + notes
        widths = [max(11, len(column) + 2) for column in columns]
        heads = "".join(f"{c:>{width}}" for c, width in zip(columns, widths, strict=True))
        indent = max(20, *(len(r.name) + 2 for r in rows))
        print(
            f"  {'':<{indent}}{'time':>11}{'middle half':>24}{'algbw':>9}{'busbw GB/s':>12}  #wrong"
            + heads
        )
        for r in rows:
            cells = [f"{peer.seconds / r.seconds:.2f}" for peer in peers]
            cells += [f"{100 * roof.seconds / r.seconds:.0f}" for roof in roofs]
            cells += [f"{r.notes[note]:.3g}" if note in r.notes else "" for note in notes]
            print(
                f"  {r.name:<{indent}}{human_time(r.seconds):>11}{human_range(r.low, r.high):>24}"
                f"{gigabytes(r.algbw):>9}{gigabytes(r.busbw):>12}{r.wrong:>8}"
                + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            )


def show_summary(results: Sequence[Result]) -> None:
    """Print the medians as one table in Markdown, and the bandwidths of the fastest, in GB/s."""
    names = list(dict.fromkeys(result.name for result in results))
    title = f"{results[0].what}, {results[0].ranks} ranks, {results[0].mpi}"
    print(f"\n| {title} | {' | '.join(names)} | algbw | busbw | errors |")
    print(f"|---|{'---:|' * (len(names) + 3)}")
    for nbytes in sizes_of(results):
        rows = {result.name: result for result in results if result.nbytes == nbytes}
        best = min((r for r in rows.values() if r.kind != ROOF), key=lambda r: r.seconds)
        times = {name: human_time(r.seconds) for name, r in rows.items()}
        times[best.name] = f"**{times[best.name]}**"
        wrong = sum(result.wrong for result in rows.values())
        speeds = [gigabytes(best.algbw), gigabytes(best.busbw)]
        row = [human_size(nbytes), *(times.get(name, "") for name in names), *speeds, str(wrong)]
        print(f"| {' | '.join(row)} |")
