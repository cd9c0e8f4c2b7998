"""A model that does not fit one rank, by its sizes and in fact, trains over four."""

import re

import pytest
from launching import run

pytest.importorskip("torch")

SECONDS = 120

#: Sixteen layers; with gradients and Adam's state each takes 16 MiB, all together 256.  What the
#: system allows is half as much again as the limit: optimizers and allocators need room as well.
MODEL = """
    import resource
    import torch
    import hvdkit.torch as hvd
    from hvdkit.torch.pipeline import PipelineModule

    torch.set_num_threads(1)
    hvd.init()
    LIMIT = 128 << 20
    HARD = resource.getrlimit(resource.RLIMIT_DATA)[1]

    def say(*words):
        print(f"[{' '.join(map(str, words))}]", flush=True)

    def pipeline(count, width, **how):
        layers = [lambda: torch.nn.Linear(width, width, bias=False)] * count
        return PipelineModule(layers, torch.nn.functional.mse_loss, **how)

    def train(model, width):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        losses = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, width, generator=generator)
            optimizer.zero_grad()
            losses.append(model(x, x.sin()).item())
            optimizer.step()
        return " ".join(f"{loss:.4f}" for loss in losses)

    def in_use():
        with open("/proc/self/status") as status:
            (line,) = (line for line in status if line.startswith("VmData"))
        return int(line.split()[1]) << 10

    train(pipeline(16, 8), 8)  # threads, and whatever else is there from now on
"""

ON_ONE = (
    MODEL
    + """
    try:
        pipeline(16, 1024, memory_limit=LIMIT)
    except hvd.ArgumentError as exc:
        say("refused", *str(exc).split())
    resource.setrlimit(resource.RLIMIT_DATA, (in_use() + LIMIT * 3 // 2, HARD))
    try:
        train(pipeline(16, 1024), 1024)
    except (RuntimeError, MemoryError) as exc:
        say("failed", "memory" in str(exc))
    resource.setrlimit(resource.RLIMIT_DATA, (HARD, HARD))
    say("losses", train(pipeline(16, 1024), 1024))
"""
)

ON_SEVERAL = (
    MODEL
    + """
    resource.setrlimit(resource.RLIMIT_DATA, (in_use() + LIMIT * 3 // 2, HARD))
    model = pipeline(16, 1024, memory_limit=LIMIT)
    say("losses", train(model, 1024))
    say("rank", hvd.rank(), len(list(model.parameters())), *model.partition.rank_bytes)
"""
)


@pytest.fixture(scope="module")
def on_one():
    """What one rank says, by its first word."""
    outcome = run(ON_ONE, 1, timeout=SECONDS)
    assert outcome.status == 0, outcome.stderr
    return dict(re.findall(r"\[(\w+) (.*?)\]\n", outcome.stdout))


def test_one_rank_is_refused_with_the_sizes(on_one):
    assert "256.00 MiB of 128.00 MiB, 128.00 MiB too much" in on_one["refused"]
    assert on_one["refused"].endswith("2 ranks would do")


def test_one_rank_has_not_enough(on_one):
    """The limit that the others train within is real."""
    assert on_one["failed"] == "True"


def test_four_ranks_train_within_the_limit(on_one):
    """With the losses of one rank that has no limit."""
    outcome = run(ON_SEVERAL, 4, timeout=SECONDS)
    assert outcome.status == 0, outcome.stderr
    said = sorted(re.findall(r"\[(.*?)\]\n", outcome.stdout))
    assert said[:4] == [f"losses {on_one['losses']}"] * 4
    sizes = " ".join([str(64 << 20)] * 4)
    assert said[4:] == [f"rank {rank} 4 {sizes}" for rank in range(4)]
