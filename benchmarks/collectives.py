"""All-gather, reduce-scatter, broadcast and all-to-all beside the MPI library's own, in one run.

    mpirun -n 2 python benchmarks/collectives.py [--sizes 4KiB 1MiB] [--csv FILE]

Sizes are those of the whole message, as nccl-tests counts them: what an all-gather returns, what a
reduce-scatter, broadcast or all-to-all is given.  See measuring.py for the method.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import measuring
import numpy as np
from measuring import Candidate, Prepared
from mpi4py import MPI

import hvdkit as hvd
from hvdkit.config import parse_bytes

SIZES = ["4KiB", "64KiB", "1MiB", "16MiB", "64MiB"]

#: Returns the collective's result.
Call = Callable[[], np.ndarray]


def rows_of(nbytes: int) -> int:
    """Return how many float32 each rank has of a message of `nbytes`."""
    return max(1, nbytes // 4 // hvd.size())


def allgather(nbytes: int, comm: MPI.Comm | None) -> tuple[Call, np.ndarray]:
    x = np.full(rows_of(nbytes), hvd.rank(), np.float32)
    wanted = np.repeat(np.arange(hvd.size(), dtype=np.float32), x.size)
    if comm is None:
        return lambda: hvd.allgather(x), wanted

    def call() -> np.ndarray:
        out = np.empty(x.size * hvd.size(), np.float32)
        comm.Allgather(x, out)
        return out

    return call, wanted


def reducescatter(nbytes: int, comm: MPI.Comm | None) -> tuple[Call, np.ndarray]:
    rows = rows_of(nbytes)
    x = np.repeat(np.arange(hvd.size(), dtype=np.float32), rows)
    wanted = np.full(rows, hvd.rank() * hvd.size(), np.float32)
    if comm is None:
        return lambda: hvd.reducescatter(x, op=hvd.Sum), wanted

    def call() -> np.ndarray:
        out = np.empty(rows, np.float32)
        comm.Reduce_scatter_block(x, out, op=MPI.SUM)
        return out

    return call, wanted


def broadcast(nbytes: int, comm: MPI.Comm | None) -> tuple[Call, np.ndarray]:
    wanted = np.arange(max(1, nbytes // 4), dtype=np.float32)
    x = wanted.copy() if hvd.rank() == 0 else np.zeros_like(wanted)
    if comm is None:
        return lambda: hvd.broadcast_(x), wanted

    def call() -> np.ndarray:
        comm.Bcast(x)
        return x

    return call, wanted


def alltoall(nbytes: int, comm: MPI.Comm | None) -> tuple[Call, np.ndarray]:
    rows = rows_of(nbytes)
    x = np.repeat(np.arange(hvd.size(), dtype=np.float32), rows) + 10 * hvd.rank()
    wanted = np.repeat(10 * np.arange(hvd.size(), dtype=np.float32), rows) + hvd.rank()
    if comm is None:
        return lambda: hvd.alltoall(x), wanted

    def call() -> np.ndarray:
        out = np.empty_like(x)
        comm.Alltoall(x, out)
        return out

    return call, wanted


COLLECTIVES = {f.__name__: f for f in (allgather, reducescatter, broadcast, alltoall)}


def candidate(name: str, kind: str, comm: MPI.Comm | None) -> Candidate:
    def prepare(nbytes: int) -> Prepared:
        call, wanted = COLLECTIVES[kind](nbytes, comm)
        return call, lambda: int(np.count_nonzero(call() != wanted))

    return Candidate(name, prepare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [parse_bytes(size) for size in SIZES]
    parser.add_argument("--sizes", nargs="+", default=sizes, type=parse_bytes, metavar="BYTES")
    parser.add_argument("--collectives", nargs="+", default=[*COLLECTIVES], choices=[*COLLECTIVES])
    parser.add_argument("--turns", type=int, default=measuring.TURNS, help="of each candidate")
    parser.add_argument("--csv", type=Path, help="append the figures to this file")
    args = parser.parse_args()

    hvd.init()
    comm = MPI.COMM_WORLD.Dup()
    if hvd.rank() == 0:
        measuring.show_machine()
    results = []
    for kind in args.collectives:
        pair = [candidate("hvdkit", kind, None), candidate("MPI library", kind, comm)]
        results += measuring.run(kind, args.sizes, pair, turns=args.turns)
    measuring.report(results, args.csv)


if __name__ == "__main__":
    main()
