"""Lossy compression learns the digits as well as none does."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

import hvdkit.torch as hvd

RANK, SIZE = hvd.rank(), hvd.size()

pytestmark = pytest.mark.skipif(SIZE not in (2, 3), reason="two and three ranks will do")

COMPRESSIONS = {
    "fp16": hvd.Compression.fp16,
    "bf16": hvd.Compression.bf16,
    "int8": hvd.Compression.int8,
    "topk": hvd.Compression.topk(0.02),
    "powersgd": hvd.Compression.powersgd(2),
}


def accuracy_with(compression):
    """Train an MLP on this rank's part of every batch; return the test accuracy."""
    torch.manual_seed(5)
    digits = load_digits()
    images = torch.from_numpy(digits.data).float() / 16
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images))
    train, test = order[:1440], order[1440:]
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        model.named_parameters(),
        compression=compression,
    )
    for _ in range(10):
        for batch in train[torch.randperm(len(train))].split(60):
            mine = batch[RANK::SIZE]
            optimizer.zero_grad()
            functional.cross_entropy(model(images[mine]), labels[mine]).backward()
            optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert torch.equal(weights, hvd.broadcast(weights, 0)), "the same bits on every rank"
    with torch.no_grad():
        return (model(images[test]).argmax(1) == labels[test]).double().mean().item()


def test_within_one_percent():
    plain = accuracy_with(hvd.Compression.none)
    assert plain > 0.95
    found = {name: accuracy_with(compression) for name, compression in COMPRESSIONS.items()}
    assert min(found.values()) > plain - 0.01, f"none {plain}, {found}"
