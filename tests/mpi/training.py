"""A small model, its batches, and one process that trains on the whole batch as the oracle."""

import torch

import hvdkit.torch as hvd

RANK, SIZE = hvd.rank(), hvd.size()
ROWS = 4  # of each rank


def build(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(5, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)]
    return torch.nn.Sequential(*layers).to(dtype)


def batch_of(step, dtype=torch.float64):
    """Return the whole batch of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS * SIZE, 5, generator=generator, dtype=dtype)
    return x, x.sin() @ torch.ones(5, 3, dtype=dtype)


def mine(tensors, rank=RANK):
    """Return a rank's part of a batch."""
    return [tensor[rank::SIZE] for tensor in tensors]


def loss_of(model, batch):
    x, y = batch
    return torch.nn.functional.mse_loss(model(x), y)


def train(model, optimizer, steps, part, zero_grad=None):
    """Take `steps` with what `part` makes of each batch."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        (zero_grad or optimizer.zero_grad)()
        loss_of(model, part(batch_of(step, dtype))).backward()
        optimizer.step()


def whole(batch):
    return batch


def pair(make=lambda parameters: torch.optim.SGD(parameters, lr=0.1), **how):
    """Return a model with its distributed optimizer, and the same with a plain one."""
    dtype = how.pop("dtype", torch.float64)
    model, reference = build(dtype=dtype), build(dtype=dtype)
    ours = hvd.DistributedOptimizer(make(model.parameters()), model.named_parameters(), **how)
    return model, ours, reference, make(reference.parameters())


def assert_same(found, wanted, tolerance=1e-9):
    """Check that two models, or lists of tensors, are equal but for rounding."""
    for ours, theirs in zip(_tensors(found), _tensors(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def assert_identical(model):
    """Check that all ranks hold the same bits."""
    for tensor in _tensors(model):
        bits = (
            tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor[None].view(torch.uint8)
        )
        everyone = hvd.allgather(bits.reshape(1, -1))
        assert (everyone == everyone[0]).all()


def _tensors(model):
    if isinstance(model, torch.nn.Module):
        model = model.state_dict().values()
    return [tensor.detach() for tensor in model]
