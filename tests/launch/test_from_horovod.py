"""docs/from-horovod.md: what it says is so."""

import re
from dataclasses import fields

import pytest
from launching import run

from hvdkit.config import NOT_CONFIGURATION, Config

from .helpers import REPOSITORY, python

PAGE = (REPOSITORY / "docs/from-horovod.md").read_text()

MISTAKES = """
import time
import torch
import hvdkit.torch as hvd

hvd.init()
rank, x = hvd.rank(), torch.ones(3)


def shape():
    hvd.allreduce(torch.ones(64 if rank == 0 else 32), name="loss")


def collective():
    hvd.broadcast(x, 0, name="weights") if rank == 0 else hvd.allreduce(x, name="loss")


def clipping():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    model(torch.ones(1, 2)).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def joined():
    try:
        if rank == 1:
            hvd.broadcast(x, 1, name="best")
    finally:
        hvd.join()


def stall():
    time.sleep(3 * rank)
    hvd.synchronize(hvd.allreduce_async(x, name="loss"))


def deadlock():
    hvd.synchronize(hvd.allreduce_async(x, name="loss")) if rank else hvd.allreduce(x, name="loss")


for mistake in (shape, collective, clipping, stall, joined, deadlock):
    try:
        mistake()
    except hvd.HvdkitError as error:
        if rank == 1:
            print(f"{type(error).__name__}: {error}", flush=True)
"""


def rows(heading):
    """Return the cells of the tables under a heading of the page."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_links():
    for target in re.findall(r"\]\((\.\./[^)#]+)", PAGE):
        assert (REPOSITORY / "docs" / target).exists(), target


def test_imports():
    pytest.importorskip("torch")
    statements = [there.strip("`") for _, there in rows("What to change") if "import" in there]
    assert len(statements) >= 8
    outcome = python("-c", "\n".join(statements))
    assert outcome.status == 0, outcome.stderr


def test_variables():
    listed = {
        name: here
        for cells in rows("Environment variables")
        for name in re.findall(r"`(HOROVOD_\w+)`", cells[0])
        for here in [cells[1]]
    }
    read = {name for knob in fields(Config) for name in knob.metadata["names"]}
    horovods = {name for name in read if name.startswith("HOROVOD_")} | {"HOROVOD_START_TIMEOUT"}
    assert {name for name, here in listed.items() if here == "honoured"} == horovods
    named = set(re.findall(r"HVDKIT_\w+", PAGE))
    assert named <= read | NOT_CONFIGURATION
    for knob in fields(Config):
        names = knob.metadata["names"]
        if any(name.startswith("HOROVOD_") for name in names):
            assert names[0] in named


def test_errors_are_quoted_as_they_are():
    pytest.importorskip("torch")
    seconds = {"HVDKIT_STALL_CHECK_TIME_SECONDS": "1", "HVDKIT_DEADLOCK_CHECK_TIME_SECONDS": "1"}
    outcome = run(MISTAKES, 2, environment=seconds)
    said = re.sub(r"waited \d+ s", "waited 60 s", outcome.stdout + outcome.stderr)
    quotes = PAGE.partition("## Reading an error")[2].split("```")[1::2]
    assert len(quotes) == 7
    for quote in quotes[:-1]:
        assert quote.strip() in said, quote
    ends = run("import hvdkit as h; h.init(); [][0] if h.rank() else h.barrier()", 2)
    assert quotes[-1].strip().splitlines()[0].replace("Value", "Index") in ends.stderr
