"""Compare two sets of figures: what is slower, beyond the noise?

    python benchmarks/compare.py OLD NEW [--least 1.05]

OLD and NEW are JSON files of the benchmarks, or folders of them.  Where a peer was measured in both
runs, what is compared is the ratio to it, turn by turn, so that a machine that was slower as a
whole does not count; else it is the time.  A regression is marked if all of this holds:

1. the intervals of the two medians do not overlap, with a confidence that lets one run of all
   comparisons in twenty err at most;
2. the medians differ by more than figures drift from one run to the next, which is taken from what
   nobody changed, peers and roofs, in the same two runs;
3. they differ by the factor --least.

The exit status is 1 if there is a regression or a wrong result, 2 if the figures cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from noise import allowance, drift, median_interval, paired_ratios, shared_confidence, slower
from records import OURS, PEER, ReportError, Result, Run, load
from tables import human_size, human_time

#: Differences below this factor are nobody's concern.
LEAST = 1.05

#: The deviation that is taken where nothing shows by how much figures drift.
USUAL_DRIFT = 0.05

Key = tuple[str, str, int, str, str, int]
Figures = Mapping[Key, Result]


@dataclass(frozen=True)
class Change:
    """A figure in both runs.

    Args:
        key: of the figure: benchmark, MPI, ranks, what, name, bytes.
        old, new: the results.
        peer: whose time both are divided by; empty if they are not.
        ratio: new over old; above 1 is slower.
        verdict: "slower", "faster", "same", or "too few turns" to tell.
    """

    key: Key
    old: Result
    new: Result
    peer: str
    ratio: float
    verdict: str


def figures_of(runs: Iterable[Run]) -> dict[Key, Result]:
    """Return the last figure of each key."""
    return {(run.benchmark, *r.key): r for run in runs for r in run.results}


def changes(old: Figures, new: Figures, *, least: float = LEAST) -> list[Change]:
    """Return what has become of every figure of ours that is in both."""
    both = [key for key in new if key in old and new[key].kind == OURS]
    confidence = shared_confidence(len(both))
    found = []
    for key in both:
        before, after, peer = _against_peer(key, old, new)
        deviation = _drift_beside(key, peer, old, new)
        factor = max(least, allowance(deviation, confidence))
        if slower(before, after, confidence=confidence, least=factor):
            verdict = "slower"
        elif slower(after, before, confidence=confidence, least=factor):
            verdict = "faster"
        elif any(median_interval(s, confidence)[0] == 0.0 for s in (before, after)):
            verdict = "too few turns"
        else:
            verdict = "same"
        ratio = float(np.median(after) / np.median(before))
        found.append(Change(key, old[key], new[key], peer, ratio, verdict))
    return found


def _against_peer(
    key: Key, old: Figures, new: Figures
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Return both runs' samples, over the peer's where both have one, and the peer's name."""
    for other in old:
        if _beside(other, key) and old[other].kind == PEER and other in new:
            pairs = [(runs[key].samples, runs[other].samples) for runs in (old, new)]
            if all(len(ours) == len(peers) for ours, peers in pairs):
                before, after = (paired_ratios(*pair) for pair in pairs)
                return before, after, other[4]
    return old[key].samples, new[key].samples, ""


def _beside(other: Key, key: Key) -> bool:
    """Return whether two figures took turns: all but the names are the same."""
    return (*other[:4], other[5]) == (*key[:4], key[5])


def _drift_beside(key: Key, peer: str, old: Figures, new: Figures) -> float:
    """Return the drift of what nobody changed in the same measurement, over the same peer."""
    moved = []
    for other in old:
        if other[:4] != key[:4] or other not in new or OURS in (old[other].kind, new[other].kind):
            continue
        if other[4] == peer:
            continue  # over itself it is 1
        change = new[other].seconds / old[other].seconds
        by = (*other[:4], peer, other[5])
        if peer and by in old and by in new:
            change /= new[by].seconds / old[by].seconds
        moved.append(change)
    deviation = drift(moved)
    return USUAL_DRIFT if deviation is None else deviation


def show(found: list[Change], old: Figures, new: Figures) -> None:
    """Print what has changed, and what cannot be compared."""
    counts = {v: sum(c.verdict == v for c in found) for v in ("slower", "faster", "same")}
    print(f"{len(found)} figures: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    unclear = sum(c.verdict == "too few turns" for c in found)
    if unclear:
        print(f"{unclear} with too few turns to tell: measure with more --turns")
    marked = [c for c in found if c.verdict in ("slower", "faster")]
    if marked:
        print("\n| | old | new | over | new / old | |\n|---|---:|---:|---|---:|---|")
    for c in sorted(marked, key=lambda c: -c.ratio):
        benchmark, mpi, ranks, what, name, nbytes = c.key
        title = f"{benchmark}: {what}, {name}, {human_size(nbytes)}, {ranks} ranks, {mpi}"
        times = f"{human_time(c.old.seconds)} | {human_time(c.new.seconds)}"
        mark = "**regression**" if c.verdict == "slower" else "faster"
        print(f"| {title} | {times} | {c.peer or 'nothing'} | {c.ratio:.2f} | {mark} |")
    for runs, others, where in ((old, new, "OLD"), (new, old, "NEW")):
        alone = sum(r.kind == OURS and key not in others for key, r in runs.items())
        if alone:
            print(f"\n{alone} figures are in {where} only.")


def show_settings(old: Iterable[Run], new: Iterable[Run]) -> None:
    """Print in what the machines and the versions differ."""
    for title in ("machine", "versions"):
        ours, theirs = (
            {(name, text) for run in runs for name, text in getattr(run, title).items()}
            for runs in (old, new)
        )
        for name in sorted({name for name, _ in ours ^ theirs}):
            before, after = (
                ", ".join(sorted(text for n, text in both if n == name)) or "none"
                for both in (ours, theirs)
            )
            print(f"{title} differ: {name}: {before} -> {after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument(
        "--least", type=float, default=LEAST, help=f"factor that counts, default {LEAST}"
    )
    args = parser.parse_args()
    try:
        before, after = load(args.old), load(args.new)
    except ReportError as exc:
        print(exc, file=sys.stderr)
        return 2
    show_settings(before, after)
    old, new = figures_of(before), figures_of(after)
    found = changes(old, new, least=args.least)
    show(found, old, new)
    wrong = [key for key, result in new.items() if result.wrong]
    for key in wrong:
        print(f"wrong result: {', '.join(map(str, key))}")
    return int(bool(wrong) or any(c.verdict == "slower" for c in found))


if __name__ == "__main__":
    sys.exit(main())
