"""hvdkit.torch: tensors in place, and training that equals one process with the whole batch."""

import copy

import numpy as np
import pytest

import hvdkit.torch as hvd

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_collectives_on_every_dtype(dtype):
    x = torch.arange(6).reshape(2, 3).to(dtype)
    total = torch.stack([x] * SIZE).sum(0).to(dtype)
    assert torch.equal(hvd.allreduce(x, op=hvd.Sum), total)
    mine = x.clone()
    assert hvd.allreduce_(mine, op=hvd.Sum) is mine
    assert torch.equal(mine, total)
    assert torch.equal(hvd.allgather(x), x.repeat(SIZE, 1))
    assert torch.equal(hvd.broadcast(x if RANK == 0 else torch.zeros_like(x)), x)
    assert torch.equal(hvd.alltoall(x.repeat(SIZE, 1)), x.repeat(SIZE, 1))
    assert (
        hvd.reducescatter(
            x.repeat(SIZE, 1), op=hvd.Max if dtype.is_floating_point else hvd.Sum
        ).shape
        == x.shape
    )


def test_in_place_on_a_tensor_that_is_not_contiguous():
    x = torch.arange(12.0).reshape(3, 4)
    hvd.allreduce_(x.t()[1:], op=hvd.Sum)
    wanted = torch.arange(12.0).reshape(3, 4)
    wanted[:, 1:] *= SIZE
    assert torch.equal(x, wanted)


def test_alltoall_with_splits():
    received, counts = hvd.alltoall(torch.full((SIZE,), float(RANK)), torch.ones(SIZE, dtype=int))
    assert received.tolist() == [float(rank) for rank in range(SIZE)]
    assert counts.tolist() == [1] * SIZE


def test_what_is_not_a_dense_cpu_tensor():
    with pytest.raises(hvd.UnsupportedError, match=r"torch\.Tensor"):
        hvd.allreduce([1.0])
    with pytest.raises(hvd.UnsupportedError, match="to_dense"):
        hvd.allreduce(torch.eye(3).to_sparse())
    with pytest.raises(hvd.UnsupportedError, match="meta"):
        hvd.allreduce(torch.zeros(3, device="meta"))


def test_a_conjugate_that_torch_has_put_off():
    x = torch.tensor([1 + 2j, 3 - 1j])
    assert torch.equal(hvd.allreduce(x.conj(), op=hvd.Sum), torch.conj_physical(x) * SIZE)
    with pytest.raises(hvd.UnsupportedError, match="resolve_conj"):
        hvd.allreduce_(x.conj())
    with pytest.raises(hvd.UnsupportedError, match="resolve_conj"):
        hvd.broadcast_(x.conj())


def build(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Linear(33, 17), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(17, 4)).to(dtype)


def batch_of(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12 * SIZE, 9, generator=generator, dtype=dtype)
    y = torch.randint(0, 4, (12 * SIZE,), generator=generator)
    return x, y


def loss_of(model, x, y):
    return torch.nn.functional.cross_entropy(model(x), y)


def assert_weights_close(model, reference):
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)


def assert_weights_identical(model):
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    everyone = hvd.allgather(flat[None])
    assert torch.equal(everyone, flat.expand(SIZE, -1))


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("bucket_bytes", [1, 2000, None])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_20_steps_equal_one_process_with_the_whole_batch(kind, set_to_none, bucket_bytes):
    model, reference = build(dtype=torch.float64), build(dtype=torch.float64)
    ours = hvd.DistributedOptimizer(
        OPTIMIZERS[kind](model.parameters()),
        named_parameters=model.named_parameters(),
        bucket_bytes=bucket_bytes,
    )
    theirs = OPTIMIZERS[kind](reference.parameters())
    for step in range(20):
        x, y = batch_of(step, torch.float64)
        ours.zero_grad(set_to_none=set_to_none)
        loss_of(model, x[RANK::SIZE], y[RANK::SIZE]).backward()
        ours.step()
        theirs.zero_grad()
        loss_of(reference, x, y).backward()
        theirs.step()
    assert_weights_close(model, reference)
    assert_weights_identical(model)


def test_without_averaging_the_weights_would_differ():
    """The test above can fail: with plain SGD on shards, the weights do differ."""
    if SIZE == 1:
        pytest.skip("needs several ranks")
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch_of(0)
    loss_of(model, x[RANK::SIZE], y[RANK::SIZE]).backward()
    optimizer.step()
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    everyone = hvd.allgather(flat[None])
    assert not torch.equal(everyone[0], everyone[1])


def test_clipping_between_synchronize_and_step():
    model, reference = build(dtype=torch.float64), build(dtype=torch.float64)
    ours = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    theirs = torch.optim.SGD(reference.parameters(), lr=1.0)
    for step in range(3):
        x, y = batch_of(step, torch.float64)
        for optimizer, net, part in (
            (ours, model, slice(RANK, None, SIZE)),
            (theirs, reference, slice(None)),
        ):
            optimizer.zero_grad()
            loss_of(net, x[part], y[part]).backward()
            if optimizer is ours:
                ours.synchronize()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            optimizer.step()
    assert_weights_close(model, reference)


@several
def test_clipping_while_gradients_are_on_their_way():
    """Found by a user: it gave every rank other weights, in silence."""
    model = build()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), named_parameters=model.named_parameters()
    )
    x, y = batch_of(RANK)
    loss_of(model, x, y).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(hvd.HvdkitError, match=r"'0.weight' was changed between backward\(\) and"):
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with optimizer.skip_synchronize():
        optimizer.step()
    assert_weights_identical(model)


def test_a_closure():
    model, reference = build(dtype=torch.float64), build(dtype=torch.float64)
    x, y = batch_of(1, torch.float64)

    def closure_over(optimizer, net, part):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(net, x[part], y[part])
            loss.backward()
            return loss

        return closure

    ours = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5))
    theirs = torch.optim.SGD(reference.parameters(), lr=0.5)
    for _ in range(3):
        ours.step(closure_over(ours, model, slice(RANK, None, SIZE)))
        theirs.step(closure_over(theirs, reference, slice(None)))
    assert_weights_close(model, reference)


@several
def test_parameters_that_only_some_ranks_use_count_as_zeros():
    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used = torch.nn.Linear(3, 1)
            self.sometimes = torch.nn.Linear(3, 1)

        def forward(self, x):
            return self.used(x).sum() + (self.sometimes(x).sum() if RANK == 0 else 0)

    torch.manual_seed(0)
    model = Branching()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), bucket_bytes=1
    )
    before = model.sometimes.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).backward()
        optimizer.step()
    torch.testing.assert_close(model.sometimes.weight.detach(), before - 2 * 2 / SIZE)
    assert_weights_identical(model)


def test_gradients_set_by_hand():
    weight = torch.nn.Parameter(torch.zeros(5))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0))
    weight.grad = torch.full((5,), float(RANK))
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((5,), -(SIZE - 1) / 2))


def test_mixed_dtypes():
    parameters = [
        torch.nn.Parameter(torch.zeros(7, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    ]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0))
    sum((parameter.double() * (RANK + 1)).sum() for parameter in parameters).backward()
    optimizer.step()
    for parameter in parameters:
        wanted = torch.full((7,), -(SIZE + 1) / 2).to(parameter.dtype)
        assert torch.equal(parameter.detach(), wanted)


def test_schedulers_and_isinstance_go_on_as_before():
    model = build()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    assert isinstance(optimizer, torch.optim.SGD)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    loss_of(model, *batch_of(0)).backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_optimizer_that_is_gone_takes_no_gradients():
    model = build()
    first = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    del first
    second = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    for step in range(2):
        second.zero_grad()
        loss_of(model, *batch_of(step)).backward()
        second.step()
    assert_weights_identical(model)


@several
def test_mistakes():
    model = build()
    with pytest.raises(hvd.ArgumentError, match="names 1 of the optimizer's 6 parameters"):
        hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0),
            named_parameters=list(model.named_parameters())[:1],
        )
    twice = [("same", parameter) for parameter in model.parameters()]
    with pytest.raises(hvd.ArgumentError, match="occur twice: same"):
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), twice)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(hvd.ArgumentError, match="already"):
        hvd.DistributedOptimizer(optimizer)
    loss_of(model, *batch_of(0)).backward()
    with pytest.raises(hvd.HvdkitError, match="zero_grad"):
        optimizer.zero_grad()
    optimizer.step()
    with pytest.raises(hvd.MismatchError, match="differ at gradient"):
        hvd.DistributedOptimizer(
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(3 + (RANK == 0)))], lr=1.0)
        )
    with pytest.raises(hvd.UnsupportedError, match=r"named_parameters\(\), not"):
        hvd.broadcast_parameters(model.parameters())


def test_broadcast_parameters():
    for form in ("state_dict", "named_parameters"):
        model = build(seed=RANK)
        hvd.broadcast_parameters(getattr(model, form)(), root_rank=SIZE - 1)
        wanted = build(seed=SIZE - 1)
        for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_broadcast_optimizer_state(kind):
    """Only the root has been trained, as after reading a checkpoint; and its rate is another."""
    model = build()
    optimizer = OPTIMIZERS[kind](model.parameters())
    if RANK == 0:
        loss_of(model, *batch_of(0)).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.125
    wanted = copy.deepcopy(optimizer.state_dict()) if RANK == 0 else None
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    wanted = hvd.broadcast_object(wanted, 0)
    state = optimizer.state_dict()
    assert state["param_groups"] == wanted["param_groups"]
    assert state["state"].keys() == wanted["state"].keys()
    for index, entries in wanted["state"].items():
        for name, value in entries.items():
            mine = state["state"][index][name]
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(value))
