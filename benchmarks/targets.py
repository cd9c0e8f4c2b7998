"""Which targets are met, from the figures that the other benchmarks saved.

    python benchmarks/targets.py [FOLDER [BENCHMARK ...]]

Each ratio is of two times taken in turns in one run.  The peer is the faster of the MPI libraries
that were measured: a target is met only if it is met against each of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from records import BUCKET, DEFAULT, TUNED, Result, load_results
from tables import human_size

from hvdkit.schedules.registry import ALGORITHMS

KIB, MIB = 2**10, 2**20

#: Bytes: times as fast as the MPI library, on ordinary buffers and on buffers in the arena.
ALLREDUCE_ON_2_RANKS = {
    4: (1.0, 1.0),
    64: (1.0, 1.0),
    KIB: (1.0, 1.0),
    4 * KIB: (1.0, 1.0),
    64 * KIB: (1.5, 3.0),
    MIB: (1.5, 4.0),
    16 * MIB: (1.5, 3.0),
    64 * MIB: (3.0, 5.0),
}

#: Times as fast as the float32 sum of as many bytes: 16-bit floats, and everything else.
SIXTEEN_BIT, OTHER_DTYPES = 1.0, 0.9

#: A training step's communication takes at most so many times what the memory could do.
STEP_OVER_ROOF = 1.3

#: Times as fast as gloo.
TORCH_OVER_GLOO = {
    "named allreduce": 10.0,
    "60 asynchronous allreduces": 15.0,
    "step of a CNN": 1.0,
    "step of a GPT": 1.0,
}


#: What "auto" picks is as fast as the fastest fixed choice, or nearly; so are the buckets.
AUTO_OVER_BEST = 0.9

#: Share of a step that may be neither the step alone nor the core's all-reduce of as many bytes.
TENSORFLOW_OVERHEAD = 0.2


#: Seconds that the sleeping stages of bench-pipeline sleep on a rank in a step.
SLEEPING_WORK = 8 * 3 * 0.02

#: By how much of a step a measured bubble may be longer than its formula says.
BUBBLE_POINTS = 0.05


def latest(results: list[Result], ranks: int) -> dict[tuple[str, str, str, int], Result]:
    """Return the last figure of each (MPI, collective, name, bytes) on `ranks` ranks."""
    return {(r.mpi, r.what, r.name, r.nbytes): r for r in results if r.ranks == ranks}


def ratios(
    figures: dict[tuple[str, str, str, int], Result], what: str, name: str, peer: str, nbytes: int
) -> dict[str, float]:
    """Return by MPI how many times as fast `name` is as `peer`."""
    found = {}
    for mpi in sorted({key[0] for key in figures}):
        ours, theirs = (figures.get((mpi, what, n, nbytes)) for n in (name, peer))
        if ours is not None and theirs is not None:
            found[mpi] = theirs.seconds / ours.seconds
    return found


def line(title: str, found: dict[str, float], target: float) -> str:
    """Return a row of a Markdown table; empty if nothing was measured."""
    if not found:
        return ""
    measured = ", ".join(f"{mpi} {ratio:.2f}" for mpi, ratio in found.items())
    verdict = "met" if min(found.values()) >= target else "missed"
    return f"| {title} | {target:g} | {measured} | {verdict} |"


def heading(title: str) -> None:
    print(f"\n| {title} | target | measured | |\n|---|---:|---|---|")


def show(rows: list[str]) -> None:
    print("\n".join(row for row in rows if row))


def show_allreduce(results: list[Result]) -> None:
    figures = latest(results, 2)
    heading("all-reduce, 2 ranks, times as fast as the MPI library")
    for place, (name, where) in enumerate((("shm", "ordinary buffers"), ("arena", "arena"))):
        for nbytes, targets in ALLREDUCE_ON_2_RANKS.items():
            found = ratios(figures, "allreduce", name, "MPI library", nbytes)
            show([line(f"{human_size(nbytes)}, {where}", found, targets[place])])
    figures = latest(results, 4)
    heading("all-reduce, 4 ranks, times as fast as the MPI library")
    for nbytes in sorted({key[3] for key in figures}):
        found = ratios(figures, "allreduce", "shm", "MPI library", nbytes)
        show([line(f"{human_size(nbytes)}, ordinary buffers", found, 1.0)])

    show_auto(results)


def show_auto(results: list[Result]) -> None:
    """Show how "auto" does beside the best of the algorithms that it can choose from."""
    for ranks in sorted({r.ranks for r in results}):
        figures = latest(results, ranks)
        heading(f"all-reduce, {ranks} ranks, auto over the fastest fixed choice")
        choices = {key[2] for key in figures} & {"shm", "gathered", *ALGORITHMS["allreduce"]}
        for nbytes in sorted({key[3] for key in figures}):
            found: dict[str, float] = {}
            for name in choices:
                for mpi, ratio in ratios(figures, "allreduce", "auto", name, nbytes).items():
                    found[mpi] = min(ratio, found.get(mpi, ratio))
            show([line(human_size(nbytes), found, AUTO_OVER_BEST)])


def show_collectives(results: list[Result]) -> None:
    figures = latest(results, 2)
    heading("other collectives, 2 ranks, times as fast as the MPI library")
    for what in dict.fromkeys(key[1] for key in figures):
        for nbytes in sorted({key[3] for key in figures if key[1] == what}):
            found = ratios(figures, what, "hvdkit", "MPI library", nbytes)
            show([line(f"{what}, {human_size(nbytes)}", found, 1.0)])


def show_dtypes(results: list[Result]) -> None:
    figures = latest(results, 2)
    heading("dtypes, 2 ranks, times as fast as the float32 sum of as many bytes")
    for what in dict.fromkeys(key[1] for key in figures):
        for name in dict.fromkeys(key[2] for key in figures if key[2] != "float32 Sum"):
            target = SIXTEEN_BIT if "float16" in name else OTHER_DTYPES
            for nbytes in sorted({key[3] for key in figures}):
                found = ratios(figures, what, name, "float32 Sum", nbytes)
                show([line(f"{what}, {name}, {human_size(nbytes)}", found, target)])


def show_step(results: list[Result]) -> None:
    figures = latest(results, 2)
    heading("a step's communication, 2 ranks, times the roof (at most)")
    for nbytes in sorted({key[3] for key in figures}):
        for suffix in ("", ", views"):
            found = ratios(figures, "training step", f"roof{suffix}", f"step{suffix}", nbytes)
            measured = ", ".join(f"{mpi} {ratio:.2f}" for mpi, ratio in found.items())
            if found:
                verdict = "met" if max(found.values()) <= STEP_OVER_ROOF else "missed"
                title = f"{human_size(nbytes)}{suffix}"
                print(f"| {title} | {STEP_OVER_ROOF:g} | {measured} | {verdict} |")


def show_bucketing(results: list[Result]) -> None:
    """Show how the tuned bucket size, and the default, do beside the best of the fixed ones."""
    for ranks in sorted({r.ranks for r in results}):
        figures = latest(results, ranks)
        heading(f"buckets, {ranks} ranks, over the fastest fixed size")
        for what, nbytes in dict.fromkeys((key[1], key[3]) for key in figures):
            fixed = {
                key[2]
                for key, r in figures.items()
                if key[1] == what and r.notes.get(BUCKET) and key[2] not in (DEFAULT, TUNED)
            }
            for chosen in (TUNED, DEFAULT):
                found: dict[str, float] = {}
                for name in fixed:
                    for mpi, ratio in ratios(figures, what, chosen, name, nbytes).items():
                        found[mpi] = min(ratio, found.get(mpi, ratio))
                show([line(f"{what}, {chosen}", found, AUTO_OVER_BEST)])


def show_torch(results: list[Result]) -> None:
    figures = latest(results, 2)
    heading("PyTorch, 2 ranks, times as fast as gloo")
    for what, target in TORCH_OVER_GLOO.items():
        peer = "DDP over gloo" if what.startswith("step") else "gloo"
        for nbytes in sorted({key[3] for key in figures if key[1] == what}):
            found = ratios(figures, what, "hvdkit", peer, nbytes)
            show([line(f"{what}, {human_size(nbytes)}", found, target)])


def show_tensorflow(results: list[Result]) -> None:
    figures = latest(results, 2)
    heading("TensorFlow, 2 ranks, times as fast as MultiWorkerMirroredStrategy")
    for nbytes in sorted({key[3] for key in figures}):
        for name in ("hvdkit", "hvdkit.keras"):
            found = ratios(figures, "step of an MLP", name, "MultiWorkerMirrored", nbytes)
            show([line(f"{name}, {human_size(nbytes)}", found, 1.0)])
    heading("the adapter's share of a step (at most)")
    for nbytes in sorted({key[3] for key in figures}):
        for name in ("hvdkit", "hvdkit.keras"):
            over = {
                mpi: 1
                - sum(figures[mpi, what, part, nbytes].seconds for part in ("alone", "core"))
                / figures[mpi, what, name, nbytes].seconds
                for mpi, what, found, size in figures
                if (found, size) == (name, nbytes)
            }
            measured = ", ".join(f"{mpi} {share:.2f}" for mpi, share in over.items())
            verdict = "met" if max(over.values()) <= TENSORFLOW_OVERHEAD else "missed"
            title = f"{name}, {human_size(nbytes)}"
            print(f"| {title} | {TENSORFLOW_OVERHEAD:g} | {measured} | {verdict} |")


def show_pipeline(results: list[Result]) -> None:
    for ranks in sorted({result.ranks for result in results}):
        figures = latest(results, ranks)
        heading(f"bubble of sleeping stages, {ranks} ranks, beyond the formula (at most)")
        for name in dict.fromkeys(key[2] for key in figures if key[1] == "sleeping stages"):
            by_formula = f"{name}, by the formula"
            found = ratios(figures, "sleeping stages", name, by_formula, 4096)
            # With work w, step t and formula's step f, the bubbles are 1 - w/t and 1 - w/f.
            for mpi, ratio in found.items():
                ideal = figures[mpi, "sleeping stages", by_formula, 4096]
                share = SLEEPING_WORK / ideal.seconds
                beyond = share * (1 - ratio)
                verdict = "met" if beyond <= BUBBLE_POINTS else "missed"
                print(f"| {name} | {BUBBLE_POINTS:g} | {mpi} {beyond:.3f} | {verdict} |")
        heading(f"step of a GPT, {ranks} ranks, times as fast as torch.distributed.pipelining")
        for nbytes in sorted({key[3] for key in figures if key[1] == "pipelined step of a GPT"}):
            for name in ("gpipe", "1f1b"):
                peer = f"torch {name}, gloo"
                found = ratios(figures, "pipelined step of a GPT", f"hvdkit {name}", peer, nbytes)
                show([line(f"{name}, {human_size(nbytes)}", found, 1.0)])


def show_hosts(results: list[Result]) -> None:
    """Whether auto is slower than the library by more than their turns differ among themselves."""
    heading("all-reduce between hosts at 1 Gbit/s, times as fast as the MPI library, beyond noise")
    figures = {(r.mpi, r.what, r.name, r.nbytes): r for r in results}
    whats = dict.fromkeys(r.what for r in results if ", 1 Gbit/s, " in r.what)
    for what in whats:
        for nbytes in sorted({r.nbytes for r in results if r.what == what}):
            found = ratios(figures, what, "auto", "MPI library", nbytes)
            slower = [
                mpi
                for mpi in found
                if figures[mpi, what, "auto", nbytes].low
                > figures[mpi, what, "MPI library", nbytes].high
            ]
            measured = ", ".join(f"{mpi} {ratio:.2f}" for mpi, ratio in found.items())
            title = f"{what.removeprefix('allreduce, ')}, {human_size(nbytes)}"
            print(f"| {title} | 1 | {measured} | {'missed' if slower else 'met'} |")


PARTS = {
    "allreduce": show_allreduce,
    "collectives": show_collectives,
    "dtypes": show_dtypes,
    "step": show_step,
    "bucketing": show_bucketing,
    "torch": show_torch,
    "tensorflow": show_tensorflow,
    "pipeline": show_pipeline,
    "hosts": show_hosts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("benchmarks", nargs="*", default=[*PARTS], metavar="benchmark")
    args = parser.parse_args()
    for name in args.benchmarks:
        path = args.folder / f"{name}.json"
        if name not in PARTS:
            print(f"\n{name} has no targets")
        elif path.exists():
            PARTS[name](load_results(path))
        else:
            print(f"\nno {path}: make bench-{name}")


if __name__ == "__main__":
    main()
