"""A training step's communication, against what the memory can do at best, in one run.

    mpirun -n 2 python benchmarks/step.py [--parameters 10000000] [--out FILE.json]

Pack: copy every gradient into its bucket.  Reduce: all-reduce the buckets.  Unpack: copy them back.
The roof is the same copies, with one pass in place (read and write every byte once) for the
all-reduce, by all ranks at the same time.  Gradients that are views of the buckets, as in
hvdkit.torch, need no unpacking; "views" is the step without it.
"""

from __future__ import annotations

import measuring
import numpy as np
import options
from measuring import Candidate, Prepared
from records import ROOF

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.engine.bucketing import Gradient


def layers(parameters: int) -> list[int]:
    """Return the sizes of a model's gradients: weights of growing width, each with its bias."""
    widths = np.geomspace(64, 1024, 20)
    shares = widths**2 / np.sum(widths**2)
    return [n for share in shares for n in (int(share * parameters), int(share**0.5 * 1024))]


def step(gradients: list[np.ndarray], *, unpack: bool) -> Candidate:
    reducer = context().gradient_reducer(
        [Gradient(str(i), g.shape, g.dtype) for i, g in enumerate(gradients)]
    )

    def call() -> None:
        for index in reversed(range(len(gradients))):
            np.copyto(reducer.views[index], gradients[index])
            reducer.ready(index)
        reducer.finish()
        if unpack:
            for gradient, view in zip(gradients, reducer.views, strict=True):
                np.copyto(gradient, view)

    def check() -> int:
        for gradient in gradients:
            gradient[:] = hvd.rank()
        call()
        mean = (hvd.size() - 1) / 2
        results = gradients if unpack else reducer.views
        wrong = sum(int(np.count_nonzero(array != mean)) for array in results)
        for gradient in gradients:
            gradient[:] = 0
        return wrong

    def prepare(_: int) -> Prepared:
        return call, check

    return Candidate("step" if unpack else "step, views", prepare)


def roof(gradients: list[np.ndarray], *, unpack: bool) -> Candidate:
    places = [np.zeros_like(gradient) for gradient in gradients]
    flat = np.zeros(sum(gradient.size for gradient in gradients), np.float32)

    def call() -> None:
        for gradient, place in zip(gradients, places, strict=True):
            np.copyto(place, gradient)
        np.add(flat, np.float32(1), out=flat)
        if unpack:
            for gradient, place in zip(gradients, places, strict=True):
                np.copyto(gradient, place)

    def prepare(_: int) -> Prepared:
        return call, lambda: 0

    return Candidate("roof" if unpack else "roof, views", prepare, ROOF)


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    args = options.start(parser)
    measuring.show_machine()
    gradients = [np.zeros(n, np.float32) for n in layers(args.parameters)]
    nbytes = sum(gradient.nbytes for gradient in gradients)
    everyone = [kind(gradients, unpack=u) for u in (True, False) for kind in (step, roof)]
    results = measuring.run("training step", [nbytes], everyone, turns=args.turns)
    measuring.report("step", results, args.out)


if __name__ == "__main__":
    main()
