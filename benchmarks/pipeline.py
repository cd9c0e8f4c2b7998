"""Pipelines: each schedule's bubble against its formula, and a GPT's step beside PyTorch's own.

    mpirun -n 4 python benchmarks/pipeline.py [--only sleeping model] [--out FILE.json]

``sleeping``: stages that sleep a fixed time for each microbatch, so that the measured bubble is the
schedule's and the courier's alone.  The step is timed on the slowest rank.

``model``: forward and backward of a GPT, sharded over all ranks, by hvdkit's PipelineModule with
each schedule and by torch.distributed.pipelining over gloo, in turns; ``ideal`` is one rank's time
for the same batch divided by the ranks, or by the cores where these are fewer.  Peak memory is what
autograd holds for backward at once.  See measuring.py.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import measuring
import numpy as np
import options
import torch
import torch.distributed as dist
from measuring import Candidate, Prepared, Result
from options import Choice
from peers import start_gloo
from records import PEER, ROOF
from tables import human_time
from torch import nn
from torch.distributed import pipelining
from torch_training import Block

import hvdkit
import hvdkit.torch as hvd
from hvdkit.api import context
from hvdkit.parallel.pipeline import registry
from hvdkit.parallel.pipeline.executor import Bundle, Executor, edges_of
from hvdkit.parallel.pipeline.instructions import Times

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1")
CHUNKS = {"interleaved": 2}
MICROBATCHES = 8

#: Seconds that a stage sleeps for forward, gradient of its input, gradient of its weights.
SLEEPS = Times(0.02, 0.02, 0.02)

#: What a formula's result is: the least that a step can take.
FORMULA = Candidate("formula", lambda _: (lambda: None, lambda: 0), ROOF)

#: The parameters of the model that was made last, on this rank.
Weights = list[torch.Tensor]

WIDTH, VOCABULARY, LENGTH, ROWS = 256, 256, 64, 16


# Sleeping stages


@dataclass
class Sleeper:
    """Stages that compute nothing, for as long as told."""

    share: float
    """Of a rank's layers that a stage has."""

    def forward(self, *_: object) -> dict[str, Bundle]:
        time.sleep(SLEEPS.forward * self.share)
        return {"": [np.zeros(1024, np.float32)]}

    def backward(self, *_: object, weights: bool) -> dict[str, Bundle]:
        both = SLEEPS.backward_input + (SLEEPS.backward_weight if weights else 0)
        time.sleep(both * self.share)
        return {"": [np.zeros(1024, np.float32)]}

    def backward_weight(self, *_: object) -> None:
        time.sleep(SLEEPS.backward_weight * self.share)


def sleeping(steps: int = 5) -> list[Result]:
    """Measure the bubbles, and print them beside the formulas; return both as times of a step."""
    ranks, rank = hvd.size(), hvd.rank()
    courier = context().courier(context().world)
    work = MICROBATCHES * float(SLEEPS.forward + SLEEPS.backward_input + SLEEPS.backward_weight)
    results = []
    bar = measuring.progress(steps * len(SCHEDULES), "step")
    if rank == 0:
        print(f"\nsleeping stages, {ranks} ranks, {MICROBATCHES} microbatches")
        print(f"  {'':<14}{'step':>11}{'bubble':>9}{'formula':>9}{'difference, points':>20}")
    for name in SCHEDULES:
        schedule, chunks = registry.get(name), CHUNKS.get(name, 1)
        plan = schedule.plan(ranks, MICROBATCHES, chunks)[rank]
        executor = Executor(courier, edges_of(ranks * chunks), Sleeper(1 / chunks))
        mine = np.empty(steps)
        for step in range(steps):
            hvd.barrier()
            began = time.perf_counter()
            executor.run(plan)
            mine[step] = time.perf_counter() - began
            bar.update()
        seconds = np.asarray(hvdkit.allreduce(mine, op=hvd.Max))
        formula = float(schedule.bubble(ranks, MICROBATCHES, chunks, SLEEPS))
        bubble = 1 - work / float(np.median(seconds))
        results += [
            measuring.result("sleeping stages", name, 4096, seconds),
            measuring.result(
                "sleeping stages",
                f"{name}, by the formula",
                4096,
                [work / (1 - formula)],
                of=FORMULA,
            ),
        ]
        if rank == 0:
            print(
                f"  {name:<14}{human_time(results[-2].seconds):>11}{bubble:>9.1%}"
                f"{formula:>9.1%}{100 * (bubble - formula):>20.1f}"
            )
    bar.close()
    return results


# A GPT


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(x) + self.positions.weight


def layers(blocks: int) -> list[nn.Module]:
    """Return a GPT's layers, the same on every rank."""
    torch.manual_seed(3)
    return [
        Embedding(),
        *(Block(WIDTH, heads=4) for _ in range(blocks)),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, VOCABULARY),
    ]


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def lengths(blocks: int, stages: int) -> list[int]:
    """Return how many layers each stage has: the blocks evenly, the ends with their neighbours."""
    even = [blocks * (i + 1) // stages - blocks * i // stages for i in range(stages)]
    even[0] += 1
    even[-1] += 2
    return even


def ours(name: str, blocks: int, losses: dict[str, float], weights: Weights) -> Candidate:
    def prepare(_: int) -> Prepared:
        chunks = CHUNKS.get(name, 1)
        model = hvd.PipelineModule(
            layers(blocks),
            loss_of,
            schedule=name,
            microbatches=MICROBATCHES,
            chunks=chunks,
            partition=lengths(blocks, hvd.size() * chunks),
        )
        weights.extend(model.parameters())
        x, y = batch()

        def call() -> None:
            model.zero_grad()
            losses[name] = model(x, y).item()

        return call, lambda: check(call, losses, name)

    return Candidate(f"hvdkit {name}", prepare)


def torchs(name: str, blocks: int, losses: dict[str, float], weights: Weights) -> Candidate:
    """Return PyTorch's own pipeline of one stage a rank."""
    kind = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B}[name]

    def prepare(_: int) -> Prepared:
        rank, size = hvd.rank(), hvd.size()
        ends = np.cumsum([0, *lengths(blocks, size)])
        module = nn.Sequential(*layers(blocks)[ends[rank] : ends[rank + 1]])
        stage = pipelining.PipelineStage(module, rank, size, torch.device("cpu"))
        schedule = kind(stage, MICROBATCHES, loss_fn=loss_of)
        weights.extend(module.parameters())
        x, y = batch()

        def call() -> None:
            module.zero_grad()
            found: list[torch.Tensor] = []
            arguments = (x,) if rank == 0 else ()
            if rank == size - 1:
                schedule.step(*arguments, target=y, losses=found)
            else:
                schedule.step(*arguments)
            mean = float(torch.stack(found).detach().mean()) if found else 0.0
            losses[f"torch {name}"] = hvd.allreduce(torch.tensor(mean), op=hvd.Sum).item()

        return call, lambda: check(call, losses, f"torch {name}")

    return Candidate(f"torch {name}, gloo", prepare, PEER)


def alone(blocks: int, losses: dict[str, float], weights: Weights) -> Candidate:
    """Return one rank's training of the whole model, in turn, the others idle."""

    def prepare(_: int) -> Prepared:
        model = nn.Sequential(*layers(blocks)) if hvd.rank() == 0 else None
        weights.extend(model.parameters() if model is not None else ())
        x, y = batch()

        def call() -> None:
            if model is not None:
                model.zero_grad()
                total = 0.0
                parts = zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES), strict=True)
                for part, target in parts:
                    loss = loss_of(model(part), target) / MICROBATCHES
                    loss.backward()
                    total += loss.item()
                losses["alone"] = total

        def test() -> int:
            call()
            losses["alone"] = hvd.broadcast_object(losses.get("alone"), 0)
            return 0

        return call, test

    return Candidate("one rank alone", prepare, PEER)


def check(call: Callable[[], None], losses: dict[str, float], name: str) -> int:
    """Return 1 if the loss is not that of one rank alone."""
    call()
    return int(abs(losses[name] - losses["alone"]) > 1e-4 * losses["alone"])


def peak_saved(call: Callable[[], object], weights: list[torch.Tensor]) -> int:
    """Return the most bytes that autograd holds at once in a call, weights left out."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    held: Counter[int] = Counter()
    now = peak = 0

    def release(pointer: int, nbytes: int) -> None:
        nonlocal now
        held[pointer] -= 1
        now -= nbytes * (held[pointer] == 0)

    def pack(tensor: torch.Tensor) -> _Saved:
        nonlocal now, peak
        saved, storage = _Saved(tensor), tensor.untyped_storage()
        pointer, nbytes = storage.data_ptr(), storage.nbytes()
        if pointer not in own:
            now += nbytes * (held[pointer] == 0)
            peak = max(peak, now)
            held[pointer] += 1
            weakref.finalize(saved, release, pointer, nbytes)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        call()
    return peak


@dataclass(eq=False)
class _Saved:
    tensor: torch.Tensor


def model_steps(blocks: int, turns: int, peers: list[str]) -> list[Result]:
    """Measure steps of a GPT, and print what it comes to."""
    losses: dict[str, float] = {}
    weights: Weights = []
    candidates = [alone(blocks, losses, weights)]
    candidates += [ours(name, blocks, losses, weights) for name in SCHEDULES]
    if "gloo" in peers:
        candidates += [torchs(name, blocks, losses, weights) for name in ("gpipe", "1f1b")]
    nbytes = 4 * sum(p.numel() for layer in layers(blocks) for p in layer.parameters())
    results = measuring.run("pipelined step of a GPT", [nbytes], candidates, turns=turns)
    peaks = {}
    for candidate in candidates:
        weights.clear()
        call, _ = candidate.prepare(nbytes)
        mine = np.array([peak_saved(call, weights) / 2**20])
        peaks[candidate.name] = hvdkit.allgather(mine)
    if hvd.rank() == 0:
        workers = min(hvd.size(), len(os.sched_getaffinity(0)))
        ideal = results[0].seconds / workers
        print(f"\nideal: {human_time(ideal)}, {workers} cores at work all the time")
        print(f"  {'':<22}{'x ideal':>9}   held for backward on each rank, MiB")
        for result in results:
            sizes = ", ".join(f"{size:.0f}" for size in peaks[result.name])
            print(f"  {result.name:<22}{result.seconds / ideal:>9.2f}   {sizes}")
    return results


def main() -> None:
    parser = options.parser(__doc__, turns=15, peers=Choice(["gloo"], ["gloo"]))
    parts = ["sleeping", "model"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--blocks", type=int, default=8, help="of the GPT")
    args = options.start(parser)
    torch.set_num_threads(1)
    measuring.show_machine()
    results: list[Result] = []
    if "sleeping" in args.only:
        results += sleeping()
    if "model" in args.only:
        start_gloo()
        results += model_steps(args.blocks, args.turns, args.peers)
        dist.destroy_process_group()
    if results:
        measuring.report("pipeline", results, args.out)


if __name__ == "__main__":
    main()
