"""A model in a pipeline trains as it does on one process, whatever the schedule and the grid."""

from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from pipelining import (  # noqa: E402  (torch may be missing)
    DOUBLE,
    GRIDS,
    RANK,
    ROWS,
    SIZE,
    WIDTH,
    Head,
    Whole,
    assert_close,
    assert_gradients,
    batch_of,
    compare,
    even,
    linear,
    mesh_of,
    mse,
    part_of,
    plain,
    sgd,
)

import hvdkit.torch as hvd  # noqa: E402
from hvdkit import Mesh  # noqa: E402
from hvdkit.torch.pipeline import PipelineModule, Pop, Stash  # noqa: E402

SCHEDULES = {
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b", "microbatches": 5},
    "interleaved": {"schedule": "interleaved", "chunks": 2},
    "zb-h1": {"schedule": "zb-h1", "microbatches": 3},
}
every_schedule = pytest.mark.parametrize("how", SCHEDULES.values(), ids=SCHEDULES)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids="data {0[0]} pipeline {0[1]}".format)


def everything():
    """Layers of several kinds: a tied weight at both ends, and a skip connection."""
    torch.manual_seed(0)
    first = linear(WIDTH, 10, bias=False)
    return [
        first,
        torch.nn.Tanh(),
        Stash("skip"),
        linear(10, 10),
        torch.nn.GELU(),
        linear(10, 8),
        torch.nn.LayerNorm(8, dtype=DOUBLE),
        linear(8, 10),
        Pop("skip"),
        torch.nn.Tanh(),
        linear(10, 10),
        Head(first.weight),
    ]


@every_grid
@every_schedule
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_training(grid, how, recompute):
    """Losses, every gradient, gradients clipped over all stages, and 6 steps with momentum."""
    compare(everything, mesh=mesh_of(grid), recompute=recompute, clip=0.05, **how)


@every_schedule
def test_training_with_adam(how):
    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=0.01)

    compare(everything, optimizer=adam, tolerance=1e-7, **how)


@pytest.mark.parametrize("microbatches", [1, 2, 100])
@pytest.mark.parametrize("rows", [1, 7])
def test_batches_that_do_not_divide(microbatches, rows):
    """A last microbatch that is smaller, and fewer rows than there are to be microbatches."""

    def batches(step):
        return batch_of(step, rows)

    compare(plain, batches=batches, microbatches=microbatches, steps=2)


@every_schedule
def test_batches_that_change_their_size(how):
    def batches(step):
        return batch_of(step, (8, 3, 8, 1, 11, 2)[step])

    compare(plain, batches=batches, **how)


@every_schedule
def test_recompute_draws_the_same_again(how):
    """Dropout: with the same seed, the gradients are those of activations that were held."""

    def gradients(recompute):
        layers = [layer for pair in zip(plain()[::2], dropouts(), strict=True) for layer in pair]
        model = PipelineModule(layers, mse, recompute=recompute, **how)
        torch.manual_seed(RANK)
        model(*batch_of(0))
        return [parameter.grad for parameter in model.parameters()]

    def dropouts():
        return [torch.nn.Dropout(0.4) for _ in range(5)]

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        assert_close(found, wanted)


# What layers are given and give


class Start(torch.nn.Module):
    """Makes a float, an int and a float without gradient."""

    def forward(self, x, words):
        return x, words, (x[:, :1] > 0).to(x.dtype)


class Step(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = linear()
        self.words = torch.nn.Embedding(9, WIDTH, dtype=DOUBLE)

    def forward(self, x, words, mask):
        assert words.dtype == torch.int64
        return (self.linear(x) * mask + self.words(words)).tanh(), words, mask


class End(torch.nn.Module):
    def forward(self, x, words, mask):
        return x + words[:, None] * mask


def several_tensors():
    torch.manual_seed(1)
    return [Start(), *(Step() for _ in range(6)), End()]


@every_schedule
def test_several_tensors_at_a_boundary(how):
    """A float, an int64 and a float that needs no gradient; and several inputs."""

    def batches(step):
        x, y = batch_of(step)
        return (x, torch.arange(ROWS) % 9), y

    chunks = how.get("chunks", 1)
    if SIZE * chunks > 8:
        pytest.skip("more stages than layers")
    compare(several_tensors, batches=batches, **how)


@every_grid
def test_inputs_and_targets_of_many_tensors(grid):
    class Together(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear()

        def forward(self, batch):
            return self.linear(batch["x"]) + batch["y"][1] * batch["y"][0]

    def loss(output, target):
        wanted, weights = target
        return ((output - wanted).square().mean(1) * weights["rows"]).mean()

    def batches(step):
        x, y = batch_of(step)
        inputs = {"x": x, "y": [x.cos(), x.sin()]}
        return inputs, (y, {"rows": torch.linspace(0, 2, ROWS, dtype=DOUBLE)})

    def make():
        torch.manual_seed(2)
        return [Together(), *plain()]

    compare(make, mesh=mesh_of(grid), batches=batches, loss=loss, steps=3)


def test_one_tensor_twice_and_one_that_passes_through():
    class Twice(torch.nn.Module):
        def forward(self, x):
            return x, x

    class Through(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear()

        def forward(self, x, y):
            return self.linear(x), y

    class Together(torch.nn.Module):
        def forward(self, x, y):
            return x * y

    def make():
        torch.manual_seed(3)
        return [linear(), Twice(), *(Through() for _ in range(5)), Together()]

    compare(make, partition=even(8), steps=2)


def test_complex_numbers():
    class ToComplex(torch.nn.Module):
        def forward(self, x):
            return torch.complex(x, x.cos())

    class Turn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(WIDTH, dtype=torch.complex128))

        def forward(self, x):
            return x * self.weight

    class ToReal(torch.nn.Module):
        def forward(self, x):
            return x.conj().abs()

    def make():
        torch.manual_seed(4)
        return [linear(), ToComplex(), *(Turn() for _ in range(4)), ToReal()]

    compare(make, partition=even(7), steps=2)


def test_layers_that_work_in_place():
    """Also as the first of a stage, where what they change came from another."""

    def make():
        torch.manual_seed(5)
        layers = []
        for _ in range(5):
            layers += [linear(), torch.nn.ReLU(inplace=True)]
        return layers

    bounds = [0, *(2 * stage + 1 for stage in range(1, SIZE)), 10]
    compare(make, partition=[end - begin for begin, end in pairwise(bounds)], steps=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(dtype):
    """With one microbatch, as no sum is rounded otherwise."""

    def batches(step):
        return batch_of(step, dtype=dtype)

    compare(lambda: plain(dtype=dtype), batches=batches, microbatches=1, steps=2, tolerance=1e-6)


# Skip connections


def skipping(*places):
    """Return ten linear layers, with skip connections from one to another of these."""

    def make():
        torch.manual_seed(6)
        layers = [[linear(), torch.nn.Tanh()] for _ in range(6)]
        for number, (begin, end) in enumerate(places):
            layers[begin].append(Stash(f"{number}"))
            layers[end].insert(0, Pop(f"{number}"))
        return [layer for several in layers for layer in several]

    return make


SKIPS = {
    "over all": [(0, 5)],
    "nested": [(0, 5), (1, 4)],
    "crossing": [(0, 4), (2, 5)],
    "within a stage": [(0, 1), (2, 3), (4, 5)],
    "of two tensors at once": [(1, 3), (1, 3)],
}


@pytest.mark.parametrize("how", [SCHEDULES["1f1b"], SCHEDULES["interleaved"]], ids=["", "chunks"])
@pytest.mark.parametrize("places", SKIPS.values(), ids=SKIPS)
def test_skip_connections(how, places):
    compare(skipping(*places), steps=2, **how)


def test_skip_connections_that_are_put_together_by_a_module():
    class Gate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((WIDTH,), 0.3, dtype=DOUBLE))

        def forward(self, x, stashed):
            return x + self.weight * stashed

    def make():
        layers = plain()
        layers.insert(1, Stash("first"))
        layers.append(Pop("first", Gate()))
        return layers

    compare(make, steps=2)
    compare(make, steps=2, recompute=True)


def test_a_skip_connection_of_several_tensors():
    class Both(torch.nn.Module):
        def forward(self, x):
            return x, x.sin()

    class First(torch.nn.Module):
        def forward(self, x, y):
            return x + y

    def make():
        layers = plain()
        return [
            layers[0],
            Both(),
            Stash("both"),
            First(),
            *layers[1:],
            Pop("both", lambda x, stashed: x + stashed[0] * stashed[1]),
        ]

    compare(make, steps=2)


WRONG_SKIPS = {
    "no Pop": [Stash("a")],
    "no Stash": [Pop("a")],
    "the wrong way round": [Pop("a"), Stash("a")],
    "twice": [Stash("a"), Stash("a"), Pop("a")],
}


@pytest.mark.parametrize("extra", WRONG_SKIPS.values(), ids=WRONG_SKIPS)
def test_skip_connections_that_do_not_fit(extra):
    with pytest.raises(hvd.ArgumentError, match="skip connection 'a'"):
        PipelineModule([*plain(), *extra], mse)


def test_a_skip_connection_without_a_name():
    """Which is what the way to the next stage is called."""
    with pytest.raises(hvd.ArgumentError, match="skip connection"):
        PipelineModule([Stash(""), *plain(), Pop("")], mse)


# Tied weights


def tied_at_both_ends():
    torch.manual_seed(7)
    first = linear(bias=False)
    return [first, *plain(3), Head(first.weight)]


@every_grid
@every_schedule
def test_tied_layers(grid, how):
    """Counted once in the norm; the copies stay equal to the bit."""
    if grid[1] * how.get("chunks", 1) > 8:
        pytest.skip("more stages than layers")
    model, _ = compare(tied_at_both_ends, mesh=mesh_of(grid), clip=0.05, steps=2, **how)
    names = {"layers.0.weight", "layers.7.weight"}
    mine = {t.numpy().tobytes() for name, t in model.state_dict().items() if name in names}
    assert len(set().union(*hvd.allgather_object(mine))) == 1


def test_a_weight_in_three_layers():
    def make():
        torch.manual_seed(8)
        first = linear(bias=False)
        other = linear(bias=False)
        other.weight = first.weight
        return [
            first,
            linear(),
            torch.nn.Tanh(),
            other,
            linear(),
            torch.nn.Tanh(),
            linear(),
            Head(first.weight),
        ]

    compare(make, clip=0.05)


@every_grid
def test_tied_by_their_names(grid):
    """Layers that are yet to be made cannot share a weight, until the model has them."""

    def head():
        return Head(torch.nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=DOUBLE)))

    layers = [lambda: linear(bias=False), *plain(2), *plain(2, seed=1), head]
    model = PipelineModule(
        layers, mse, mesh=mesh_of(grid), tied=[("layers.0.weight", "layers.9.weight")]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # and the number of the layer
        first = linear(bias=False)
    reference = Whole([first, *plain(2), *plain(2, seed=1), Head(first.weight)])
    ours, theirs = sgd(model.parameters()), sgd(reference.parameters())
    for step in range(3):
        x, y = batch_of(step)
        ours.zero_grad()
        theirs.zero_grad()
        mse(reference(x), y).backward()
        model(part_of(x, model.mesh), part_of(y, model.mesh))
        assert_gradients(model, reference)
        wanted = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        assert_close(model.clip_grad_norm_(0.05).double(), wanted, 1e-6)
        ours.step()
        theirs.step()


def test_a_tie_that_is_told_twice():
    """By modules that share a weight and by its names, and by names in pairs."""
    ties = [("layers.0.weight", "layers.7.weight"), ("layers.1.weight", "layers.7.weight")]

    def make():
        layers = tied_at_both_ends()
        layers[1] = Head(layers[0].weight)
        return layers

    compare(make, tied=ties, clip=0.05, steps=2)


@pytest.mark.parametrize(
    "name", ["layers.0", "0.weight", "layers.0.nothing", "layers.99.weight", "weight"]
)
def test_names_that_there_are_not(name):
    with pytest.raises(hvd.ArgumentError):
        PipelineModule(plain(), mse, tied=[("layers.8.weight", name)])


# Gradients that stay


@every_grid
@every_schedule
def test_gradients_accumulate_until_they_are_reset(grid, how):
    """As backward does: two batches, one step.  Ties and frozen layers among them."""
    mesh = mesh_of(grid)
    reference, model = Whole(everything()), PipelineModule(everything(), mse, mesh=mesh, **how)
    for step in range(2):
        for batch in (2 * step, 2 * step + 1):
            x, y = batch_of(batch)
            mse(reference(x), y).backward()
            model(part_of(x, mesh), part_of(y, mesh))
        assert_gradients(model, reference)
        for each in (reference, model):
            each.zero_grad(set_to_none=step % 2 == 0)


def test_frozen_layers():
    """The first stage whole, some in the middle; and the tied ones, which decay must not touch."""

    def make():
        layers = everything()
        for number in (0, 3, 6):
            layers[number].requires_grad_(False)
        return layers

    def decaying(parameters):
        return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.5)

    _, reference = compare(make, optimizer=decaying)
    frozen = reference.layers[0].weight
    assert_close(frozen, everything()[0].weight, 0)


def test_an_optimizer_that_is_given_frozen_parameters_as_well():
    """A frozen parameter has no gradient, or weight decay would change it."""

    def make():
        layers = tied_at_both_ends()
        layers[0].weight.requires_grad_(False)
        return layers

    def decaying(parameters):
        return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.5)

    model = PipelineModule(make(), mse)
    optimizer = decaying(model.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(2):
        optimizer.zero_grad()
        model(*batch_of(step))
        optimizer.step()
    for name in ("layers.0.weight", "layers.7.weight"):
        if name in before:
            assert_close(model.state_dict()[name], before[name], 0)


@every_grid
def test_layers_that_are_unfrozen(grid):
    mesh = mesh_of(grid)
    reference, model = Whole(plain()), PipelineModule(plain(), mse, mesh=mesh)
    ours, theirs = sgd(model.parameters()), sgd(reference.parameters())
    for step, frozen in enumerate([(0, 4), (4,), (8,), ()]):
        for each in (reference, model):
            for name, parameter in each.named_parameters():
                parameter.requires_grad_(int(name.split(".")[1]) not in frozen)
        x, y = batch_of(step)
        ours.zero_grad()
        theirs.zero_grad()
        mse(reference(x), y).backward()
        model(part_of(x, mesh), part_of(y, mesh))
        assert_gradients(model, reference)
        ours.step()
        theirs.step()


@every_schedule
def test_a_stage_without_parameters(how):
    """It computes and passes gradients on, and takes part in the norm."""

    def make():
        torch.manual_seed(9)
        return [*plain(2)[:3], *(torch.nn.Tanh() for _ in range(9))]

    if "chunks" not in how and SIZE > 1:
        how = how | {"partition": [3, *even(9, SIZE - 1)]}
    compare(make, clip=0.05, steps=2, **how)


def test_a_part_that_is_not_used():
    """A layer whose parameters have no gradient in some microbatches, or never."""

    class Sometimes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.sometimes, self.never = (linear() for _ in range(3))

        def forward(self, x):
            y = self.always(x)
            return y + self.sometimes(x).tanh() if x[0, 0] > 0 else y

    def rows(step):
        x, y = batch_of(step)
        x[:, 0] = x[:, 0].abs() * torch.tensor([1, -1, 1], dtype=DOUBLE).repeat_interleave(4)
        return x, y

    torch.manual_seed(10)
    layers = [Sometimes() for _ in range(5)]
    model = PipelineModule(layers, mse, microbatches=3)
    for step in range(2):
        model(*rows(step))
    mine = [layer.never for layer in model.layers.values()]
    assert all(parameter.grad is None for layer in mine for parameter in layer.parameters())


# Large activations


@pytest.mark.parametrize("how", [SCHEDULES["gpipe"], SCHEDULES["1f1b"]], ids=["gpipe", "1f1b"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "with a skip connection"])
def test_activations_above_the_eager_limit(how, skip):
    """4 MiB each, eight microbatches: whoever waited in a send would wait for ever."""
    rows, columns = 8, 1 << 20

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(1.1))

        def forward(self, x):
            return x * self.weight

    layers = [Scale() for _ in range(5)]
    if skip:
        layers = [layers[0], Stash("skip"), *layers[1:], Pop("skip")]
    model = PipelineModule(layers, lambda x, _: x.mean(), **how | {"microbatches": 8})
    x = torch.ones(rows, columns)
    loss = model(x, torch.zeros(rows))
    assert loss.item() == pytest.approx(1.1**5 + 1.1 * skip, rel=1e-5)
    wanted = 1.1**4
    for name, parameter in model.named_parameters():
        first = skip and name == "layers.0.weight"
        assert parameter.grad.item() == pytest.approx(wanted + first, rel=1e-5)


# Layers, and where they are


def functions(calls=None):
    """Return functions that make layers, and note down which made a real one."""

    def maker(number):
        def make():
            layer = linear() if number % 2 == 0 else torch.nn.LayerNorm(WIDTH, dtype=DOUBLE)
            if calls is not None and not next(layer.parameters()).is_meta:
                calls.append(number)
            return layer

        return make

    return [maker(number) for number in range(10)]


@every_grid
def test_layers_made_from_functions(grid):
    """Each rank makes its own, once; they are the same whatever the grid."""
    mesh, calls = mesh_of(grid), []
    before = torch.random.get_rng_state()
    model = PipelineModule(functions(calls), mse, mesh=mesh, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    mine = model.partition.layers(mesh.place("pipeline"))
    assert calls == list(mine)
    assert sorted(map(int, model.layers)) == calls
    places = dict(hvd.allgather_object((mesh.place("pipeline"), calls)))
    assert sorted(number for numbers in places.values() for number in numbers) == list(range(10))

    whole = []
    for number, make in enumerate(functions()):
        torch.manual_seed(5 + number)
        whole.append(make())
    assert_gradients(model, Whole(whole))
    for name, tensor in model.state_dict().items():
        assert_close(tensor, Whole(whole).state_dict()[name], 0)
    torch.random.set_rng_state(before)
    compare(lambda: whole, mesh=mesh, given=functions(), seed=5, steps=2)


def test_other_seeds_make_other_layers():
    states = [
        PipelineModule(functions(), mse, mesh=Mesh(data=SIZE), seed=seed).state_dict()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    weight = "layers.0.weight"
    assert not torch.equal(states[0][weight], states[2][weight])
    assert not torch.equal(states[0][weight], states[0]["layers.2.weight"])


def test_names_are_those_of_the_whole_sequence():
    model = PipelineModule(torch.nn.Sequential(*plain()), mse)
    names = {name for held in hvd.allgather_object(list(model.state_dict())) for name in held}
    assert names == set(Whole(plain()).state_dict())
    assert model.partition.stages == SIZE
    model.load_state_dict(model.state_dict())


def test_split_by_hand():
    lengths = [10 - (SIZE - 1), *[1] * (SIZE - 1)]
    model = PipelineModule(plain(), mse, partition=lengths)
    assert model.partition.lengths == tuple(lengths)
    assert len(model.layers) == lengths[RANK]


@every_grid
def test_split_by_time(grid):
    """The dry run leaves the layers as they were, and draws no numbers."""

    def make():
        layers = plain()
        torch.manual_seed(11)
        for number in (3, 7):
            layers[number] = torch.nn.BatchNorm1d(WIDTH, dtype=DOUBLE)
        layers[5] = torch.nn.Dropout(0.5)
        return [*layers[:2], Stash("a"), *layers[2:], Pop("a")]

    wanted = Whole(make()).state_dict()
    layers = make()
    before = torch.random.get_rng_state()
    model = PipelineModule(
        layers, mse, mesh=mesh_of(grid), partition="time", example=batch_of(0, 4)[0]
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    told = set(hvd.allgather_object(model.partition.bounds))
    assert len(told) == 1
    for name, tensor in model.state_dict().items():
        assert_close(tensor, wanted[name], 0)
    model(*(part_of(each, model.mesh) for each in batch_of(1, 8 * SIZE)))


REFUSED = {
    "no such schedule": ({"schedule": "2f2b"}, "unknown pipeline schedule '2f2b'"),
    "chunks": ({"chunks": 2}, "one chunk"),
    "no microbatches": ({"microbatches": 0}, "at least one"),
    "too few layers": ({"schedule": "interleaved", "chunks": 11}, "cannot make"),
    "stages": ({"partition": [1] * (SIZE + 1)}, "stages"),
    "no example": ({"partition": "time"}, "give it an example"),
    "no such way": ({"partition": "memory"}, "partition='memory'"),
    "speeds": ({"speeds": [1.0] * (SIZE + 1)}, "one each"),
    "memory": ({"memory_limit": 100}, "needs 1.31 KiB"),
}


@pytest.mark.parametrize(("how", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(how, message):
    with pytest.raises(hvd.ArgumentError, match=message):
        PipelineModule(plain(), mse, **how)


@pytest.mark.parametrize(
    "batch", [torch.zeros(()), torch.zeros(0, WIDTH), (), {}, 5, (torch.zeros(2), torch.zeros(3))]
)
def test_batches_that_are_none(batch):
    """Refused before anything is sent; the next batch is as ever."""
    model = PipelineModule(plain(), mse)
    with pytest.raises(hvd.ArgumentError, match="a batch is"):
        model(batch, torch.zeros(2))
    model(*batch_of(0))


@pytest.mark.parametrize("rows", [2, ROWS - 1, ROWS + 1])
def test_targets_of_other_rows(rows):
    model = PipelineModule(plain(), mse)
    with pytest.raises(hvd.ArgumentError, match=f"{ROWS} rows with targets of {rows}"):
        model(batch_of(0)[0], torch.zeros(rows, 1, dtype=DOUBLE))
