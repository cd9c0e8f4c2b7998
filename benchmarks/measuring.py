"""How everything is measured here, shown and kept.

For each size all candidates take turns (ours, peer, ours, peer ...) after a warm-up, so that a
machine that changes its speed changes it for all.  A turn is as many calls as fill some
milliseconds, behind a barrier.  A turn's time is that of the slowest rank; the median over the
turns is shown, with the spread of the middle half.  Each candidate's result is checked once,
exactly (#wrong).
"""

from __future__ import annotations

import csv
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.transport.mpi import library_version

#: Whom ratios are shown against.
PEERS = ("MPI library", "gloo")

TURNS = 21
TURN_SECONDS = 3e-3

#: The call to time, and a check that returns how many elements of this rank's result are wrong.
Prepared = tuple[Callable[[], object], Callable[[], int]]


@dataclass(frozen=True)
class Candidate:
    """One way to do what is measured: `prepare(nbytes)` makes buffers and returns what to call."""

    name: str
    prepare: Callable[[int], Prepared]


@dataclass(frozen=True)
class Result:
    """What was measured for one candidate at one size; seconds of one call."""

    mpi: str
    ranks: int
    what: str
    name: str
    nbytes: int
    seconds: float
    low: float
    high: float
    wrong: int

    @property
    def algbw(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds

    @property
    def busbw(self) -> float:
        """algbw x 2(p-1)/p for an all-reduce, x (p-1)/p for the others, x 1 for a broadcast."""
        share = (self.ranks - 1) / self.ranks
        by_collective = {"allgather": share, "reducescatter": share, "alltoall": share}
        return self.algbw * (by_collective | {"broadcast": 1.0}).get(self.what, 2 * share)


def measure(
    what: str, nbytes: int, candidates: Iterable[Candidate], *, turns: int = TURNS
) -> list[Result]:
    """Return the results of all candidates at one size, in turns.  Collective."""
    names, calls, repeats, wrong = [], [], [], []
    for candidate in candidates:
        call, check = candidate.prepare(nbytes)
        names.append(candidate.name)
        calls.append(call)
        wrong.append(int(hvd.allreduce(check(), op=hvd.Sum)))
        for _ in range(3):
            seconds = float(hvd.allreduce(_turn(call, 1), op=hvd.Max))
        repeats.append(int(np.clip(TURN_SECONDS / max(seconds, 1e-7), 1, 2000)))
    times = np.empty((len(calls), turns))
    for turn in range(turns):
        for number, call in enumerate(calls):
            times[number, turn] = _turn(call, repeats[number])
    times = np.asarray(hvd.allreduce(times, op=hvd.Max))
    return [
        Result(
            mpi=mpi_name(),
            ranks=hvd.size(),
            what=what,
            name=name,
            nbytes=nbytes,
            seconds=float(np.median(times[number])),
            low=float(np.quantile(times[number], 0.25)),
            high=float(np.quantile(times[number], 0.75)),
            wrong=wrong[number],
        )
        for number, name in enumerate(names)
    ]


def _turn(call: Callable[[], object], repeats: int) -> float:
    """Return this rank's seconds a call."""
    hvd.barrier()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def run(
    what: str, sizes: Iterable[int], candidates: list[Candidate], *, turns: int = TURNS
) -> list[Result]:
    """Measure every size, with a progress bar on rank 0.  Collective."""
    results: list[Result] = []
    bar = tqdm(sizes, unit="size", disable=hvd.rank() != 0)
    for nbytes in bar:
        bar.set_description(f"{what} {human_size(nbytes)}")
        results += measure(what, nbytes, candidates, turns=turns)
    return results


def show(results: list[Result]) -> None:
    """Print one table a size, the fastest first, with the ratios to the peers."""
    for nbytes in sorted({result.nbytes for result in results}):
        rows = sorted((r for r in results if r.nbytes == nbytes), key=lambda r: r.seconds)
        against = {r.name: r.seconds for r in rows if r.name in PEERS}
        print(f"\n{rows[0].what}, {human_size(nbytes)}, {rows[0].ranks} ranks")
        columns = f"{'time':>11}{'middle half':>24}{'algbw':>9}{'busbw GB/s':>12}  #wrong"
        heads = "".join(f"{'x ' + name:>15}" for name in against)
        print(f"  {'':<20}{columns}{heads}")
        for r in rows:
            spread = f"{human_time(r.low)} - {human_time(r.high)}"
            ratios = "".join(f"{seconds / r.seconds:>15.2f}" for seconds in against.values())
            print(
                f"  {r.name:<20}{human_time(r.seconds):>11}{spread:>24}"
                f"{r.algbw / 1e9:>9.3f}{r.busbw / 1e9:>12.3f}{r.wrong:>8}{ratios}"
            )


def show_summary(results: list[Result]) -> None:
    """Print the medians as one table in Markdown, and the bandwidths of the fastest, in GB/s."""
    names = list(dict.fromkeys(result.name for result in results))
    title = f"{results[0].what}, {results[0].ranks} ranks, {results[0].mpi}"
    print(f"\n| {title} | {' | '.join(names)} | algbw | busbw | errors |")
    print(f"|---|{'---:|' * (len(names) + 3)}")
    for nbytes in sorted({result.nbytes for result in results}):
        rows = {result.name: result for result in results if result.nbytes == nbytes}
        best = min(rows.values(), key=lambda r: r.seconds)
        cells = [
            f"**{human_time(rows[n].seconds)}**" if n == best.name else human_time(rows[n].seconds)
            for n in names
        ]
        wrong = sum(result.wrong for result in rows.values())
        speeds = [f"{best.algbw / 1e9:.3g}", f"{best.busbw / 1e9:.3g}"]
        row = [human_size(nbytes), *cells, *speeds, str(wrong)]
        print(f"| {' | '.join(row)} |")


def show_machine() -> None:
    """Print the machine and the versions."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":")[1].strip() if models else cpu
    print(
        f"hvdkit {hvd.__version__}, {context().kernels.name}; {library_version()}; "
        f"Python {platform.python_version()}, numpy {np.__version__}\n"
        f"{cpu}, {os.cpu_count()} cores, {platform.platform()}\n"
        f"{hvd.size()} ranks, {hvd.local_size()} a node; {time.strftime('%Y-%m-%d %H:%M')}"
    )


def mpi_name() -> str:
    """Return ``"Open MPI 5.0.11"`` or ``"MPICH 5.0.2"``."""
    return " ".join(library_version().replace("Version:", "").replace(" v", " ").split())


def save(results: list[Result], path: Path) -> None:
    """Append the figures to a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*Result.__annotations__, "algbw", "busbw"])
        if new:
            writer.writeheader()
        for result in results:
            writer.writerow(asdict(result) | {"algbw": result.algbw, "busbw": result.busbw})


def load(path: Path) -> list[Result]:
    """Read figures that `save` wrote."""
    with path.open(newline="") as file:
        return [
            Result(
                mpi=row["mpi"],
                ranks=int(row["ranks"]),
                what=row["what"],
                name=row["name"],
                nbytes=int(row["nbytes"]),
                seconds=float(row["seconds"]),
                low=float(row["low"]),
                high=float(row["high"]),
                wrong=int(row["wrong"]),
            )
            for row in csv.DictReader(file)
        ]


def report(results: list[Result], path: Path | None) -> None:
    """On rank 0 print and save everything; on every rank end with status 1 if a result is wrong."""
    if hvd.rank() == 0:
        by_collective = [
            [result for result in results if result.what == what]
            for what in dict.fromkeys(result.what for result in results)
        ]
        for some in by_collective:
            show(some)
        for some in by_collective:
            show_summary(some)
        if path:
            save(results, path)
    sys.exit(any(result.wrong for result in results))


def human_size(nbytes: int) -> str:
    for limit, unit in ((2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= limit:
            return f"{nbytes / limit:g} {unit}"
    return f"{nbytes} B"


def human_time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
