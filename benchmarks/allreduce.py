"""All-reduce: every algorithm of hvdkit beside the MPI library's own and gloo, in one run.

    mpirun -n 2 python benchmarks/allreduce.py [--sizes 4 1KiB 64MiB] [--csv FILE]

float32 sums in place, on buffers that were touched before; see measuring.py for the method.  algbw
is bytes over time; busbw = algbw x 2(p-1)/p, which can be held against a link's or the memory's
speed whatever p is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import measuring
import numpy as np
from measuring import Candidate, Prepared
from mpi4py import MPI
from peers import start_gloo

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.config import parse_bytes
from hvdkit.schedules.registry import ALGORITHMS

SIZES = ["4", "64", "1KiB", "4KiB", "16KiB", "64KiB", "256KiB", "1MiB", "4MiB", "16MiB", "64MiB"]


def prepared(x: np.ndarray, call: Callable[[], object]) -> Prepared:
    """Return an in-place sum over `x`, and its check; the sum of zeros, over and over, stays 0."""

    def check() -> int:
        pattern = np.arange(x.size) % 5
        x[:] = pattern + hvd.rank()
        call()
        wanted = (pattern * hvd.size() + sum(range(hvd.size()))).astype(x.dtype)
        wrong = int(np.count_nonzero(x != wanted))
        x[:] = 0
        return wrong

    return call, check


def ours(algorithm: str) -> Candidate:
    def prepare(nbytes: int) -> Prepared:
        x = np.empty(max(1, nbytes // 4), np.float32)
        return prepared(x, lambda: hvd.allreduce_(x, op=hvd.Sum, algorithm=algorithm))

    return Candidate(algorithm, prepare)


def ours_in_the_arena() -> Candidate:
    def prepare(nbytes: int) -> Prepared:
        x = hvd.empty(max(1, nbytes // 4), np.float32)
        return prepared(x, lambda: hvd.allreduce_(x, op=hvd.Sum, algorithm="shm"))

    return Candidate("arena", prepare)


def mpi_library(comm: MPI.Comm) -> Candidate:
    def prepare(nbytes: int) -> Prepared:
        x = np.empty(max(1, nbytes // 4), np.float32)
        return prepared(x, lambda: comm.Allreduce(MPI.IN_PLACE, x, op=MPI.SUM))

    return Candidate("MPI library", prepare)


def gloo() -> Candidate:
    import torch
    import torch.distributed as dist

    start_gloo()

    def prepare(nbytes: int) -> Prepared:
        x = np.empty(max(1, nbytes // 4), np.float32)
        tensor = torch.from_numpy(x)
        return prepared(x, lambda: dist.all_reduce(tensor))

    return Candidate("gloo", prepare)


def candidates(algorithms: list[str], peers: list[str]) -> list[Candidate]:
    found = []
    for name in algorithms:
        if name in ("arena", "shm") and context().group.arena is None:
            continue
        found.append(ours_in_the_arena() if name == "arena" else ours(name))
    if "mpi" in peers:
        found.append(mpi_library(MPI.COMM_WORLD.Dup()))
    if "gloo" in peers:
        found.append(gloo())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [parse_bytes(size) for size in SIZES]
    parser.add_argument("--sizes", nargs="+", default=sizes, type=parse_bytes, metavar="BYTES")
    ways = ["arena", "shm", *ALGORITHMS["allreduce"]]
    parser.add_argument("--algorithms", nargs="+", default=ways, choices=ways)
    parser.add_argument("--peers", nargs="*", default=["mpi", "gloo"], choices=["mpi", "gloo"])
    parser.add_argument("--turns", type=int, default=measuring.TURNS, help="of each candidate")
    parser.add_argument("--csv", type=Path, help="append the figures to this file")
    args = parser.parse_args()

    hvd.init()
    if hvd.rank() == 0:
        measuring.show_machine()
    everyone = candidates(args.algorithms, args.peers)
    results = measuring.run("allreduce", args.sizes, everyone, turns=args.turns)
    measuring.report(results, args.csv)


if __name__ == "__main__":
    main()
