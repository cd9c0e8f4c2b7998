"""A model in layers, trained in a pipeline and, as the oracle, by one process on whole batches."""

import torch

import hvdkit.torch as hvd
from hvdkit import Mesh
from hvdkit.torch.pipeline import PipelineModule, Pop, Stash

RANK, SIZE = hvd.rank(), hvd.size()
ROWS = 12
WIDTH = 6
DOUBLE = torch.float64

#: By their sizes (data, pipeline), those of this number of ranks.
GRIDS = [
    grid
    for grid in ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1), (1, 5))
    if grid[0] * grid[1] == SIZE
]


class Whole(torch.nn.Module):
    """The same layers on one process.  Parameters have the names that they have in a pipeline."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        stashed = {}
        for layer in self.layers:
            if isinstance(layer, Stash):
                stashed[layer.name] = x
            elif isinstance(layer, Pop):
                x = layer(x, stashed.pop(layer.name))
            else:
                x = layer(*x) if isinstance(x, tuple) else layer(x)
        return x


class Head(torch.nn.Module):
    """The transpose of a linear layer: both have one weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.t())


def linear(inputs=WIDTH, outputs=WIDTH, dtype=DOUBLE, **how):
    return torch.nn.Linear(inputs, outputs, dtype=dtype, **how)


def plain(count=5, dtype=DOUBLE, seed=0):
    """Return so many linear layers, with as many others between them."""
    torch.manual_seed(seed)
    pairs = [(linear(dtype=dtype), torch.nn.Tanh()) for _ in range(count)]
    return [layer for pair in pairs for layer in pair]


def mse(output, target):
    return torch.nn.functional.mse_loss(output, target)


def batch_of(step, rows=ROWS, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, WIDTH, generator=generator, dtype=dtype)
    return x, x.sin()


def part_of(batch, mesh):
    """Return what of a batch this rank gets: along ``data``, every so many rows."""
    place, count = mesh.place("data"), mesh.size_of("data")
    if isinstance(batch, torch.Tensor):
        return batch[place::count]
    if isinstance(batch, dict):
        return {key: part_of(value, mesh) for key, value in batch.items()}
    return type(batch)(part_of(value, mesh) for value in batch)


def mesh_of(grid):
    return Mesh(data=grid[0], pipeline=grid[1])


def even(layers, ranks=SIZE):
    """Return how many of so many layers each rank gets if they are dealt out evenly."""
    return [layers // ranks + (rank < layers % ranks) for rank in range(ranks)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def optimizer_of(model, make=sgd):
    """Return an optimizer of what this rank has to train; None if that is nothing."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return make(parameters) if parameters else None


def assert_close(found, wanted, tolerance=1e-9):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def assert_gradients(model, reference, tolerance=1e-9):
    """Check that every parameter of this rank has the gradient that one process gives it."""
    theirs = dict(reference.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        wanted = theirs[name].grad
        found = parameter.grad
        assert found is not None or wanted is None, f"{name} has no gradient"
        if wanted is None:
            assert found is None or not found.any(), f"{name} has a gradient"
        else:
            assert_close(found, wanted, tolerance)


def assert_state(model, reference, tolerance=1e-9):
    """Check that this rank's parameters and buffers are those that one process has."""
    theirs = reference.state_dict()
    for name, tensor in model.state_dict().items():
        assert_close(tensor, theirs[name], tolerance)


def compare(
    make,
    *,
    mesh=None,
    batches=batch_of,
    loss=mse,
    steps=6,
    optimizer=sgd,
    clip=None,
    tolerance=1e-9,
    given=None,
    **how,
):
    """Train in a pipeline and on one process, and check every loss, gradient and parameter.

    Args:
        make: returns the layers.
        mesh: None: all ranks in one pipeline.
        batches: of a step, the whole batch and its targets.
        clip: the largest norm of all gradients.
        given: what the pipeline gets instead of the layers.
        how: of `PipelineModule`.

    Returns:
        The two models.
    """
    reference = Whole(make())
    model = PipelineModule(make() if given is None else given, loss, mesh=mesh, **how)
    assert_state(model, reference, 0)
    ours, theirs = optimizer_of(model, optimizer), optimizer_of(reference, optimizer)
    for step in range(steps):
        inputs, target = batches(step)
        reference.zero_grad()
        model.zero_grad()
        wanted = loss(reference(inputs), target)
        wanted.backward()
        found = model(part_of(inputs, model.mesh), part_of(target, model.mesh))
        assert_close(found.double(), wanted.detach().double(), max(tolerance, 1e-6))
        assert_gradients(model, reference, tolerance)
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
            assert_close(model.clip_grad_norm_(clip).double(), norm.double(), max(tolerance, 1e-6))
            assert_gradients(model, reference, tolerance)
        theirs.step()
        if ours is not None:
            ours.step()
    assert_state(model, reference, tolerance)
    return model, reference
