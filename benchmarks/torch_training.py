"""PyTorch: collectives by name and whole training steps, beside gloo (and Horovod) in one run.

    mpirun -n 2 python benchmarks/torch_training.py [--only named step] [--out FILE.json]

``named``: a synchronous all-reduce of 4 bytes, and 60 tensors of 100 KiB started one by one and
then waited for.  ``step``: forward, backward and update of a CNN and of a small GPT, with hvdkit's
DistributedOptimizer, with DistributedDataParallel over gloo and over hvdkit, and alone, without any
communication.  See measuring.py for the method.
"""

from __future__ import annotations

from collections.abc import Callable

import measuring
import options
import torch
import torch.distributed as dist
from measuring import Candidate, Prepared
from options import Choice
from peers import start_gloo, start_horovod
from records import OURS, PEER
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import hvdkit.torch as hvd

TENSORS, KIB = 60, 1024

PEERS = ["gloo", "horovod"]

Step = Callable[[], object]


# By name


def named_allreduce(tensors: int, library: str) -> Candidate:
    """All-reduce one tensor and wait for it, or start many and then wait for all."""

    def prepare(nbytes: int) -> Prepared:
        data = [torch.zeros(max(1, nbytes // tensors // 4)) for _ in range(tensors)]
        call = starters()[library](data)

        def check() -> int:
            for number, x in enumerate(data):
                x.copy_(torch.arange(len(x)) % 5 + hvd.rank() + number)
            call()
            ranks = torch.arange(hvd.size()).sum()
            wrong = 0
            for number, x in enumerate(data):
                wanted = (torch.arange(len(x)) % 5 + number) * hvd.size() + ranks
                wrong += int((x != wanted).sum())
                x.zero_()
            return wrong

        return call, check

    return Candidate(library, prepare, OURS if library == "hvdkit" else PEER)


def starters() -> dict[str, Callable[[list[torch.Tensor]], Step]]:
    return {"hvdkit": with_hvdkit, "gloo": with_gloo, "Horovod": with_horovod}


def with_hvdkit(data: list[torch.Tensor]) -> Step:
    names = [f"tensor.{len(data)}.{number}" for number in range(len(data))]
    if len(data) == 1:
        return lambda: hvd.allreduce_(data[0], op=hvd.Sum, name=names[0])

    def call() -> None:
        pairs = zip(data, names, strict=True)
        for handle in [hvd.allreduce_async_(x, op=hvd.Sum, name=name) for x, name in pairs]:
            hvd.synchronize(handle)

    return call


def with_gloo(data: list[torch.Tensor]) -> Step:
    def call() -> None:
        for work in [dist.all_reduce(x, async_op=True) for x in data]:
            work.wait()

    return call


def with_horovod(data: list[torch.Tensor]) -> Step:
    import horovod.torch as horovod

    names = [f"tensor.{len(data)}.{number}" for number in range(len(data))]

    def call() -> None:
        pairs = zip(data, names, strict=True)
        handles = [horovod.allreduce_async_(x, op=horovod.Sum, name=name) for x, name in pairs]
        for handle in handles:
            horovod.synchronize(handle)

    return call


# Training steps


class Attention(nn.Module):
    """Causal self-attention, several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.project(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.merge(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


def gpt() -> tuple[nn.Module, torch.Tensor]:
    """Return a GPT of 3.4 million parameters, and bytes of text."""
    width = 256
    model = nn.Sequential(
        nn.Embedding(256, width),
        *(Block(width, heads=4) for _ in range(4)),
        nn.LayerNorm(width),
        nn.Linear(width, 256),
    )
    return model, torch.randint(256, (2, 32))


def cnn() -> tuple[nn.Module, torch.Tensor]:
    """Return a CNN of 2.5 million parameters, and images."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 600),
        nn.ReLU(),
        nn.Linear(600, 10),
    )
    return model, torch.randn(8, 3, 32, 32)


def loss_of(model: nn.Module, data: torch.Tensor) -> torch.Tensor:
    """Return a loss that needs no labels: predict the next byte, or class 0."""
    if data.dtype == torch.int64:
        logits = model(data[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
    return functional.cross_entropy(model(data), torch.zeros(len(data), dtype=torch.int64))


def training_step(
    build: Callable[[], tuple[nn.Module, torch.Tensor]], how: str, group: object
) -> Candidate:
    def prepare(_: int) -> Prepared:
        torch.manual_seed(3)  # the same weights on all ranks
        model, data = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if how == "hvdkit":
            named = model.named_parameters()
            optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=named)
        elif how == "Horovod":
            import horovod.torch as horovod

            optimizer = horovod.DistributedOptimizer(optimizer, model.named_parameters())
        elif how.startswith("DDP"):
            model = DistributedDataParallel(model, process_group=group)

        def call() -> None:
            optimizer.zero_grad()
            loss_of(model, data).backward()
            optimizer.step()

        def check() -> int:
            torch.manual_seed(hvd.rank())
            data.copy_(torch.randint_like(data, 256) if data.dtype == torch.int64 else data * 1)
            call()
            weights = torch.cat([p.detach().flatten() for p in model.parameters()])
            return int((weights != hvd.broadcast(weights, 0)).sum()) if how != "alone" else 0

        return call, check

    return Candidate(how, prepare, OURS if "hvdkit" in how else PEER)


def parameters(build: Callable[[], tuple[nn.Module, torch.Tensor]]) -> int:
    return 4 * sum(p.numel() for p in build()[0].parameters())


def main() -> None:
    parser = options.parser(__doc__, peers=Choice(PEERS, PEERS))
    parser.add_argument("--only", nargs="+", default=["named", "step"], choices=["named", "step"])
    args = options.start(parser)
    torch.set_num_threads(1)
    measuring.show_machine()
    start_gloo()
    libraries = ["hvdkit"] + ["gloo"] * ("gloo" in args.peers)
    libraries += ["Horovod"] * ("horovod" in args.peers and start_horovod("torch"))
    results = []
    if "named" in args.only:
        for what, tensors, nbytes in (
            ("named allreduce", 1, 4),
            ("60 asynchronous allreduces", TENSORS, TENSORS * 100 * KIB),
        ):
            candidates = [named_allreduce(tensors, library) for library in libraries]
            results += measuring.run(what, [nbytes], candidates, turns=args.turns)
    if "step" in args.only:
        import hvdkit.torch.c10d  # noqa: F401  (registers the backend)

        over_hvdkit = dist.new_group(backend="hvdkit")
        for build in (cnn, gpt):
            hows = [
                "hvdkit",
                *["DDP over gloo"] * ("gloo" in libraries),
                "DDP over hvdkit",
                "alone",
            ]
            hows += ["Horovod"] * ("Horovod" in libraries)
            candidates = [
                training_step(build, how, over_hvdkit if how == "DDP over hvdkit" else None)
                for how in hows
            ]
            what = f"step of a {build.__name__.upper()}"
            results += measuring.run(what, [parameters(build)], candidates, turns=args.turns)
    measuring.report("torch", results, args.out)


if __name__ == "__main__":
    main()
