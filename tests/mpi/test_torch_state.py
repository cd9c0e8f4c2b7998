"""Starting all ranks alike: parameters, optimizer state and objects from one of them."""

import copy

import pytest

import hvdkit.torch as hvd

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from training import (  # noqa: E402  (torch may be missing)
    assert_identical,
    assert_same,
    batch_of,
    build,
    loss_of,
    mine,
    train,
    whole,
)

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")
roots = pytest.mark.parametrize("root", sorted({0, SIZE - 1}))


def layered(seed):
    """A model with parameters and buffers of several dtypes and layouts, and an empty one."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last),
        torch.nn.BatchNorm2d(3).double(),
        torch.nn.Linear(3, 2).half(),
        torch.nn.Embedding(4, 2, dtype=torch.bfloat16),
    )
    model[1].num_batches_tracked += seed
    model[1].running_mean += seed
    model.register_buffer("flags", torch.tensor([bool(seed), True]))
    model.register_parameter("nothing", torch.nn.Parameter(torch.empty(0, 3)))
    return model


@roots
@pytest.mark.parametrize("form", ["state_dict", "named_parameters", "list of pairs", "list"])
def test_parameters(form, root):
    model, wanted = layered(RANK), layered(root)
    params = {
        "state_dict": model.state_dict,
        "named_parameters": model.named_parameters,
        "list of pairs": lambda: list(model.named_parameters()),
        "list": lambda: list(model.parameters()),
    }[form]()
    hvd.broadcast_parameters(params, root_rank=root)
    if form == "state_dict":
        assert_same(model, wanted, 0)
        assert model[1].num_batches_tracked == root
    else:
        assert_same(model.parameters(), wanted.parameters(), 0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    hvd.broadcast_parameters({"epoch": RANK, "weight": torch.zeros(2)}, root)


@several
def test_parameters_that_differ():
    with pytest.raises(hvd.MismatchError, match="shape"):
        hvd.broadcast_parameters({"weight": torch.zeros(3 + (RANK == 0))}, 0)
    with pytest.raises(hvd.MismatchError, match="names"):
        hvd.broadcast_parameters([(f"weight.{RANK}", torch.zeros(3))], 0)
    with pytest.raises(hvd.MismatchError, match="root_rank"):
        hvd.broadcast_parameters({"weight": torch.zeros(3)}, int(RANK == 0))
    for mistake in (torch.zeros(3), 5, ["weight"]):
        with pytest.raises(hvd.UnsupportedError, match="broadcast_parameters takes"):
            hvd.broadcast_parameters(mistake, 0)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.01)),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, centered=True, momentum=0.5),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.2, max_iter=3),
}


def steps(model, optimizer, batches, part):
    for batch in batches:

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(model, part(batch_of(batch)))
            loss.backward()
            return loss

        optimizer.step(closure)


@roots
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_going_on_from_what_one_rank_has_read(kind, distributed, root):
    """Only the root has the checkpoint; then all train together as if nothing had happened."""
    reference = build()
    theirs = OPTIMIZERS[kind](reference.parameters())
    steps(reference, theirs, range(3), whole)
    theirs.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] * 0.5
    saved = copy.deepcopy((reference.state_dict(), theirs.state_dict()))
    model = build(seed=RANK + 1)
    ours = OPTIMIZERS[kind](model.parameters())
    if root == RANK:
        model.load_state_dict(saved[0])
        ours.load_state_dict(saved[1])
    if distributed:
        ours = hvd.DistributedOptimizer(ours)
    hvd.broadcast_parameters(model.state_dict(), root)
    hvd.broadcast_optimizer_state(ours, root, model=model)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    steps(model, ours, range(3, 6), mine if distributed else whole)
    steps(reference, theirs, range(3, 6), whole)
    assert_same(model, reference, 1e-7)
    assert_identical(model)


@roots
def test_state_with_groups_and_a_scheduler(root):
    model = build(seed=3)
    optimizer = torch.optim.SGD(
        [
            {"params": model[0].parameters(), "lr": 0.1 * (RANK + 1)},
            {"params": model[2].parameters()},
        ],
        lr=0.5,
        momentum=0.1 * RANK,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    if root == RANK:
        loss_of(model, batch_of(0)).backward()
        optimizer.step()
        scheduler.step()
    hvd.broadcast_optimizer_state(optimizer, root)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.1 * root] * 2
    assert [group["lr"] for group in optimizer.param_groups] == [0.05 * (root + 1), 0.25]
    assert optimizer.param_groups[0]["initial_lr"] == 0.1 * (root + 1)
    assert set(optimizer.param_groups[0]["params"]) == set(model[0].parameters())


def test_state_of_a_kind_that_nobody_foresaw():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer.state[weight] = {"nested": [{"deep": (torch.tensor(RANK), [RANK, None])}], 5: 2.5}
    hvd.broadcast_optimizer_state(optimizer, SIZE - 1)
    state = optimizer.state[weight]
    assert state["nested"] == [{"deep": (torch.tensor(SIZE - 1), [SIZE - 1, None])}]
    assert state[5] == 2.5


@roots
def test_objects(root):
    value = {"rank": RANK, "tensor": torch.arange(RANK + 1), "text": "ä" * RANK}
    found = hvd.broadcast_object(value, root)
    assert found["rank"] == root
    assert torch.equal(found["tensor"], torch.arange(root + 1))
    assert hvd.broadcast_object([1] if root == RANK else None, root_rank=root, name="n") == [1]
    everyone = hvd.allgather_object(value, name="all")
    assert [theirs["text"] for theirs in everyone] == ["ä" * rank for rank in range(SIZE)]
    assert hvd.allgather_object(None) == [None] * SIZE


def test_the_four_lines_of_a_script():
    """Ranks that start apart train as one."""
    model, reference = build(seed=RANK), build(seed=0)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    ours = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ours = hvd.DistributedOptimizer(ours, named_parameters=model.named_parameters())
    train(model, ours, range(3), mine)
    train(
        reference,
        torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9),
        range(3),
        whole,
    )
    assert_same(model, reference)
