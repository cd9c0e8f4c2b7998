"""A step's communication, compressed: its time, the bytes on the wire, and the error it makes.

    mpirun -n 2 python benchmarks/compressing.py [--compressors fp16 int8] [--ways shm messages]

The gradients are ResNet-50's, in buckets; each step puts them into their views and reduces them.
Once in the memory that the ranks share, once over messages (of the MPI library, on this machine:
what compression gains over a link of a certain rate, bench-hosts measures).

The gradients' matrices are of the kind that training yields, a few strong directions and noise, and
different on each rank.  "error" is that of the first step, and "error of 10" that of the sum of ten
steps, in which what error feedback kept back is there again; both relative to the exact mean,
|result - exact| / |exact| in float64.  A wrong element (#wrong) is one that differs from rank 0's,
or, uncompressed, from the exact mean by more than float32 rounds.

(The script is not named "compression", as a module of Python's own is.)
"""

from __future__ import annotations

import os
from collections.abc import Callable

import measuring
import models
import numpy as np
import options
from measuring import Candidate, Prepared
from mpi4py import MPI
from options import Choice
from records import PEER

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.dtypes import bfloat16
from hvdkit.engine.compression import Cast, Compressor, Int8, NoCompression, PowerSGD, TopK

COMPRESSORS: dict[str, Compressor] = {
    "none": NoCompression(),
    "fp16": Cast(np.float16),
    "bf16": Cast(bfloat16),
    "int8": Int8(),
    "topk(0.01)": TopK(0.01),
    "powersgd(4)": PowerSGD(4),
}

WAYS = ["shm", "messages"]

#: Steps whose sum is compared with the exact one.
STEPS = 10

#: Strong directions of a gradient's matrix.
DIRECTIONS = 4

Arrays = list[np.ndarray]


def gradients_of_rank(shapes: list[models.Shape], rank: int) -> Arrays:
    """Return one rank's gradients: matrices of a few strong directions, and noise."""
    rng = np.random.default_rng(rank)
    common = np.random.default_rng(1000)
    found = []
    for shape in shapes:
        noise = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            rows, columns = shape[0], int(np.prod(shape[1:]))
            left = common.standard_normal((rows, DIRECTIONS), np.float32)
            right = common.standard_normal((DIRECTIONS, columns), np.float32)
            noise = 0.5 * noise + (left @ right).reshape(shape)
        found.append((1e-3 * noise).astype(np.float32))
    return found


def relative_error(results: Arrays, exact: Arrays, times: int = 1) -> float:
    """Return |results - times x exact| / |times x exact|, all tensors together."""
    off = sum(float(np.sum((r - times * e) ** 2)) for r, e in zip(results, exact, strict=True))
    return (off / sum(float(np.sum((times * e) ** 2)) for e in exact)) ** 0.5


def compressed(name: str, shapes: list[models.Shape], mine: Arrays, exact: Arrays) -> Candidate:
    """Return a step's communication by a compressor, the error and the bytes among its notes."""
    notes: dict[str, float] = {}

    def prepare(_: int) -> Prepared:
        reducer = context().gradient_reducer(
            models.gradients_of(shapes), compression=COMPRESSORS[name]
        )
        reducer.keep_plan()
        notes["MB sent"] = reducer.wire_bytes / 1e6

        def call() -> None:
            for index in reversed(range(len(shapes))):
                np.copyto(reducer.views[index], mine[index])
                reducer.ready(index)
            reducer.finish()

        def check() -> int:
            wrong, total = 0, [np.zeros(shape) for shape in shapes]
            for step in range(STEPS):
                call()
                for so_far, view in zip(total, reducer.views, strict=True):
                    np.add(so_far, view, out=so_far)
                if step == 0:
                    notes["error"] = relative_error(reducer.views, exact)
                    wrong = wrong_elements(reducer.views, exact if name == "none" else None)
            notes[f"error of {STEPS}"] = relative_error(total, exact, STEPS)
            return wrong

        return call, check

    return Candidate(name, prepare, notes=notes)


def wrong_elements(results: Arrays, exact: Arrays | None) -> int:
    """Return how many elements differ from rank 0's, or from the exact result if there is one.

    Collective.
    """
    wrong = sum(int(np.count_nonzero(hvd.broadcast(x, 0) != x)) for x in results)
    for x, e in zip(results, exact or [], strict=exact is not None):
        wrong += int(np.count_nonzero(np.abs(x - e) > 1e-6 * np.abs(e) + 1e-9))
    return wrong


def mpi_library(comm: MPI.Comm, mine: Arrays, exact: Arrays) -> Candidate:
    """Return the MPI library's all-reduce of all gradients in one buffer, uncompressed."""

    def prepare(_: int) -> Prepared:
        flat = np.zeros(sum(x.size for x in mine), np.float32)
        places = np.split(flat, np.cumsum([x.size for x in mine])[:-1])

        def call() -> None:
            for place, x in zip(places, mine, strict=True):
                np.copyto(place, x.ravel())
            comm.Allreduce(MPI.IN_PLACE, flat, op=MPI.SUM)
            np.divide(flat, hvd.size(), out=flat)

        def check() -> int:
            call()
            shaped = [place.reshape(e.shape) for place, e in zip(places, exact, strict=True)]
            return wrong_elements(shaped, exact)

        return call, check

    return Candidate("MPI library", prepare, PEER)


def over(way: str, action: Callable[[], list[measuring.Result]]) -> list[measuring.Result]:
    """Run `action` with or without the shared memory.  Collective; hvdkit joins anew."""
    hvd.shutdown()
    os.environ["HVDKIT_SHM"] = str(int(way == "shm"))
    hvd.init()
    return action()


def main() -> None:
    names = list(COMPRESSORS)
    parser = options.parser(__doc__, turns=15, peers=Choice(["mpi"], ["mpi"]))
    parser.add_argument("--compressors", nargs="+", default=names, choices=names)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--width", type=float, default=0.5, help="of ResNet-50; 1: as it is")
    args = options.start(parser)
    measuring.show_machine()
    comm = MPI.COMM_WORLD.Dup()
    shapes = models.resnet50(args.width)
    mine = gradients_of_rank(shapes, hvd.rank())
    exact = [np.zeros(shape) for shape in shapes]
    for rank in range(hvd.size()):
        for mean, x in zip(exact, gradients_of_rank(shapes, rank), strict=True):
            np.add(mean, x / np.float64(hvd.size()), out=mean)
    results = []
    for way in args.ways:

        def measure(way: str = way) -> list[measuring.Result]:
            everyone = [compressed(name, shapes, mine, exact) for name in args.compressors]
            everyone += [mpi_library(comm, mine, exact)] * ("mpi" in args.peers)
            what = f"compressed gradients, {way}"
            return measuring.run(what, [models.bytes_of(shapes)], everyone, turns=args.turns)

        results += over(way, measure)
    measuring.report("compression", results, args.out)


if __name__ == "__main__":
    main()
