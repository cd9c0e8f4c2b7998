"""What was measured, and where: kept as JSON, and as CSV beside it.

    {"format": "hvdkit benchmark 1",
     "runs": [{"benchmark": "allreduce", "date": "2026-11-21T23:40:00+00:00",
               "machine": {...}, "versions": {...}, "results": [{...}, ...]}, ...]}

A run is one mpirun of one benchmark.  Saved into a file that is there, it takes the place of what
the file holds of the same MPI, number of ranks and measurements.  Nothing here knows of MPI.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from noise import median_interval

from hvdkit.errors import HvdkitError

FORMAT = "hvdkit benchmark 1"

#: What a candidate is: ours, someone else's, or a limit of the machine.
OURS, PEER, ROOF = "ours", "peer", "roof"


#: The note that has the seconds by the cost model, fitted where the measurement was made.
PREDICTION = "predicted, s"

#: The note that has the bytes of a bucket, and the names of what chose them, where nobody did.
BUCKET = "bucket bytes"
DEFAULT, TUNED = "default", "tuned"


class ReportError(HvdkitError):
    """A file is not what the benchmarks saved."""


def bus_factor(collective: str, ranks: int) -> float | None:
    """Return what algbw is multiplied by for the bus bandwidth; None for what is no collective.

    [NVIDIA, nccl-tests, doc/PERFORMANCE.md]: the bytes that each rank must send, and receive, for
    each byte of the message, which is the whole one (what an all-gather returns, what a
    reduce-scatter is given).
    """
    share = (ranks - 1) / ranks
    factors = {
        "allreduce": 2 * share,
        "allgather": share,
        "reducescatter": share,
        "alltoall": share,
        "gather": share,
        "scatter": share,
        "broadcast": 1.0,
        "reduce": 1.0,
        "sendrecv": 1.0,
    }
    return factors.get(collective)


def plain_name(library: str) -> str:
    """Return ``"Open MPI 5.0.11"`` or ``"MPICH 5.0.2"`` of what the library calls itself."""
    return " ".join(library.replace("Version:", "").replace(" v", " ").split())


@dataclass(frozen=True)
class Result:
    """What was measured for one candidate at one size.

    Args:
        mpi: the MPI library and its version.
        ranks: how many there were.
        what: the measurement; a collective's name, perhaps with a comma and more behind it.
        name: the candidate's.
        nbytes: of the message, or of all gradients of a step.
        samples: seconds of one call, by turn, of the slowest rank.
        wrong: elements that were wrong.
        kind: OURS, PEER or ROOF.
        notes: further figures, by name.
    """

    mpi: str
    ranks: int
    what: str
    name: str
    nbytes: int
    samples: tuple[float, ...]
    wrong: int
    kind: str = OURS
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The median."""
        return float(np.median(self.samples))

    @property
    def low(self) -> float:
        """The lower quartile."""
        return float(np.quantile(self.samples, 0.25))

    @property
    def high(self) -> float:
        """The upper quartile."""
        return float(np.quantile(self.samples, 0.75))

    @property
    def interval(self) -> tuple[float, float]:
        """Where the median is with 95 % confidence."""
        return median_interval(self.samples)

    @property
    def algbw(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds

    @property
    def busbw(self) -> float | None:
        """Bus bandwidth in bytes a second; None for what is no collective."""
        factor = bus_factor(self.what.partition(",")[0], self.ranks)
        return None if factor is None else self.algbw * factor

    @property
    def key(self) -> tuple[str, int, str, str, int]:
        """What two runs' figures are matched by."""
        return self.mpi, self.ranks, self.what, self.name, self.nbytes


@dataclass(frozen=True)
class Run:
    """The results of one mpirun.

    Args:
        benchmark: ``"allreduce"`` and the like.
        date: ISO 8601, with the time zone.
        machine: what it ran on, by name.
        versions: of what took part, by name.
        results: in the order in which they were measured.
    """

    benchmark: str
    date: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    results: tuple[Result, ...]


def save(run: Run, path: Path) -> None:
    """Put a run into a JSON file, in the place of an earlier one, and all of it into a CSV file."""
    replaced = {(r.mpi, r.ranks, r.what) for r in run.results}
    kept = []
    for old in load(path) if path.exists() else []:
        rest = tuple(r for r in old.results if (r.mpi, r.ranks, r.what) not in replaced)
        if rest:
            kept.append(replace(old, results=rest))
    runs = [*kept, run]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, "runs": [_plain(r) for r in runs]}, indent=1))
    _save_csv(runs, path.with_suffix(".csv"))


def load(path: Path) -> list[Run]:
    """Read what `save` wrote: a file, or all of a folder's.

    Raises:
        ReportError: it is missing, or something else.
    """
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise ReportError(f"{path} has no figures: run a benchmark with --out {path}/NAME.json")
        return [run for file in files for run in load(file)]
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ReportError(f"{path} has the format {content['format']!r}, not {FORMAT!r}")
        return [_run(entry) for entry in content["runs"]]
    except OSError as exc:
        raise ReportError(f"cannot read {path}: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise ReportError(
            f"{path} is not what a benchmark saves ({type(exc).__name__}: {exc}); measure again, "
            "or give another file"
        ) from exc


def load_results(path: Path) -> list[Result]:
    """Read the results of all runs in a file."""
    return [result for run in load(path) for result in run.results]


def _plain(run: Run) -> dict[str, Any]:
    plain = asdict(run)
    for entry in plain["results"]:
        entry["samples"] = [float(f"{seconds:.5g}") for seconds in entry["samples"]]
    return plain


def _run(entry: dict[str, Any]) -> Run:
    results = tuple(
        Result(**{**result, "samples": tuple(float(s) for s in result["samples"])})
        for result in entry["results"]
    )
    if any(not r.samples or min(r.samples) <= 0 for r in results):
        raise ValueError("a result without times")
    return Run(**{**entry, "results": results})


def _save_csv(runs: Sequence[Run], path: Path) -> None:
    columns = ["benchmark", "date", "mpi", "ranks", "what", "name", "kind", "nbytes", "seconds"]
    columns += ["low", "high", "interval_low", "interval_high", "turns", "algbw", "busbw", "wrong"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "notes"])
        for run in runs:
            for r in run.results:
                row: list[object] = [run.benchmark, run.date, r.mpi, r.ranks, r.what, r.name]
                row += [r.kind, r.nbytes, r.seconds, r.low, r.high, *r.interval, len(r.samples)]
                row += [r.algbw, "" if r.busbw is None else r.busbw, r.wrong]
                writer.writerow([*row, "; ".join(f"{k} {v:g}" for k, v in r.notes.items())])
