"""How everything is measured here.

For each size all candidates take turns (ours, peer, ours, peer ...) after a warm-up, so that a
machine that changes its speed changes it for all; in another order each time, as what one leaves in
the caches is found by the next.  A turn is as many calls as fill some milliseconds, behind a
barrier.  A turn's time is that of the slowest rank; the median over the turns is shown, with the
spread of the middle half.  Each candidate's result is checked once, exactly (#wrong).

What is sent is written anew before each call, as in training, where a call does not do so by
itself.  Else a rank that reads straight out of another's memory finds in its own cache what it read
the last time, and is two to four times as fast as it ever is on fresh data.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tables
from options import TURNS
from records import OURS, Result, Run, plain_name, save
from tables import human_size
from tqdm import tqdm

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.transport.mpi import library_version

#: A turn: long enough that its first call, to which ranks come one by one from the barrier, counts
#: for little.
TURN_SECONDS = 10e-3

#: Turns of each candidate before those that count, in which ranks learn what to expect.
WARM_UPS = 6

#: Packages whose versions are shown with the figures.
PACKAGES = ("numpy", "mpi4py", "torch", "tensorflow", "tensorflow-cpu", "keras", "horovod")

#: The call to time, a check that returns how many elements of this rank's result are wrong, and
#: perhaps what writes the input anew before each call, whose time does not count.
Prepared = (
    tuple[Callable[[], object], Callable[[], int]]
    | tuple[Callable[[], object], Callable[[], int], Callable[[], object]]
)


@dataclass(frozen=True)
class Candidate:
    """One way to do what is measured.

    Args:
        name: unique among those that take turns.
        prepare: makes buffers for so many bytes and returns what to call.
        kind: OURS, PEER or ROOF.
        notes: further figures, which the check may still add.
        smallest, largest: the bytes between which it takes part.
    """

    name: str
    prepare: Callable[[int], Prepared]
    kind: str = OURS
    smallest: int = 0
    largest: float = float("inf")
    notes: Mapping[str, float] = field(default_factory=dict)


def measure(
    what: str,
    nbytes: int,
    candidates: Iterable[Candidate],
    *,
    turns: int = TURNS,
    after_turn: Callable[[], object] = lambda: None,
) -> list[Result]:
    """Return the results of all candidates at one size, in turns.  Collective."""
    everyone = [c for c in candidates if c.smallest <= nbytes <= c.largest]
    calls, repeats, wrong = [], [], []
    for candidate in everyone:
        call, check, *anew = candidate.prepare(nbytes)
        calls.append((call, *anew))
        wrong.append(int(hvd.allreduce(check(), op=hvd.Sum)))
        repeats.append(1)
        for _ in range(WARM_UPS):  # the first calls are slow, and would make turns short
            seconds = float(hvd.allreduce(_turn(repeats[-1], *calls[-1]), op=hvd.Max))
            repeats[-1] = int(np.clip(TURN_SECONDS / max(seconds, 1e-7), 1, 2000))
    times = np.empty((len(calls), turns))
    orders = np.random.default_rng(0)  # the same on all ranks
    for turn in range(turns):
        for number in orders.permutation(len(calls)):
            times[number, turn] = _turn(repeats[number], *calls[number])
        after_turn()
    times = np.asarray(hvd.allreduce(times, op=hvd.Max))
    return [
        result(what, candidate.name, nbytes, mine, wrong=errors, of=candidate)
        for candidate, mine, errors in zip(everyone, times, wrong, strict=True)
    ]


def result(
    what: str,
    name: str,
    nbytes: int,
    samples: Iterable[float],
    *,
    wrong: int = 0,
    of: Candidate | None = None,
) -> Result:
    """Return a result of this job, of the kind and with the notes of the candidate."""
    return Result(
        mpi=mpi_name(),
        ranks=hvd.size(),
        what=what,
        name=name,
        nbytes=nbytes,
        samples=tuple(map(float, samples)),
        wrong=wrong,
        kind=of.kind if of else OURS,
        notes=dict(of.notes) if of else {},
    )


def _turn(
    repeats: int, call: Callable[[], object], anew: Callable[[], object] | None = None
) -> float:
    """Return this rank's seconds a call."""
    hvd.barrier()
    if anew is None:
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - began) / repeats
    seconds = 0.0
    for _ in range(repeats):
        anew()
        began = time.perf_counter()
        call()
        seconds += time.perf_counter() - began
    return seconds / repeats


def run(
    what: str, sizes: Iterable[int], candidates: list[Candidate], *, turns: int = TURNS
) -> list[Result]:
    """Measure every size, with a progress bar on rank 0.  Collective."""
    results: list[Result] = []
    everything = list(sizes)
    with progress(len(everything) * turns, "turn") as bar:
        for nbytes in everything:
            bar.set_description(f"{what} {human_size(nbytes)}")
            results += measure(what, nbytes, candidates, turns=turns, after_turn=bar.update)
    return results


def progress(total: int, unit: str) -> tqdm:
    """Return a progress bar, which only rank 0 shows."""
    return tqdm(total=total, unit=unit, disable=hvd.rank() != 0, mininterval=0.5)


# Where it was measured


def machine() -> dict[str, str]:
    """Return what the ranks run on.  Collective."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":")[1].strip() if models else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": cpu,
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": f"{memory:.0f} GiB",
        "system": platform.platform(),
        "nodes": str(len(set(hvd.allgather_object(platform.node())))),
    }


def versions() -> dict[str, str]:
    """Return the versions of what takes part."""
    found = {
        "hvdkit": f"{hvd.__version__}, {context().kernels.name}",
        "MPI": mpi_name(),
        "Python": platform.python_version(),
    }
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def show_machine() -> None:
    """Print the machine and the versions, on rank 0.  Collective."""
    here = machine()
    if hvd.rank() == 0:
        print(", ".join(f"{name} {version}" for name, version in versions().items()))
        print(", ".join(f"{name}: {text}" for name, text in here.items()))
        print(f"{hvd.size()} ranks, {hvd.local_size()} a node; {time.strftime('%Y-%m-%d %H:%M')}")


def mpi_name() -> str:
    """Return ``"Open MPI 5.0.11"`` or ``"MPICH 5.0.2"``."""
    return plain_name(library_version())


# The end


def keep(benchmark: str, results: list[Result], path: Path | None) -> None:
    """Save the figures, with where and when they were measured, on rank 0.  Collective."""
    here = machine()
    if path is not None and hvd.rank() == 0:
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        save(Run(benchmark, now, here, versions(), tuple(results)), path)


def report(benchmark: str, results: list[Result], path: Path | None) -> None:
    """On rank 0 print and save everything; on every rank end with status 1 if a result is wrong."""
    keep(benchmark, results, path)
    if hvd.rank() == 0:
        measurements = tables.by_measurement(results)
        for some in measurements:
            tables.show(some)
        for some in measurements:
            tables.show_summary(some)
    sys.exit(any(result.wrong for result in results))
