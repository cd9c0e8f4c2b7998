"""All-gather, reduce-scatter, broadcast and all-to-all beside the peers, in one run.

    mpirun -n 2 python benchmarks/collectives.py [--sizes 4KiB 1MiB] [--out FILE.json]

Sizes are those of the whole message, as nccl-tests counts them: what an all-gather returns, what a
reduce-scatter, broadcast or all-to-all is given.  Peers: the MPI library's own, and on demand gloo
for what it has (its turns leave others, which make their results anew, slower and less steady than
they are without it).  "hvdkit" is algorithm "auto"; --algorithms takes others, of which each
collective measures those that it knows.  See measuring.py for the method, roofs.py for the limits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import measuring
import numpy as np
import options
from allreduce import BY_NAME, count_of
from measuring import Candidate, Prepared
from mpi4py import MPI
from options import Choice
from peers import start_gloo
from records import PEER
from roofs import roofs

import hvdkit as hvd
from hvdkit.collectives.pick import known_algorithms

SIZES = ["4KiB", "64KiB", "1MiB", "16MiB", "64MiB"]
SHORT_SIZES = ["4KiB", "256KiB", "16MiB"]

#: Returns the collective's result.
Call = Callable[[], np.ndarray]

#: What makes a call: of (input, place for the result).
Maker = Callable[[np.ndarray, np.ndarray], Call]


def rows_of(nbytes: int, dtype: np.dtype) -> int:
    """Return how many elements each rank has of a message of `nbytes`."""
    return max(1, count_of(nbytes, dtype) // hvd.size())


def allgather(nbytes: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return this rank's input, and the result that it must get; so the next three."""
    rows = rows_of(nbytes, dtype)
    return np.full(rows, hvd.rank(), dtype), np.repeat(np.arange(hvd.size()).astype(dtype), rows)


def reducescatter(nbytes: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    rows = rows_of(nbytes, dtype)
    x = np.repeat(np.arange(hvd.size()).astype(dtype), rows)
    return x, np.full(rows, hvd.rank() * hvd.size(), dtype)


def broadcast(nbytes: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    wanted = (np.arange(count_of(nbytes, dtype)) % 101).astype(dtype)
    return (wanted.copy() if hvd.rank() == 0 else np.zeros_like(wanted)), wanted


def alltoall(nbytes: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    rows, ranks = rows_of(nbytes, dtype), np.arange(hvd.size())
    x = np.repeat(ranks + 10 * hvd.rank(), rows).astype(dtype)
    return x, np.repeat(10 * ranks + hvd.rank(), rows).astype(dtype)


COLLECTIVES = {f.__name__: f for f in (allgather, reducescatter, broadcast, alltoall)}


def ours(kind: str, algorithm: str) -> Maker:
    """Return what calls hvdkit, which makes its results anew each time."""

    def make(x: np.ndarray, _: np.ndarray) -> Call:
        if kind == "reducescatter":
            return lambda: hvd.reducescatter(x, op=hvd.Sum, algorithm=algorithm)
        name = "broadcast_" if kind == "broadcast" else kind
        return lambda: getattr(hvd, name)(x, algorithm=algorithm)

    return make


def mpi_library(kind: str, comm: MPI.Comm) -> Maker:
    """Return what calls the MPI library, which is given a new array for its result each time."""

    def make(x: np.ndarray, place: np.ndarray) -> Call:
        def call() -> np.ndarray:
            if kind == "broadcast":
                comm.Bcast(as_bytes(x))
                return x
            out = np.empty_like(place)
            if kind == "reducescatter":
                comm.Reduce_scatter_block(x, out, op=MPI.SUM)
            elif kind == "allgather":
                comm.Allgather(as_bytes(x), as_bytes(out))
            else:
                comm.Alltoall(as_bytes(x), as_bytes(out))
            return out

        return call

    return make


def as_bytes(x: np.ndarray) -> np.ndarray:
    """Return what MPI takes whatever the dtype, where nothing is reduced."""
    return x.view(np.uint8)


def gloo(kind: str) -> Maker:
    """Return what calls gloo, which has no all-to-all, nor a reduce-scatter of its own."""
    import torch
    import torch.distributed as dist

    def make(x: np.ndarray, place: np.ndarray) -> Call:
        def call() -> np.ndarray:
            tensor = torch.from_numpy(x)
            if kind == "broadcast":
                dist.broadcast(tensor, 0)
                return x
            out = np.empty_like(place)
            dist.all_gather(list(torch.from_numpy(out).chunk(hvd.size())), tensor)
            return out

        return call

    return make


GLOO_HAS = ("allgather", "broadcast")


def candidate(name: str, kind: str, dtype: np.dtype, make: Maker, of: str = "ours") -> Candidate:
    def prepare(nbytes: int) -> Prepared:
        x, wanted = COLLECTIVES[kind](nbytes, dtype)
        given, call = x.copy(), make(x, wanted)
        anew = partial(np.copyto, x, given)
        return call, lambda: int(np.count_nonzero(call() != wanted)), anew

    return Candidate(name, prepare, of)


def candidates(
    kind: str, dtype: np.dtype, algorithms: list[str], peers: dict[str, MPI.Comm | None]
) -> list[Candidate]:
    """Return all that take turns at a collective.  Collective.

    Args:
        kind: the collective.
        dtype: what is sent.
        algorithms: those that the collective does not know are left out.
        peers: by name; the MPI library's with its communicator.
    """
    found = [
        candidate("hvdkit" if name == "auto" else name, kind, dtype, ours(kind, name))
        for name in algorithms
        if name in known_algorithms(kind)
    ]
    wide = dtype.name not in ("float16", "bfloat16")
    comm = peers.get("mpi")
    if comm is not None and (wide or kind != "reducescatter"):
        found.append(candidate("MPI library", kind, dtype, mpi_library(kind, comm), PEER))
    if "gloo" in peers and kind in GLOO_HAS and dtype.name == "float32" and start_gloo():
        found.append(candidate("gloo", kind, dtype, gloo(kind), PEER))
    return found + roofs(kind)


def main() -> None:
    known = sorted({name for kind in COLLECTIVES for name in known_algorithms(kind)} - {"mpi"})
    parser = options.parser(
        __doc__,
        sizes=Choice(SIZES, short=SHORT_SIZES),
        algorithms=Choice(["auto"], known),
        peers=Choice(["mpi"], ["mpi", "gloo"]),
        dtype=Choice(["float32"], list(BY_NAME)),
    )
    parser.add_argument("--collectives", nargs="+", default=[*COLLECTIVES], choices=[*COLLECTIVES])
    args = options.start(parser)
    measuring.show_machine()
    comm = MPI.COMM_WORLD.Dup()
    peers = {name: comm if name == "mpi" else None for name in args.peers}
    results = []
    for kind in args.collectives:
        for dtype in args.dtype:
            what = kind if dtype == "float32" else f"{kind}, {dtype}"
            everyone = candidates(kind, BY_NAME[dtype], args.algorithms, peers)
            results += measuring.run(what, args.sizes, everyone, turns=args.turns)
    measuring.report("collectives", results, args.out)


if __name__ == "__main__":
    main()
