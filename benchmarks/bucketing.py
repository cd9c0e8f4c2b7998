"""All gradients of a model, reduced in buckets of several sizes, one by one, and by the peers.

    mpirun -n 2 python benchmarks/bucketing.py [--sizes 1MiB 25MiB] [--models ResNet-50]

The gradients are views of the buckets, as in hvdkit.torch, and all come at once, in the order in
which backward yields them: this is a step's communication alone.  Where it overlaps with backward,
the first bucket should not wait for half the model, and what is best is rather smaller: that is
the whole step of a perceptron, which is measured as well.

"default" is what is taken without a tuning, "tuned" what `hvdkit tune` has found for these ranks.
"one by one" is one all-reduce for each tensor.  The MPI library reduces every tensor by itself, and
flat buckets of 25 MiB; gloo reduces flat buckets of 25 MiB, as DistributedDataParallel does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import measuring
import models
import numpy as np
import options
from measuring import Candidate, Prepared
from mpi4py import MPI
from options import Choice
from peers import start_gloo
from perceptron import Perceptron
from records import BUCKET, DEFAULT, PEER, TUNED, Result
from tables import human_size, human_time

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.config import BUCKET_BYTES, MIB
from hvdkit.engine.bucketing import plan_buckets
from hvdkit.engine.reducer import GradientReducer

SIZES = ["256KiB", "1MiB", "4MiB", "16MiB", "25MiB", "64MiB"]
SHORT_SIZES = ["1MiB", "4MiB", "25MiB", "64MiB"]

#: All-reduces all of some buffers.
Reduce = Callable[[list[np.ndarray]], object]

#: What DistributedDataParallel takes by default.
DDP_BUCKET = 25 * MIB


def choices(sizes: list[int]) -> dict[str, int]:
    """Return the bytes of a bucket by name: each of `sizes`, and what the job would take itself."""
    found = {human_size(size): size for size in sorted(set(sizes))}
    tuning = context().tuning
    if tuning is not None and tuning.bucket_bytes is not None:
        found[TUNED] = tuning.bucket_bytes
    return {**found, DEFAULT: BUCKET_BYTES}


def reducer_of(shapes: list[models.Shape], bucket_bytes: int) -> tuple[GradientReducer, dict]:
    """Return the buckets of gradients that come in reverse order, and notes on them.  Collective.

    Args:
        shapes: of the gradients, in the order of creation.
        bucket_bytes: the most in a bucket; 0: every gradient by itself.
    """
    reducer = context().gradient_reducer(models.gradients_of(shapes), bucket_bytes=bucket_bytes)
    reducer.keep_plan()
    return reducer, {BUCKET: bucket_bytes, "buckets": len(reducer.buckets)}


def in_buckets(name: str, shapes: list[models.Shape], bucket_bytes: int) -> Candidate:
    """Return hvdkit's way: all gradients at once."""
    reducer, notes = reducer_of(shapes, bucket_bytes)

    def call() -> None:
        for index in reversed(range(len(shapes))):
            reducer.ready(index)
        reducer.finish()

    def check() -> int:
        for view in reducer.views:
            view[...] = hvd.rank()
        call()
        mean = (hvd.size() - 1) / 2
        wrong = sum(int(np.count_nonzero(view != mean)) for view in reducer.views)
        for view in reducer.views:
            view[...] = 0
        return wrong

    return Candidate(name, lambda _: (call, check), notes=notes)


def while_training(name: str, model: Perceptron, bucket_bytes: int) -> Candidate:
    """Return a whole training step."""
    reducer, notes = reducer_of(model.shapes, bucket_bytes)

    def prepare(_: int) -> Prepared:
        return partial(model.step, reducer), partial(model.wrong, reducer)

    return Candidate(name, prepare, notes=notes)


def on_flat(
    name: str, counts: list[int], reduce: Callable[[list[np.ndarray]], object]
) -> Candidate:
    """Return a peer's way: sums of float32 buffers of these lengths, which it then divides."""

    def prepare(_: int) -> Prepared:
        buffers = [np.zeros(count, np.float32) for count in counts]

        def call() -> None:
            reduce(buffers)
            for buffer in buffers:
                np.divide(buffer, hvd.size(), out=buffer)

        def check() -> int:
            for buffer in buffers:
                buffer[:] = hvd.rank()
            call()
            mean = (hvd.size() - 1) / 2
            wrong = sum(int(np.count_nonzero(buffer != mean)) for buffer in buffers)
            for buffer in buffers:
                buffer[:] = 0
            return wrong

        return call, check

    return Candidate(name, prepare, PEER)


def with_mpi(comm: MPI.Comm) -> Reduce:
    def reduce(buffers: list[np.ndarray]) -> None:
        for buffer in buffers:
            comm.Allreduce(MPI.IN_PLACE, buffer, op=MPI.SUM)

    return reduce


def with_gloo() -> Reduce:
    import torch
    import torch.distributed as dist

    def reduce(buffers: list[np.ndarray]) -> None:
        work = [dist.all_reduce(torch.from_numpy(x), async_op=True) for x in buffers]
        for one in work:
            one.wait()

    return reduce


def candidates(
    shapes: list[models.Shape], sizes: list[int], peers: list[str], comm: MPI.Comm
) -> list[Candidate]:
    """Return all that take turns.  Collective."""
    ways = {"one by one": 0, **choices(sizes)}
    found = [in_buckets(name, shapes, size) for name, size in ways.items()]
    alone = [int(np.prod(shape)) for shape in shapes]
    flat = [bucket.count for bucket in plan_buckets(models.gradients_of(shapes), DDP_BUCKET)]
    if "mpi" in peers:
        found.append(on_flat("MPI library, one by one", alone, with_mpi(comm)))
        found.append(on_flat("MPI library, 25 MiB", flat, with_mpi(comm)))
    if "gloo" in peers and start_gloo():
        found.append(on_flat("gloo, 25 MiB", flat, with_gloo()))
    return found


def show_best(results: list[Result]) -> None:
    """Print which size was the fastest, which others cannot be told from it, and what was chosen.

    A choice is held against the fixed sizes: it is one of them, measured a second time.
    """
    mine = {r.name: r for r in results if BUCKET in r.notes}
    chosen = {name: mine.pop(name) for name in (DEFAULT, TUNED) if name in mine}
    best = min(mine.values(), key=lambda r: r.seconds)
    alike = [r.name for r in mine.values() if r is not best and r.interval[0] <= best.interval[1]]
    also = f"; no slower within the noise: {', '.join(alike)}" if alike else ""
    print(f"\n{best.what}: best bucket size {best.name}, {human_time(best.seconds)}{also}")
    for name, r in chosen.items():
        size, ratio = human_size(int(r.notes[BUCKET])), best.seconds / r.seconds
        print(f"  {name}, {size}: {human_time(r.seconds)}, {ratio:.2f} times as fast as the best")


def main() -> None:
    parser = options.parser(
        __doc__,
        sizes=Choice(SIZES, short=SHORT_SIZES),
        peers=Choice(["mpi", "gloo"], ["mpi", "gloo"]),
    )
    parser.add_argument("--models", nargs="+", default=[*models.MODELS], choices=[*models.MODELS])
    parser.add_argument("--no-training", action="store_true", help="no whole training step")
    parser.add_argument("--width", type=float, help="of the models; 1: as they are")
    args = options.start(parser)
    measuring.show_machine()
    comm = MPI.COMM_WORLD.Dup()
    results = []
    for name in args.models:
        shapes_of, usual = models.MODELS[name]
        width = args.width or usual
        shapes = shapes_of(width)
        what = f"gradients of {name}, width {width:g}"
        everyone = candidates(shapes, args.sizes, args.peers, comm)
        results += measuring.run(what, [models.bytes_of(shapes)], everyone, turns=args.turns)
    if not args.no_training:
        model = Perceptron()
        everyone = [while_training(name, model, n) for name, n in choices(args.sizes).items()]
        whole = [models.bytes_of(model.shapes)]
        results += measuring.run("step of a perceptron", whole, everyone, turns=args.turns)
    if hvd.rank() == 0:
        if context().tuning is None:
            print("\nnot tuned: hvdkit tune finds a bucket size for this machine")
        for what in dict.fromkeys(r.what for r in results):
            show_best([r for r in results if r.what == what])
    measuring.report("bucketing", results, args.out)


if __name__ == "__main__":
    main()
