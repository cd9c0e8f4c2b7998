"""A rank of bench-hosts: all-reduces of hvdkit's and the MPI library's own, between hosts.

    mpirun -n 2 --host a,b python benchmarks/links.py TITLE mpi|tcp [--sizes 4 1MiB] [--csv FILE]

Over "tcp" hvdkit's messages do without MPI, which only the library's own all-reduce uses then; both
take turns all the same.  "sent as ..." are gradients of float32 that travel so, compression and
all.  See measuring.py for the method.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from pathlib import Path

import measuring
import numpy as np
from allreduce import mpi_library, ours
from measuring import Candidate, Prepared, Result, human_size, human_time
from mpi4py import MPI

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.config import parse_bytes
from hvdkit.engine.bucketing import Gradient
from hvdkit.engine.compression.base import Compressor, NoCompression
from hvdkit.engine.compression.casts import Cast
from hvdkit.engine.compression.int8 import Int8
from hvdkit.transport.stores import RendezvousServer

#: Those that cannot be had between the ranks are left out.
ALGORITHMS = (
    "auto",
    "gathered",
    "hierarchical",
    "recursive_doubling",
    "halving_doubling",
    "ring",
    "tree",
)

#: Bytes above which an algorithm is never the one to take, and slow to measure.
LARGEST = {"gathered": 65_536, "recursive_doubling": 65_536, "tree": 524_288}

COMPRESSORS = {
    "sent as float32": NoCompression(),
    "sent as fp16": Cast("f2"),
    "sent as int8": Int8(),
}

#: A gradient's bytes from which it is measured compressed too.
COMPRESSED_FROM = 524_288


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("title")
    parser.add_argument("transport", choices=["mpi", "tcp"])
    parser.add_argument("--sizes", nargs="+", default=[4, 2**20], type=parse_bytes, metavar="BYTES")
    parser.add_argument("--turns", type=int, default=measuring.TURNS, help="of each candidate")
    parser.add_argument("--csv", type=Path, help="append the figures to this file")
    args = parser.parse_args()

    comm = MPI.COMM_WORLD.Dup()
    if args.transport == "tcp":
        meet_over_tcp(comm)
    hvd.init()
    peer = mpi_library(comm)
    results = []
    for nbytes in args.sizes:
        names = [name for name in available() if nbytes <= LARGEST.get(name, nbytes)]
        everyone = [*map(ours, names), peer]
        if nbytes >= COMPRESSED_FROM and nbytes == max(args.sizes):
            everyone += [compressed(name, kind) for name, kind in COMPRESSORS.items()]
        results += measuring.measure(args.title, nbytes, everyone, turns=args.turns)
    if hvd.rank() == 0:
        show(results)
        if args.csv:
            measuring.save(results, args.csv)
    sys.exit(any(result.wrong for result in results))


def meet_over_tcp(comm: MPI.Comm) -> None:
    """Say in the environment what ``hvdrun --tcp`` would say.  Collective."""
    secret = comm.bcast(secrets.token_hex(32))
    server = RendezvousServer(bytes.fromhex(secret)) if comm.rank == 0 else None
    if server is not None:
        server.start()
    os.environ.update(
        HVDKIT_TRANSPORT="tcp",
        HVDKIT_RANK=str(comm.rank),
        HVDKIT_SIZE=str(comm.size),
        HVDKIT_SECRET=secret,
        HVDKIT_RENDEZVOUS_ADDR=comm.bcast(os.uname().nodename),
        HVDKIT_RENDEZVOUS_PORT=str(comm.bcast(server and server.port)),
    )


def available() -> list[str]:
    """Return the algorithms that can be had.  Collective."""
    found = []
    for name in ALGORITHMS:
        try:
            hvd.allreduce(0.0, algorithm=name)
        except hvd.ArgumentError:
            continue
        found.append(name)
    return found


def show(results: list[Result]) -> None:
    """Print the medians as a table in Markdown, with how many times as fast as the library."""
    figures = {(r.name, r.nbytes): r for r in results}
    sizes = sorted({r.nbytes for r in results})
    print(f"\n| {results[0].what}, {results[0].mpi} | {' | '.join(map(human_size, sizes))} |")
    print(f"|---|{'---:|' * len(sizes)}")
    for name in dict.fromkeys(r.name for r in results):
        cells = []
        for nbytes in sizes:
            found = figures.get((name, nbytes))
            peer = figures["MPI library", nbytes]
            cells.append(
                f"{human_time(found.seconds)} ({peer.seconds / found.seconds:.2f})" if found else ""
            )
        print(f"| {name} | {' | '.join(cells)} |")


def compressed(name: str, compressor: Compressor) -> Candidate:
    """Return a step's communication: one gradient, made anew in its bucket each time."""

    def prepare(nbytes: int) -> Prepared:
        gradient = np.ones(nbytes // 4, np.float32)
        reducer = context().gradient_reducer(
            [Gradient("gradient", gradient.shape, gradient.dtype)], compression=compressor
        )

        def call() -> None:
            np.copyto(reducer.views[0], gradient)
            reducer.ready(0)
            reducer.finish()

        def check() -> int:
            call()
            return int(np.count_nonzero(np.abs(reducer.views[0] - 1) > 0.01))

        return call, check

    return Candidate(name, prepare)


if __name__ == "__main__":
    main()
