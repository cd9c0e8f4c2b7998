"""A rank of bench-hosts: all-reduces of hvdkit's and the MPI library's own, between hosts.

    mpirun -n 2 --host a,b python benchmarks/links.py TITLE mpi|tcp
        [--sizes 4 1MiB] [--out FILE.json]

Over "tcp" hvdkit's messages do without MPI, which only the library's own all-reduce uses then; both
take turns all the same.  "sent as ..." are gradients of float32 that travel so, compression and
all.  In the end alpha, beta and gamma are fitted to other messages on the same link, and each
algorithm's time is predicted by them.  See measuring.py for the method.
"""

from __future__ import annotations

import math
import os
import secrets
import sys
from dataclasses import replace

import measuring
import numpy as np
import options
from allreduce import WAYS, can_be_had, mpi_library, ours
from measuring import Candidate, Prepared
from mpi4py import MPI
from options import Choice
from records import PREDICTION, Result
from roofs import roofs
from tables import human_size, human_time

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.engine.bucketing import Gradient
from hvdkit.engine.compression.base import Compressor, NoCompression
from hvdkit.engine.compression.casts import Cast
from hvdkit.engine.compression.int8 import Int8
from hvdkit.schedules.registry import ALGORITHMS
from hvdkit.transport.stores import RendezvousServer
from hvdkit.tuner.bench import Bench
from hvdkit.tuner.levels import measure_levels
from hvdkit.tuning.estimates import Estimates
from hvdkit.tuning.record import Tuning

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
    parser = options.parser(
        __doc__,
        sizes=Choice(["4", "1MiB"]),
        algorithms=Choice(["auto"], WAYS),
        peers=Choice(["mpi"], ["mpi"]),
    )
    parser.add_argument("title")
    parser.add_argument("transport", choices=["mpi", "tcp"])
    args = options.read(parser)
    comm = MPI.COMM_WORLD.Dup()
    if args.transport == "tcp":
        meet_over_tcp(comm)
    hvd.init()
    everyone = [
        replace(ours(name), largest=LARGEST.get(name, math.inf))
        for name in args.algorithms
        if can_be_had(name)
    ]
    everyone += [mpi_library(comm)] * ("mpi" in args.peers) + roofs("allreduce")
    from_here = max(COMPRESSED_FROM, *args.sizes)
    everyone += [
        replace(compressed(name, kind), smallest=from_here) for name, kind in COMPRESSORS.items()
    ]
    results = []
    for nbytes in args.sizes:
        results += measuring.measure(args.title, nbytes, everyone, turns=args.turns)
    if hvd.rank() == 0:
        show(results)
    measuring.keep("hosts", with_predictions(results, turns=args.turns), args.out)
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


def with_predictions(results: list[Result], *, turns: int) -> list[Result]:
    """Return the results with the model's seconds of each algorithm as a note.  Collective."""
    levels, _ = measure_levels(Bench(context(), lambda _label: None, turns=turns))
    usual = context().group.estimates
    tuning = Tuning(world=context().describe_world(), levels=levels)
    estimates = Estimates(
        tuning,
        hvd.size(),
        usual.per_node,
        nested=usual.nested,
        usual_segment=usual.usual_segment,
    )
    known = {"gathered", "hierarchical", *ALGORITHMS["allreduce"]}

    def noted(result: Result) -> Result:
        if result.name not in known:
            return result
        seconds = estimates.modelled("allreduce", result.name, result.nbytes)
        return replace(result, notes={PREDICTION: seconds})

    return [noted(result) for result in results]


def show(results: list[Result]) -> None:
    """Print the medians as a table in Markdown, with how many times as fast as the library."""
    figures = {(r.name, r.nbytes): r for r in results}
    sizes = sorted({r.nbytes for r in results})
    print(
        "\nHosts x ranks on each, or ranks + ranks; median times, and in parentheses how many\n"
        "times as fast as the MPI library's own.  Roofs: the best that bare messages, and bare "
        "memory, could do."
    )
    print(f"\n| {results[0].what}, {results[0].mpi} | {' | '.join(map(human_size, sizes))} |")
    print(f"|---|{'---:|' * len(sizes)}")
    for name in dict.fromkeys(r.name for r in results):
        cells = []
        for nbytes in sizes:
            found, peer = figures.get((name, nbytes)), figures.get(("MPI library", nbytes))
            ratio = f" ({peer.seconds / found.seconds:.2f})" if found and peer else ""
            cells.append(human_time(found.seconds) + ratio if found else "")
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
