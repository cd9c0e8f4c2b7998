"""All-reduce: every algorithm of hvdkit beside the MPI library's own and gloo, in one run.

    mpirun -n 2 python benchmarks/allreduce.py [--sizes 4 1KiB 64MiB] [--dtype float32] [--csv FILE]

Method: float sums in place, on buffers that were touched before.  For each size all candidates take
turns, after a warm-up; a turn is as many calls as fill some milliseconds, behind a barrier.  A
turn's time is that of the slowest rank; the median over the turns is shown, with the spread of the
middle half.  Each candidate's result is checked once, exactly (#wrong).  algbw is bytes over time;
busbw = algbw x 2(p-1)/p, which can be held against a link's or the memory's speed whatever p is.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mpi4py import MPI
from tqdm import tqdm

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.config import parse_bytes
from hvdkit.schedules.registry import ALGORITHMS
from hvdkit.transport.mpi import library_version

SIZES = ["4", "64", "1KiB", "16KiB", "64KiB", "256KiB", "1MiB", "4MiB", "16MiB", "64MiB"]

#: Reduces the array that it was made with, in place.
AllReduce = Callable[[], object]


@dataclass(frozen=True)
class Candidate:
    """One way to all-reduce: prepare it for a size, then call it."""

    name: str
    prepare: Callable[[int, np.dtype], tuple[np.ndarray, AllReduce]]


@dataclass(frozen=True)
class Result:
    """What was measured for one candidate at one size; seconds of one call."""

    ranks: int
    nbytes: int
    name: str
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
        return self.algbw * 2 * (self.ranks - 1) / self.ranks


def ours(algorithm: str) -> Candidate:
    def prepare(count: int, dtype: np.dtype) -> tuple[np.ndarray, AllReduce]:
        x = np.empty(count, dtype)
        return x, lambda: hvd.allreduce_(x, op=hvd.Sum, algorithm=algorithm)

    return Candidate(algorithm, prepare)


def ours_in_the_arena() -> Candidate:
    kept: dict[int, np.ndarray] = {}

    def prepare(count: int, dtype: np.dtype) -> tuple[np.ndarray, AllReduce]:
        x = kept.setdefault(count, hvd.empty(count, dtype))
        return x, lambda: hvd.allreduce_(x, op=hvd.Sum, algorithm="shm")

    return Candidate("shm, arena buffer", prepare)


def mpi_library(comm: MPI.Comm) -> Candidate:
    def prepare(count: int, dtype: np.dtype) -> tuple[np.ndarray, AllReduce]:
        x = np.empty(count, dtype)
        return x, lambda: comm.Allreduce(MPI.IN_PLACE, x, op=MPI.SUM)

    return Candidate("MPI library", prepare)


def gloo() -> Candidate:
    import torch
    import torch.distributed as dist

    if hvd.local_size() == hvd.size():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    host, port = "", 0
    if hvd.rank() == 0:
        host = "127.0.0.1" if hvd.local_size() == hvd.size() else socket.gethostname()
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
    host, port = hvd.broadcast_object((host, port))
    dist.init_process_group(
        "gloo", init_method=f"tcp://{host}:{port}", rank=hvd.rank(), world_size=hvd.size()
    )

    def prepare(count: int, dtype: np.dtype) -> tuple[np.ndarray, AllReduce]:
        x = np.empty(count, dtype)
        tensor = torch.from_numpy(x)
        return x, lambda: dist.all_reduce(tensor)

    return Candidate("gloo", prepare)


def candidates(algorithms: list[str], peers: list[str]) -> list[Candidate]:
    found = []
    arena = context().group.arena is not None
    for name in algorithms:
        if name == "arena":
            found += [ours_in_the_arena()] if arena else []
        elif name != "shm" or arena:
            found.append(ours(name))
    if "mpi" in peers:
        found.append(mpi_library(MPI.COMM_WORLD.Dup()))
    if "gloo" in peers:
        found.append(gloo())
    return found


def count_wrong(x: np.ndarray, call: AllReduce) -> int:
    """Return how many elements, on all ranks together, are not the exact sum."""
    pattern = np.arange(x.size) % 5
    x[:] = (pattern + hvd.rank()).astype(x.dtype)
    call()
    wanted = (pattern * hvd.size() + sum(range(hvd.size()))).astype(x.dtype)
    return int(hvd.allreduce(np.count_nonzero(x != wanted), op=hvd.Sum))


def measure(
    nbytes: int, dtype: np.dtype, everyone: list[Candidate], *, turns: int, turn_seconds: float
) -> list[Result]:
    """Return the results of all candidates at one size, in turns."""
    count = max(1, nbytes // dtype.itemsize)
    prepared = [candidate.prepare(count, dtype) for candidate in everyone]
    wrong, calls = [], []
    for x, call in prepared:
        wrong.append(count_wrong(x, call))
        x[:] = 0
        for _ in range(3):
            seconds = one_turn(call, 1)
        calls.append(int(np.clip(turn_seconds / max(slowest(seconds), 1e-7), 1, 2000)))
    times = np.empty((len(prepared), turns))
    for turn in range(turns):
        for number, (_, call) in enumerate(prepared):
            times[number, turn] = one_turn(call, calls[number])
    times = np.asarray(hvd.allreduce(times, op=hvd.Max))
    return [
        Result(
            ranks=hvd.size(),
            nbytes=count * dtype.itemsize,
            name=candidate.name,
            seconds=float(np.median(times[number])),
            low=float(np.quantile(times[number], 0.25)),
            high=float(np.quantile(times[number], 0.75)),
            wrong=wrong[number],
        )
        for number, candidate in enumerate(everyone)
    ]


def one_turn(call: AllReduce, calls: int) -> float:
    """Return this rank's seconds a call."""
    hvd.barrier()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def slowest(seconds: float) -> float:
    return float(hvd.allreduce(seconds, op=hvd.Max))


def human_size(nbytes: int) -> str:
    for limit, unit in ((2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= limit:
            return f"{nbytes / limit:g} {unit}"
    return f"{nbytes} B"


def human_time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms"


def show(results: list[Result]) -> None:
    """Print one table a size, the fastest first."""
    for nbytes in sorted({result.nbytes for result in results}):
        rows = sorted((r for r in results if r.nbytes == nbytes), key=lambda r: r.seconds)
        peers = {r.name: r.seconds for r in rows if r.name in ("MPI library", "gloo")}
        heads = "".join(f"{'x ' + name:>15}" for name in peers)
        print(f"\n{human_size(nbytes)} on {rows[0].ranks} ranks")
        columns = f"{'time':>11}{'middle half':>24}{'algbw':>9}{'busbw GB/s':>12}"
        print(f"  {'':<20}{columns}  #wrong{heads}")
        for r in rows:
            spread = f"{human_time(r.low)} - {human_time(r.high)}"
            ratios = "".join(f"{seconds / r.seconds:>15.2f}" for seconds in peers.values())
            print(
                f"  {r.name:<20}{human_time(r.seconds):>11}{spread:>24}"
                f"{r.algbw / 1e9:>9.3f}{r.busbw / 1e9:>12.3f}{r.wrong:>8}{ratios}"
            )


def show_summary(results: list[Result]) -> None:
    """Print the medians as one table in Markdown, and the bus bandwidth of the fastest."""
    names = list(dict.fromkeys(result.name for result in results))
    print(f"\n| bytes, {results[0].ranks} ranks | {' | '.join(names)} | best busbw | errors |")
    print(f"|---|{'---:|' * (len(names) + 2)}")
    for nbytes in sorted({result.nbytes for result in results}):
        rows = {result.name: result for result in results if result.nbytes == nbytes}
        best = min(rows.values(), key=lambda r: r.seconds)
        cells = [
            f"**{human_time(rows[n].seconds)}**" if n == best.name else human_time(rows[n].seconds)
            for n in names
        ]
        wrong = sum(result.wrong for result in rows.values())
        row = [human_size(nbytes), *cells, f"{best.busbw / 1e9:.3g} GB/s", str(wrong)]
        print(f"| {' | '.join(row)} |")


def show_machine() -> None:
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


def save(results: list[Result], path: Path) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                ["ranks", "bytes", "name", "seconds", "low", "high", "algbw", "busbw", "wrong"]
            )
        for r in results:
            writer.writerow(
                [r.ranks, r.nbytes, r.name, r.seconds, r.low, r.high, r.algbw, r.busbw, r.wrong]
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", default=[*map(parse_bytes, SIZES)], type=parse_bytes, metavar="BYTES"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    ways = ["arena", "shm", *ALGORITHMS["allreduce"]]
    parser.add_argument("--algorithms", nargs="+", default=ways, choices=ways)
    parser.add_argument("--peers", nargs="*", default=["mpi", "gloo"], choices=["mpi", "gloo"])
    parser.add_argument("--turns", type=int, default=21, help="measurements of each candidate")
    parser.add_argument("--turn-ms", type=float, default=3.0, help="length of a measurement")
    parser.add_argument("--csv", type=Path, help="append the figures to this file")
    args = parser.parse_args()

    hvd.init()
    everyone = candidates(args.algorithms, args.peers)
    if hvd.rank() == 0:
        show_machine()
    results: list[Result] = []
    bar = tqdm(args.sizes, unit="size", disable=hvd.rank() != 0)
    for nbytes in bar:
        bar.set_description(human_size(nbytes))
        results += measure(
            nbytes,
            np.dtype(args.dtype),
            everyone,
            turns=args.turns,
            turn_seconds=args.turn_ms / 1e3,
        )
    if hvd.rank() == 0:
        show(results)
        show_summary(results)
        if args.csv:
            save(results, args.csv)
    sys.exit(any(result.wrong for result in results))


if __name__ == "__main__":
    main()
