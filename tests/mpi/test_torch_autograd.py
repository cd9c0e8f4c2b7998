"""Gradients of the collectives, against the table in hvdkit.torch.collectives, computed by hand.

Each rank weighs its output with weights of its own, so that the gradients of the outputs are these
weights, and differ between ranks.
"""

import pytest

import hvdkit.torch as hvd

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")

FACTORS = {"prescale_factor": 2.0, "postscale_factor": 0.75}


def of(rank, *shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(shape, generator=generator, dtype=dtype)


def everyone(*shape, seed=0, ranks=range(SIZE)):
    return torch.stack([of(rank, *shape, seed=seed) for rank in ranks])


def leaf(*shape, seed=0):
    return of(RANK, *shape, seed=seed).requires_grad_()


def backward(output):
    """Send this rank's weights back through `output`, and check that they can be sent at all."""
    assert output.requires_grad
    (output * of(RANK, *output.shape, seed=9)).sum().backward()


def weights(*shape, ranks=range(SIZE)):
    """All ranks' gradients of an output."""
    return everyone(*shape, seed=9, ranks=ranks)


def rows_of(rank, rows):
    """Which rows a reduce-scatter leaves a rank with."""
    counts = [rows // SIZE + (r < rows % SIZE) for r in range(SIZE)]
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# All-reduce

REDUCED = {
    hvd.Sum: lambda stack: stack.sum(0),
    hvd.Average: lambda stack: stack.mean(0),
    hvd.Min: lambda stack: stack.amin(0),
    hvd.Max: lambda stack: stack.amax(0),
    hvd.Product: lambda stack: stack.prod(0),
}


@pytest.mark.parametrize("op", REDUCED, ids=str)
@pytest.mark.parametrize("algorithm", ["auto", "ring"])
def test_allreduce(op, algorithm):
    x = leaf(3, 2)
    y = hvd.allreduce(x, op=op, name="x", algorithm=algorithm)
    close(y.detach(), REDUCED[op](everyone(3, 2)))
    backward(y)
    close(x.grad, REDUCED[op](weights(3, 2)))


def test_allreduce_with_factors():
    for op in (hvd.Sum, hvd.Average):
        x = leaf(4)
        y = hvd.allreduce(x, op=op, **FACTORS)
        close(y.detach(), 1.5 * REDUCED[op](everyone(4)))
        backward(y)
        close(x.grad, 1.5 * REDUCED[op](weights(4)))


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_allreduce_compressed(kind):
    """Gradients go back through both casts."""
    x = torch.full((3,), 0.5, requires_grad=True)
    y = hvd.allreduce(x, op=hvd.Sum, compression=getattr(hvd.Compression, kind))
    assert y.dtype == torch.float32
    (y * (RANK + 1)).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), SIZE * (SIZE + 1) / 2))


def test_allreduce_of_an_expanded_gradient_and_a_scalar():
    x = leaf(2, 3)
    hvd.allreduce(x, op=hvd.Sum).sum().backward()  # the gradient has strides of 0
    close(x.grad, torch.full((2, 3), float(SIZE), dtype=torch.float64))
    x = torch.tensor(float(RANK), requires_grad=True)
    (hvd.allreduce(x) * (RANK + 1)).backward()
    close(x.grad, torch.tensor((SIZE + 1) / 2))


def test_allreduce_of_complex_numbers():
    x = torch.complex(of(RANK, 3), of(RANK, 3, seed=1)).requires_grad_()
    y = hvd.allreduce(x, op=hvd.Sum)
    (y.abs() ** 2).sum().backward()
    close(x.grad, 2 * SIZE * y.detach())


# What moves data


def test_allgather():
    """Ranks have different numbers of rows, the last one none (or, alone, two)."""
    counts = [2 + rank for rank in range(SIZE)]
    if SIZE > 1:
        counts[-1] = 0
    begin = sum(counts[:RANK])
    x = leaf(counts[RANK], 3)
    y = hvd.allgather(x)
    close(y.detach(), torch.cat([of(rank, n, 3) for rank, n in enumerate(counts)]))
    backward(y)
    close(x.grad, weights(sum(counts), 3).mean(0)[begin : begin + counts[RANK]])


def test_allgather_of_scalars():
    x = torch.tensor(float(RANK), requires_grad=True)
    (hvd.allgather(x) * torch.arange(1.0, SIZE + 1)).sum().backward()
    close(x.grad, torch.tensor(RANK + 1.0))


@pytest.mark.parametrize("root", [0, SIZE - 1])
def test_broadcast(root):
    x = leaf(2, 3)
    y = hvd.broadcast(x, root)
    close(y.detach(), of(root, 2, 3))
    backward(y)
    mean = weights(2, 3).mean(0)
    close(x.grad, mean if root == RANK else torch.zeros_like(mean))


@pytest.mark.parametrize("form", ["none", "list", "tensor"])
def test_alltoall(form):
    """Rank r sends i + r rows to rank i, or one to each; the rows' gradients come back to it."""
    sent = [[1 if form == "none" else i + rank for i in range(SIZE)] for rank in range(SIZE)]
    splits = {"none": None, "list": sent[RANK], "tensor": torch.tensor(sent[RANK])}[form]
    x = leaf(sum(sent[RANK]), 2)
    found = hvd.alltoall(x, splits)
    y = found if form == "none" else found[0]
    assert form == "none" or not found[1].requires_grad
    backward(y)
    wanted = []
    for i in range(SIZE):  # what rank i received from here came after what lower ranks sent
        theirs = [sent[rank][i] for rank in range(SIZE)]
        begin = sum(theirs[:RANK])
        wanted.append(of(i, sum(theirs), 2, seed=9)[begin : begin + theirs[RANK]])
    close(x.grad, torch.cat(wanted))


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=str)
def test_reducescatter(op):
    x = leaf(SIZE + 1, 2)
    y = hvd.reducescatter(x, op=op, **FACTORS)
    close(y.detach(), 1.5 * REDUCED[op](everyone(SIZE + 1, 2))[rows_of(RANK, SIZE + 1)])
    backward(y)
    shapes = [len(range(SIZE + 1)[rows_of(rank, SIZE + 1)]) for rank in range(SIZE)]
    whole = torch.cat([of(rank, rows, 2, seed=9) for rank, rows in enumerate(shapes)])
    close(x.grad, 1.5 * (SIZE if op == hvd.Sum else 1) * whole)


# Groups of tensors


def test_grouped_allreduce():
    xs = [leaf(3, seed=1), leaf(2, 2, seed=2), of(RANK, 2)]
    ys = hvd.grouped_allreduce(xs, op=hvd.Average, name="g", **FACTORS)
    assert [y.requires_grad for y in ys] == [True, True, False]
    sum((y * of(RANK, *y.shape, seed=9)).sum() for y in ys[:2]).backward()
    for x in xs[:2]:
        close(x.grad, 1.5 * weights(*x.shape).mean(0))


def test_grouped_allgather():
    xs = [leaf(RANK + 1, seed=1), leaf(2, 2, seed=2)]
    ys = hvd.grouped_allgather(xs)
    sum((y * of(RANK, *y.shape, seed=9)).sum() for y in ys).backward()
    begin = sum(range(1, RANK + 1))
    close(xs[0].grad, weights(SIZE * (SIZE + 1) // 2).mean(0)[begin : begin + RANK + 1])
    close(xs[1].grad, weights(2 * SIZE, 2).mean(0)[2 * RANK : 2 * RANK + 2])


def test_grouped_reducescatter():
    xs = [leaf(SIZE, seed=1), leaf(SIZE, 2, seed=2)]
    ys = hvd.grouped_reducescatter(xs, op=hvd.Sum)
    sum((y * (RANK + 1)).sum() for y in ys).backward()
    for x in xs:
        rows = torch.arange(1.0, SIZE + 1, dtype=torch.float64)
        close(x.grad, SIZE * rows.reshape(-1, *[1] * (x.ndim - 1)).expand(x.shape))


# Process sets


@several
def test_in_a_process_set():
    process_set = hvd.add_process_set(range(1, SIZE))
    if RANK:
        ranks = range(1, SIZE)
        x = leaf(3)
        backward(hvd.allreduce(x, op=hvd.Sum, process_set=process_set))
        close(x.grad, weights(3, ranks=ranks).sum(0))
        x = leaf(2)
        backward(hvd.allgather(x, process_set=process_set))
        mean = weights(2 * len(ranks), ranks=ranks).mean(0)
        close(x.grad, mean[2 * RANK - 2 : 2 * RANK])
        x = leaf(3)
        backward(hvd.broadcast(x, SIZE - 1, process_set=process_set))
        close(x.grad, weights(3, ranks=ranks).mean(0) * (RANK == SIZE - 1))
        x = leaf(len(ranks))
        backward(hvd.alltoall(x, process_set=process_set))
        close(x.grad, torch.stack([of(r, len(ranks), seed=9)[RANK - 1] for r in ranks]))
        x = leaf(len(ranks))
        y = hvd.reducescatter(x, op=hvd.Sum, process_set=process_set)
        (y * (RANK + 1)).sum().backward()
        close(x.grad, len(ranks) * torch.arange(2.0, SIZE + 1, dtype=torch.float64))
    hvd.remove_process_set(process_set)


# In a graph


def test_without_gradients_there_is_no_graph():
    x = leaf(SIZE)
    with torch.no_grad():
        for y in (
            hvd.allreduce(x),
            hvd.allgather(x),
            hvd.broadcast(x, 0),
            hvd.alltoall(x),
            hvd.reducescatter(x),
        ):
            assert not y.requires_grad
    assert not hvd.allreduce(of(RANK, 3)).requires_grad


def test_a_second_backward():
    """With y the sum over ranks and cubes for losses, both derivatives are those of all losses."""
    x = leaf(4)
    y = hvd.allreduce(x, op=hvd.Sum)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    total = everyone(4).sum(0)
    close(first.detach(), SIZE * 3 * total**2)
    first.sum().backward()
    close(x.grad, SIZE**2 * 6 * total)


@pytest.mark.parametrize("root", [0, SIZE - 1])
def test_a_second_backward_through_what_moves_data(root):
    """Of squares; where one backward averages, the ranks' ones reach a row from one of them."""
    cases = [
        (hvd.allgather, 2 / SIZE),
        (lambda x: hvd.broadcast(x, root), 2 / SIZE * (root == RANK)),
        (hvd.alltoall, 2),
        (lambda x: hvd.reducescatter(x, op=hvd.Average), 2),
    ]
    for call, wanted in cases:
        x = leaf(SIZE)
        (first,) = torch.autograd.grad((call(x) ** 2).sum(), x, create_graph=True)
        first.sum().backward()
        close(x.grad, torch.full((SIZE,), wanted, dtype=torch.float64))


def test_a_model_that_normalises_over_all_ranks():
    """The gradients of parameters, averaged as an optimizer does, are those of one process."""
    torch.manual_seed(0)
    weight = torch.randn(5, 3, dtype=torch.float64)
    inputs = torch.randn(
        4 * SIZE, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    def loss_of(parameter, x, mean_over_ranks):
        hidden = torch.tanh(x @ parameter)
        return ((hidden - mean_over_ranks(hidden.mean(0))) ** 2).mean()

    mine, reference = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    loss_of(mine, inputs[4 * RANK : 4 * RANK + 4], hvd.allreduce).backward()
    loss_of(reference, inputs, lambda mean: mean).backward()
    close(hvd.allreduce(mine.grad), reference.grad)
