"""Gradients of every kind on their way: sparse, late, missing, changed, of any dtype and layout."""

import contextlib
import copy
import gc
import threading
import time

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
    pair,
    train,
    whole,
)

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")


class AsHorovodHasThem:
    """A compressor that changes nothing, which the core knows nothing of."""

    @staticmethod
    def compress(tensor):
        return tensor, None

    @staticmethod
    def decompress(tensor, ctx):
        del ctx
        return tensor


HOWS = {
    "default": {},
    "each alone": {"bucket_bytes": 1},
    "copied": {"gradient_as_bucket_view": False},
    "custom": {"compression": AsHorovodHasThem},
}
hows = pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)


def sgd(parameters, momentum=0.0):
    return torch.optim.SGD(parameters, lr=0.1, momentum=momentum)


def trained(model, losses, how=None, make=sgd):
    """Take a step for each of the `losses`, distributed if there is a `how`; return the model."""
    optimizer = make(model.parameters())
    if how is not None:
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), **how)
    for loss in losses:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model


def compare(build_model, losses_of, how, make=sgd):
    """Check that training by `losses_of(rank)` equals one process with the mean of the losses."""
    found = trained(build_model(), losses_of(RANK), how, make)
    per_step = zip(*(losses_of(rank) for rank in range(SIZE)), strict=True)
    means = [
        lambda model, losses=losses: sum(loss(model) for loss in losses) / SIZE
        for losses in per_step
    ]
    wanted = trained(build_model(), means, None, make)
    assert_same(found, wanted)
    assert_identical(found)


class Words(torch.nn.Module):
    """An embedding, sparse or not, and a layer on top."""

    def __init__(self, sparse=True, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Embedding(11, 4, sparse=sparse, dtype=dtype)
        self.head = torch.nn.Linear(4, 2, dtype=dtype)

    def loss(self, words):
        return self.head(self.embedding(torch.tensor(words))).square().mean()

    def loss_without(self, value):
        return self.head(torch.full((4,), float(value), dtype=self.head.weight.dtype)).sum()


# Sparse gradients


@hows
@pytest.mark.parametrize("sparse_as_dense", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sparse(how, sparse_as_dense, momentum):
    def losses_of(rank):
        return [
            lambda model, words=[rank, rank + step, 5, 5]: model.loss(words) for step in range(4)
        ]

    compare(
        Words,
        losses_of,
        {"sparse_as_dense": sparse_as_dense, **how},
        lambda parameters: sgd(parameters, momentum),
    )


@hows
@pytest.mark.parametrize("sparse_as_dense", [False, True])
@pytest.mark.parametrize("who", ["last", "all but the last"])
def test_sparse_on_some_ranks(how, sparse_as_dense, who):
    """The others have no gradient for the embedding; in the second step nobody has."""

    def losses_of(rank):
        def loss(model, step):
            has = (rank == SIZE - 1) == (who == "last") and step != 1
            return model.loss([rank, 1, step]) if has else model.loss_without(rank)

        return [lambda model, step=step: loss(model, step) for step in range(3)]

    compare(Words, losses_of, {"sparse_as_dense": sparse_as_dense, **how})


@hows
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=str)
def test_sparse_gradients_that_are_set_to_zero(how, op):
    """Found here: their memory was not torch's, which resizes it to add the next ones in place."""
    model, reference = Words(), Words()
    ours = hvd.DistributedOptimizer(sgd(model.parameters()), op=op, **how)
    theirs = sgd(reference.parameters())
    for step in range(3):
        ours.zero_grad(set_to_none=False)
        theirs.zero_grad(set_to_none=False)
        model.loss([RANK, step, 5]).backward()
        total = sum(reference.loss([rank, step, 5]) for rank in range(SIZE))
        (total / (SIZE if op == hvd.Average else 1)).backward()
        ours.step()
        theirs.step()
    assert_same(model, reference)


@hows
@pytest.mark.parametrize("first", [1, 2])
def test_sparse_from_a_later_step_on(how, first):
    """Found here: a gradient that came sparse only after the first step was lost."""

    def losses_of(rank):
        def loss(model, step):
            return model.loss([rank, 7]) if step >= first else model.loss_without(rank)

        return [lambda model, step=step: loss(model, step) for step in range(4)]

    compare(Words, losses_of, how)


@hows
def test_sparse_on_one_rank_and_dense_on_the_others(how):
    """Found here: what came dense in the first step was lost."""

    def losses_of(rank):
        def loss(model, step):
            if (rank + step) % 2 == 0:
                return model.loss([rank, 3])
            return (model.embedding.weight * (rank + step + 1)).sum() + model.loss_without(1)

        return [lambda model, step=step: loss(model, step) for step in range(3)]

    compare(Words, losses_of, how)


@several
@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_sparse_stays_sparse(sparse_as_dense):
    """SparseAdam takes nothing else, also on a rank that uses the embedding only at first."""

    def make(parameters):
        return torch.optim.SparseAdam([next(parameters)], lr=0.1)

    found, wanted = Words(), Words()
    ours = hvd.DistributedOptimizer(make(found.parameters()), sparse_as_dense=sparse_as_dense)
    theirs = make(wanted.parameters())
    for step in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        words = [[rank, 5] for rank in range(SIZE) if rank == 0 or step != 1]
        if RANK == 0 or step != 1:
            found.loss([RANK, 5]).backward()
        (sum(wanted.loss(theirs) for theirs in words) / SIZE).backward()
        ours.step()
        assert found.embedding.weight.grad.is_sparse
        theirs.step()
    assert_same(found, wanted)
    assert_identical(found)


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=str)
@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_sparse_gradients_that_arrive_twice(op, sparse_as_dense):
    """Of two passes without a word about it, the second uses the embedding on rank 0 alone."""
    found, wanted = Words(), Words()
    ours = hvd.DistributedOptimizer(sgd(found.parameters()), op=op, sparse_as_dense=sparse_as_dense)
    theirs = sgd(wanted.parameters())
    divisor = SIZE if op == hvd.Average else 1
    for step in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        found.loss([RANK, step]).backward()
        (found.loss([9]) if RANK == 0 else found.loss_without(RANK)).backward()
        total = sum(wanted.loss([rank, step]) for rank in range(SIZE)) + wanted.loss([9])
        total = total + sum(wanted.loss_without(rank) for rank in range(1, SIZE))
        (total / divisor).backward()
        ours.step()
        theirs.step()
    assert_same(found, wanted)
    assert_identical(found)


def test_sparse_gradients_of_two_optimizers():
    """Without names both call their parameter the same, and both are under way at once."""
    models = [Words(), Words()]
    optimizers = [hvd.DistributedOptimizer(sgd(model.parameters())) for model in models]
    wanted = [Words(), Words()]
    for step in range(3):
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            model.loss([RANK, i + step]).backward()
        for optimizer in reversed(optimizers):
            optimizer.step()
    for i, model in enumerate(wanted):
        trained(
            model,
            [
                lambda m, word=i + step: sum(m.loss([r, word]) for r in range(SIZE)) / SIZE
                for step in range(3)
            ],
        )
        assert_same(models[i], model)


# Missing, late, frozen


class Branching(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(3, 2, dtype=torch.float64) for _ in range(3)
        )

    def loss(self, *used):
        x = torch.ones(3, dtype=torch.float64)
        return sum(self.layers[i](x).square().sum() for i in used)


@hows
def test_parameters_that_some_ranks_do_not_use(how):
    """Where there is no gradient it counts as zeros; in no order that the ranks share."""

    def losses_of(rank):
        uses = [(0, 1), (rank % 3,), (2, rank % 2), (1,) if rank else (0,)]
        return [lambda model, used=used: model.loss(*used) for used in uses]

    compare(Branching, losses_of, how)


@hows
def test_parameters_that_no_rank_uses(how):
    """Their gradients are zeros, as Horovod's are."""
    model = Branching()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), **how)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(0).backward()
        optimizer.step()
        grads = [parameter.grad for parameter in model.layers[2].parameters()]
        assert all(g is None if SIZE == 1 else not g.any() for g in grads)
    assert_same(model.layers[2], Branching().layers[2])


@several
def test_a_rank_without_any_gradient():
    """As one whose last batch is empty."""

    def losses_of(rank):
        return [lambda model: model.loss(0, 1, 2) * (rank != 0)] * 2

    found = Branching()
    optimizer = hvd.DistributedOptimizer(sgd(found.parameters()))
    for loss in losses_of(RANK):
        optimizer.zero_grad()
        if RANK:
            loss(found).backward()
        optimizer.step()
    means = [lambda m: sum(losses_of(rank)[0](m) for rank in range(SIZE)) / SIZE] * 2
    assert_same(found, trained(Branching(), means))


def frozen(model, *layers):
    for i, layer in enumerate(model.layers):
        layer.requires_grad_(i not in layers)


@hows
def test_layers_that_are_unfrozen(how):
    model, reference = Branching(), Branching()
    frozen(model, 1, 2)
    frozen(reference, 1, 2)
    ours = hvd.DistributedOptimizer(sgd(model.parameters(), 0.9), model.named_parameters(), **how)
    theirs = sgd(reference.parameters(), 0.9)
    for now_frozen in ((1, 2), (2,), (0, 2), ()):
        for net, optimizer, ranks in ((model, ours, [RANK]), (reference, theirs, range(SIZE))):
            frozen(net, *now_frozen)
            for _ in range(2):
                optimizer.zero_grad()
                (sum(net.loss(0, 1, 2) * (r + 1) for r in ranks) / len(ranks)).backward()
                optimizer.step()
    assert_same(model, reference)
    assert_identical(model)


@hows
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=str)
def test_a_frozen_parameter_keeps_the_gradient_it_has(how, op):
    """One process leaves it alone, too, where nobody resets gradients."""
    model = Branching()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), op=op, **how)
    model.loss(0, 1).backward()
    optimizer.step()
    frozen(model, 1)
    before = model.layers[1].weight.grad.clone()
    for _ in range(2):
        model.loss(0).backward()
        optimizer.step()
        assert torch.equal(model.layers[1].weight.grad, before)


@hows
def test_parameters_that_are_added(how):
    model, reference = Branching(), Branching()
    ours = hvd.DistributedOptimizer(sgd(model.layers[:2].parameters()), **how)
    theirs = sgd(reference.layers[:2].parameters())
    for step in range(4):
        if step == 2:
            ours.add_param_group({"params": model.layers[2].parameters(), "lr": 0.05})
            theirs.add_param_group({"params": reference.layers[2].parameters(), "lr": 0.05})
        ours.zero_grad()
        theirs.zero_grad()
        (model.loss(0, 1, 2) * (RANK + 1)).backward()
        (reference.loss(0, 1, 2) * (SIZE + 1) / 2).backward()
        ours.step()
        theirs.step()
    assert_same(model, reference)


def test_nothing_to_train_at_first():
    model = Branching()
    frozen(model, 0, 1, 2)
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()))
    optimizer.step()
    assert_same(model, Branching())
    frozen(model)
    (model.loss(0) * RANK).backward()
    optimizer.step()
    assert_identical(model)


# Tied, by hand, differentiated twice


@hows
def test_tied_parameters(how):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.into = torch.nn.Linear(4, 6, bias=False, dtype=torch.float64)
            self.out = torch.nn.Linear(6, 4, bias=False, dtype=torch.float64)
            self.out.weight = torch.nn.Parameter(self.out.weight.detach())
            self.again = torch.nn.Linear(4, 6, bias=False, dtype=torch.float64)
            self.again.weight = self.into.weight

        def loss(self, rank):
            x = torch.arange(4.0, dtype=torch.float64) + rank
            return self.again(self.out(self.into(x).tanh())).square().mean()

    def losses_of(rank):
        return [lambda model: model.loss(rank)] * 3

    compare(Tied, losses_of, how)


@hows
def test_gradients_set_by_hand(how):
    """Of some parameters, whatever backward does for the others."""
    model = Branching()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), **how)
    before = model.layers[1].bias.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(0).backward()
        model.layers[1].bias.grad = torch.full((2,), float(RANK), dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(model.layers[1].bias.detach(), before - 0.2 * (SIZE - 1) / 2)
    assert_identical(model)


@hows
def test_a_penalty_on_the_gradient(how):
    """`torch.autograd.grad` with a graph, within the loss: hooks must not mind."""

    def losses_of(rank):
        def loss(model):
            x = torch.full((3,), 1.0 + rank, dtype=torch.float64, requires_grad=True)
            y = model.layers[0](x).tanh().sum()
            (slope,) = torch.autograd.grad(y, x, create_graph=True)
            (rise,) = torch.autograd.grad(y, model.layers[0].bias, create_graph=True)
            return y + slope.square().sum() + rise.square().sum() + model.loss(1, 2)

        return [loss] * 3

    compare(Branching, losses_of, how)


@hows
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_backward_that_keeps_a_graph(how):
    def losses_of(rank):
        return [lambda model: model.loss(0, 1, 2) * (rank + 1)] * 2

    found = Branching()
    optimizer = hvd.DistributedOptimizer(sgd(found.parameters()), **how)
    for loss in losses_of(RANK):
        optimizer.zero_grad()
        loss(found).backward(create_graph=True)
        optimizer.step()
    means = [lambda m: sum(losses_of(rank)[0](m) for rank in range(SIZE)) / SIZE] * 2
    assert_same(found, trained(Branching(), means))


# Dtypes and layouts


@hows
def test_dtypes_side_by_side(how):
    """Also numbers with an imaginary part, a scalar, and a parameter of no elements."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
    shapes = [(7,), (), (2, 3), (0, 4)]
    parameters = [
        torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for dtype in dtypes for shape in shapes
    ]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), **how)
    for _ in range(2):
        optimizer.zero_grad()
        sum((p.to(torch.complex128) * (RANK + 1)).real.sum() for p in parameters).backward()
        optimizer.step()
    for parameter in parameters:
        assert parameter.grad.dtype == parameter.dtype
        wanted = torch.full_like(parameter, -2 * (SIZE + 1) / 2)
        torch.testing.assert_close(parameter.detach(), wanted)


@hows
@pytest.mark.filterwarnings("error:grad and param do not obey")
@pytest.mark.parametrize("set_to_none", [True, False])
def test_channels_last(how, set_to_none):
    """Gradients have their parameters' order in memory, as autograd wants them."""

    def make():
        torch.manual_seed(4)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Conv2d(4, 2, 2), torch.nn.Flatten()
        )
        return model.double().to(memory_format=torch.channels_last)

    def loss_at(model, step, ranks):
        x = torch.randn(
            SIZE, 3, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64
        )
        return model(x.to(memory_format=torch.channels_last)[ranks]).square().mean()

    model, reference = make(), make()
    ours = hvd.DistributedOptimizer(sgd(model.parameters()), **how)
    theirs = sgd(reference.parameters())
    for step in range(3):
        ours.zero_grad(set_to_none)
        theirs.zero_grad(set_to_none)
        loss_at(model, step, slice(RANK, RANK + 1)).backward()
        loss_at(reference, step, slice(None)).backward()
        ours.step()
        theirs.step()
    assert_same(model, reference)
    assert model[0].weight.grad.stride() == model[0].weight.stride()


def test_layouts_with_gaps_and_turned():
    """A parameter that is a part of a larger tensor, and one that is transposed."""
    large, turned = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    parameters = [torch.nn.Parameter(large[1:3, ::2]), torch.nn.Parameter(turned.t())]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0))
    factors = [torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape) for p in parameters]
    for _ in range(2):
        optimizer.zero_grad()
        sum((p * f).sum() * (RANK + 1) for p, f in zip(parameters, factors, strict=True)).backward()
        optimizer.step()
    for parameter, factor in zip(parameters, factors, strict=True):
        torch.testing.assert_close(parameter.detach(), -factor * (SIZE + 1))


@several
def test_layouts_that_differ_between_ranks():
    """They would be summed up in the order in which they are in memory."""
    weight = torch.zeros(3, 3).t() if RANK == 0 else torch.zeros(3, 3)
    with pytest.raises(hvd.MismatchError, match=r"dimensions in the order \(1, 0\)"):
        hvd.DistributedOptimizer(torch.optim.SGD([torch.nn.Parameter(weight)], lr=1.0))


# Changed on their way


CHANGES = {
    "in place": lambda p: p.grad.mul_(0.5),
    "another": lambda p: setattr(p, "grad", p.grad * 0.5),
    "none": lambda p: setattr(p, "grad", None),
    "zeros": lambda p: p.grad.zero_(),
}


@several
@hows
@pytest.mark.parametrize("change", CHANGES)
def test_changed_between_backward_and_step(how, change):
    """The error names the parameter, and comes on the rank that did it; the others go on."""
    model = build()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), model.named_parameters(), **how)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, mine(batch_of(step))).backward()
        guilty = RANK == 0
        if guilty:
            CHANGES[change](model[2].weight)
        expected = pytest.raises(hvd.InFlightError, match=r"'2.weight' was changed between")
        with expected if guilty else contextlib.nullcontext():
            optimizer.synchronize()
        optimizer.zero_grad()
    model = build()
    train(model, hvd.DistributedOptimizer(sgd(model.parameters()), **how), range(2), mine)
    assert_identical(model)


@several
@pytest.mark.parametrize("how", [{}, {"sparse_as_dense": True}], ids=str)
def test_a_sparse_gradient_that_is_changed(how):
    model = Words()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), model.named_parameters(), **how)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss([RANK, 2]).backward()
        model.embedding.weight.grad.mul_(2)
        with pytest.raises(hvd.InFlightError, match=r"'embedding.weight' was changed"):
            optimizer.step()


@several
def test_changed_between_two_backward_passes():
    model, optimizer, _, _ = pair()
    loss_of(model, mine(batch_of(0))).backward()
    model[0].weight.grad.mul_(0.5)
    with pytest.raises(hvd.InFlightError, match=r"'0.weight' was changed"):
        loss_of(model, mine(batch_of(1))).backward()
    optimizer.synchronize()


# Optimizers that come and go


@hows
def test_an_optimizer_that_is_gone_leaves_no_hooks(how):
    model = build()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), **how)
    loss_of(model, mine(batch_of(0))).backward()  # gradients are on their way when it goes
    del optimizer
    deadline = time.monotonic() + 10  # the watch for deadlocks may hold on to a frame that has it
    while any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()):
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.01)
    model.zero_grad()
    reference = build()
    train(model, hvd.DistributedOptimizer(sgd(model.parameters()), **how), range(3), mine)
    train(reference, sgd(reference.parameters()), range(3), whole)
    assert_same(model, reference)


def test_optimizers_that_are_gone_leave_no_threads():
    """Found here: of a thousand, one after the other, each left a thread and shared memory."""

    def threads():
        return sum(t.name.startswith("hvdkit-gradients") for t in threading.enumerate())

    kept, before = [], threads()
    for number in range(12):
        if number == 10:  # the watch for deadlocks may hold on to frames that have some
            gc.collect()
        weight = torch.nn.Parameter(torch.zeros(3))
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0))
        (weight * RANK).sum().backward()
        optimizer.step()
        kept.append(weight.grad)
        del optimizer
    assert threads() - before < 8
    assert all(torch.equal(gradient, torch.full((3,), (SIZE - 1) / 2)) for gradient in kept)


@hows
def test_a_newer_optimizer_of_the_same_parameters(how):
    """Found here: the older one, though unused, put its gradients of earlier steps into p.grad."""
    model, reference = build(), build()
    older = hvd.DistributedOptimizer(sgd(model[0].parameters()), **how)
    theirs = sgd(reference[0].parameters())
    train(model, older, range(2), mine, model.zero_grad)
    train(reference, theirs, range(2), whole, reference.zero_grad)
    newer = hvd.DistributedOptimizer(sgd(model.parameters()), **how)
    train(model, newer, range(2, 5), mine)
    train(reference, sgd(reference.parameters()), range(2, 5), whole)
    assert_same(model, reference)
    if SIZE > 1:
        with pytest.raises(hvd.ArgumentError, match="newer DistributedOptimizer"):
            older.step()


@hows
def test_two_optimizers_at_once(how):
    """As of a generator and a critic: the one's backward goes through the other's parameters."""
    first, second = build(0), build(1)
    references = [build(0), build(1)]
    ours = [hvd.DistributedOptimizer(sgd(net.parameters()), **how) for net in (first, second)]
    theirs = [sgd(net.parameters()) for net in references]
    for step in range(3):
        for nets, optimizers, part in (((first, second), ours, mine), (references, theirs, whole)):
            x, y = part(batch_of(step))
            both = (nets[0](x) * nets[1](x) - y).square().mean()
            both.backward()
            for optimizer in reversed(optimizers):
                optimizer.step()
                optimizer.zero_grad()
    assert_same(first, references[0])
    assert_same(second, references[1])


def test_a_copy_made_in_the_middle_of_a_step():
    model, ours, reference, theirs = pair()
    train(model, ours, range(2), mine)
    train(reference, theirs, range(2), whole)
    ours.zero_grad()
    theirs.zero_grad()
    loss_of(model, mine(batch_of(2))).backward()
    twin = copy.deepcopy(model)
    loss_of(twin, batch_of(RANK)).backward()
    loss_of(reference, batch_of(2)).backward()
    ours.step()
    theirs.step()
    assert_same(model, reference)
