"""All-reduce: every algorithm of hvdkit beside the peers and the machine's limits, in one run.

    mpirun -n 2 python benchmarks/allreduce.py [--sizes 4 1KiB 64MiB] [--out FILE.json]

Sums in place, on buffers that were touched before; see measuring.py for the method, roofs.py for
the limits.  algbw is bytes over time; busbw = algbw x 2(p-1)/p, which can be held against a link's
or the memory's speed whatever p is.  Peers: the MPI library's own, gloo and Horovod where they are
installed, and NCCL where every rank has a GPU, beside hvdkit on tensors in the same place.
"""

from __future__ import annotations

from collections.abc import Callable

import measuring
import numpy as np
import options
from measuring import Candidate, Prepared
from mpi4py import MPI
from options import Choice
from peers import gpu_of_this_rank, start_gloo, start_horovod
from records import PEER
from roofs import roofs

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.collectives.pick import known_algorithms
from hvdkit.dtypes import DTYPES
from hvdkit.schedules.registry import ALGORITHMS

SIZES = ["4", "64", "1KiB", "4KiB", "16KiB", "64KiB", "256KiB", "1MiB", "4MiB", "16MiB", "64MiB"]
SHORT_SIZES = ["4", "1KiB", "16KiB", "256KiB", "4MiB", "64MiB"]

#: "mpi" is a peer.
WAYS = ["arena", *(name for name in known_algorithms("allreduce") if name != "mpi")]
PEERS = ["mpi", "gloo", "horovod", "nccl"]

BY_NAME = {dtype.name: dtype for dtype in DTYPES if dtype.kind != "b"}

FLOAT32 = BY_NAME["float32"]


def prepared(x: np.ndarray, call: Callable[[], object]) -> Prepared:
    """Return an in-place sum over `x`, and its check; the sum of zeros, over and over, stays 0."""

    def check() -> int:
        pattern = np.arange(x.size) % 5
        x[:] = (pattern + hvd.rank()).astype(x.dtype)
        call()
        wanted = (pattern * hvd.size() + sum(range(hvd.size()))).astype(x.dtype)
        wrong = int(np.count_nonzero(x != wanted))
        x[:] = 0
        return wrong

    return call, check


def count_of(nbytes: int, dtype: np.dtype) -> int:
    return max(1, nbytes // dtype.itemsize)


def ours(algorithm: str, dtype: np.dtype = FLOAT32) -> Candidate:
    def prepare(nbytes: int) -> Prepared:
        x = np.empty(count_of(nbytes, dtype), dtype)
        return prepared(x, lambda: hvd.allreduce_(x, op=hvd.Sum, algorithm=algorithm))

    return Candidate(algorithm, prepare)


def ours_in_the_arena(dtype: np.dtype = FLOAT32) -> Candidate:
    def prepare(nbytes: int) -> Prepared:
        x = hvd.empty(count_of(nbytes, dtype), dtype)
        return prepared(x, lambda: hvd.allreduce_(x, op=hvd.Sum, algorithm="shm"))

    return Candidate("arena", prepare)


def mpi_library(comm: MPI.Comm, dtype: np.dtype = FLOAT32) -> Candidate:
    def prepare(nbytes: int) -> Prepared:
        x = np.empty(count_of(nbytes, dtype), dtype)
        return prepared(x, lambda: comm.Allreduce(MPI.IN_PLACE, x, op=MPI.SUM))

    return Candidate("MPI library", prepare, PEER)


def gloo() -> Candidate:
    import torch
    import torch.distributed as dist

    def prepare(nbytes: int) -> Prepared:
        x = np.empty(max(1, nbytes // 4), np.float32)
        tensor = torch.from_numpy(x)
        return prepared(x, lambda: dist.all_reduce(tensor))

    return Candidate("gloo", prepare, PEER)


def horovod() -> Candidate:
    import horovod.torch as horovod
    import torch

    def prepare(nbytes: int) -> Prepared:
        x = np.empty(max(1, nbytes // 4), np.float32)
        tensor, name = torch.from_numpy(x), f"bench.{nbytes}"
        return prepared(x, lambda: horovod.allreduce_(tensor, op=horovod.Sum, name=name))

    return Candidate("Horovod", prepare, PEER)


def on_gpus(device: object) -> list[Candidate]:
    """Return NCCL, and hvdkit on tensors in the same memory."""
    import torch
    import torch.distributed as dist

    import hvdkit.torch as hvd_torch

    start_gloo()
    group = dist.new_group(backend="nccl")

    def candidate(name: str, kind: str, reduce: Callable[[torch.Tensor], object]) -> Candidate:
        def prepare(nbytes: int) -> Prepared:
            x = torch.zeros(max(1, nbytes // 4), device=device)

            def call() -> None:
                reduce(x)
                torch.cuda.synchronize(device)

            def check() -> int:
                pattern = torch.arange(len(x), device=device) % 5
                x.copy_(pattern + hvd.rank())
                call()
                wrong = int((x != pattern * hvd.size() + sum(range(hvd.size()))).sum())
                x.zero_()
                return wrong

            return call, check

        return Candidate(name, prepare, kind)

    return [
        candidate("NCCL", PEER, lambda x: dist.all_reduce(x, group=group)),
        candidate("hvdkit, CUDA", "ours", lambda x: hvd_torch.allreduce_(x, op=hvd_torch.Sum)),
    ]


def can_be_had(algorithm: str) -> bool:
    """Return whether an algorithm runs among these ranks.  Collective."""
    if algorithm in ("arena", "shm"):
        return context().group.arena is not None
    try:
        hvd.allreduce(0.0, algorithm=algorithm)
    except hvd.ArgumentError:
        return False
    return True


def candidates(
    algorithms: list[str], peers: list[str], dtype: np.dtype = FLOAT32
) -> list[Candidate]:
    """Return all that take turns, the roofs included.  Collective."""
    found = [
        ours_in_the_arena(dtype) if name == "arena" else ours(name, dtype)
        for name in algorithms
        if can_be_had(name)
    ]
    if "mpi" in peers and dtype.name not in ("float16", "bfloat16"):  # which MPI has not
        found.append(mpi_library(MPI.COMM_WORLD.Dup(), dtype))
    if dtype == FLOAT32:
        if "gloo" in peers and start_gloo():
            found.append(gloo())
        if "horovod" in peers and start_horovod("torch"):
            found.append(horovod())
        device = gpu_of_this_rank() if "nccl" in peers else None
        if device is not None:
            found += on_gpus(device)
    return found + roofs("allreduce")


def main() -> None:
    schedules = ["auto", "arena", "shm", *ALGORITHMS["allreduce"]]
    parser = options.parser(
        __doc__,
        sizes=Choice(SIZES, short=SHORT_SIZES),
        algorithms=Choice(schedules, WAYS),
        peers=Choice(PEERS, PEERS),
        dtype=Choice(["float32"], list(BY_NAME)),
    )
    args = options.start(parser)
    measuring.show_machine()
    results = []
    for dtype in args.dtype:
        what = "allreduce" if dtype == "float32" else f"allreduce, {dtype}"
        everyone = candidates(args.algorithms, args.peers, BY_NAME[dtype])
        missing = sorted({*args.algorithms} - {candidate.name for candidate in everyone})
        if missing and hvd.rank() == 0:
            print(f"not to be had here: {', '.join(missing)}")
        results += measuring.run(what, args.sizes, everyone, turns=args.turns)
    measuring.report("allreduce", results, args.out)


if __name__ == "__main__":
    main()
