"""What the cost model and the simulator say of what was measured, by hvdkit's tuning file.

Both start from alpha, beta and gamma, which ``hvdkit tune`` has fitted to other measurements on
as many ranks.  What they say is held against these: the report shows by how much they are wrong.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
from plots import PREDICTED, Series, times_of
from records import PREDICTION, Result, Run, plain_name
from tables import by_measurement, human_size, sizes_of

from hvdkit.schedules.registry import ALGORITHMS
from hvdkit.simulation.collective import simulate
from hvdkit.simulation.network import Network
from hvdkit.tuning import Tuning, load
from hvdkit.tuning.estimates import Estimates
from hvdkit.tuning.file import default_path

#: What the model knows besides the schedules, by the name that a benchmark gives it.
OTHERS = {"allreduce": {"shm": "shm", "gathered": "gathered"}}

#: The logarithm of how many times as fast is clearly faster.
CLEARLY = math.log(1.1)


def tunings() -> tuple[Tuning, ...]:
    """Return what ``hvdkit tune`` has written where ``init`` reads it; nothing if it was not here.

    Raises:
        ConfigError: the file is none of hvdkit's.
    """
    path = Path(os.environ.get("HVDKIT_TUNING_FILE") or default_path(os.environ))
    return load(path) if path.is_file() else ()


def estimates_of(results: Sequence[Result], known: Iterable[Tuning]) -> Estimates | None:
    """Return what was fitted where a measurement was made, on one node; None: nothing was."""
    for tuning in known:
        world = tuning.world
        if world.nodes == (results[0].ranks,) and plain_name(world.library) == results[0].mpi:
            return Estimates(tuning, results[0].ranks)
    return None


def predicted(runs: Iterable[Run], known: Sequence[Tuning]) -> dict[tuple[str, int], list[Series]]:
    """Return the model's curves, of seconds over bytes, by measurement and number of ranks."""
    found: dict[tuple[str, int], list[Series]] = {}
    for run in runs:
        for some in by_measurement(run.results):
            what, estimates = some[0].what, estimates_of(some, known)
            if any(PREDICTION in r.notes for r in some):
                found[what, some[0].ranks] = noted(some)
            if what not in ALGORITHMS or estimates is None:
                continue
            ways = {name: name for name in ALGORITHMS[what]} | OTHERS.get(what, {})
            sizes = sizes_of(some)
            found[what, some[0].ranks] = [
                Series(
                    name,
                    sizes,
                    [estimates.modelled(what, ways[name], nbytes) for nbytes in sizes],
                    kind=PREDICTED,
                )
                for name in dict.fromkeys(r.name for r in some)
                if name in ways
            ]
    return found


def noted(results: Sequence[Result]) -> list[Series]:
    """Return the curves that were predicted where the measurement was made."""
    found = []
    for name in dict.fromkeys(r.name for r in results if PREDICTION in r.notes):
        rows = sorted((r for r in results if r.name == name), key=lambda r: r.nbytes)
        columns = zip(*((r.nbytes, r.notes[PREDICTION]) for r in rows), strict=True)
        found.append(Series(name, *columns, kind=PREDICTED))
    return found


def crossing(first: Series, second: Series) -> float | None:
    """Return from which size on `second` is the faster one; None if it is not `first` at first.

    Between two sizes by a straight line on logarithmic scales.  Where one is not clearly faster at
    its end of the common sizes, there is nothing to cross.
    """
    sizes = sorted({*first.x} & {*second.x})
    times = [dict(zip(s.x, s.y, strict=True)) for s in (first, second)]
    ahead = [math.log(times[1][n] / times[0][n]) for n in sizes]  # above 0: `first` is faster
    if len(sizes) < 2 or ahead[0] < CLEARLY or ahead[-1] > -CLEARLY:
        return None
    place = next(i for i, lead in enumerate(ahead) if lead <= 0)
    share = ahead[place - 1] / (ahead[place - 1] - ahead[place])
    return float(sizes[place - 1] * (sizes[place] / sizes[place - 1]) ** share)


def crossings_of(results: Sequence[Result]) -> list[list[str]]:
    """Return a row for each pair of algorithms of which one is faster short and one long.

    Where that is by the measurement, and where by the model.
    """
    curves = {s.name: s for s in noted(results)}
    measured = {s.name: s for s in times_of(results, lambda r: r.nbytes)}
    rows = []
    for short, long in permutations(curves, 2):
        found = crossing(measured[short], measured[long]), crossing(curves[short], curves[long])
        if any(found):
            cells = ["never" if n is None else human_size(round(n)) for n in found]
            times = f"{found[1] / found[0]:.2g}" if all(found) else ""
            rows.append([short, long, *cells, times])
    return rows


def choices_of(results: Sequence[Result]) -> list[list[str]]:
    """Return a row for each size: what was fastest, what should have been, and what that costs.

    Between the algorithms that the model knows.  The last cell is the measured time of its choice,
    over the least measured one.
    """
    curves = {s.name: dict(zip(s.x, s.y, strict=True)) for s in noted(results)}
    rows = []
    for nbytes in sizes_of(results):
        at = {r.name: r.seconds for r in results if r.nbytes == nbytes and r.name in curves}
        if len(at) > 1:
            best = min(at, key=at.__getitem__)
            chosen = min(at, key=lambda name: curves[name][nbytes])
            rows.append([human_size(nbytes), best, chosen, f"{at[chosen] / at[best]:.2f}"])
    return rows


def simulated_seconds(estimates: Estimates, what: str, name: str, nbytes: int) -> float:
    """Return the seconds of a schedule as it is played on the ranks, and of the check before it."""
    network = Network(
        size=estimates.size,
        machine=estimates.messages(name, nbytes),
        segment_bytes=estimates.segment_bytes(nbytes),
    )
    seconds = simulate(name, nbytes, network, collective=what).seconds
    return seconds + estimates.check_seconds()


def errors_of(results: Sequence[Result], estimates: Estimates) -> list[list[str]]:
    """Return a row for each schedule: by how much the simulation was off at each size.

    The last cell is the median of the errors' sizes.
    """
    what, rows = results[0].what, []
    for name in ALGORITHMS[what]:
        measured = {r.nbytes: r.seconds for r in results if r.name == name}
        if measured:
            off = {
                nbytes: simulated_seconds(estimates, what, name, nbytes) / seconds - 1
                for nbytes, seconds in measured.items()
            }
            cells = [f"{100 * off[n]:+.0f} %" if n in off else "" for n in sizes_of(results)]
            rows.append([name, *cells, f"{100 * np.median(np.abs(list(off.values()))):.0f} %"])
    return rows


def heads_of(results: Sequence[Result]) -> list[str]:
    """Return the heads of the rows of `errors_of`."""
    return ["", *map(human_size, sizes_of(results)), "median"]
