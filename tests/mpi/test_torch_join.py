"""Epochs of uneven length: ranks that join, also before their first step, come back in step."""

import torch

import hvdkit.torch as hvd

RANK, SIZE = hvd.rank(), hvd.size()


def test_ranks_that_join_before_their_first_step_plan_with_the_others_later():
    """A plan that the others settled alone would leave this rank waiting for them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters()
    )
    for epoch in range(3):
        for _ in range(RANK if epoch == 0 else 2 + RANK):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).sum().backward()
            optimizer.step()
        last = hvd.join()
        assert 0 <= last < SIZE
        hvd.broadcast_parameters(model.state_dict(), root_rank=last)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert torch.equal(weights, hvd.broadcast(weights, 0))
