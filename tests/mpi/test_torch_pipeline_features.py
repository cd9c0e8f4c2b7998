"""What a training loop does besides: mixed precision, clipping, evaluation, prediction, text."""

import copy
import math

import numpy as np
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
    assert_state,
    batch_of,
    compare,
    linear,
    mesh_of,
    mse,
    part_of,
    plain,
    sgd,
)

import hvdkit.torch as hvd  # noqa: E402
from hvdkit import Mesh  # noqa: E402
from hvdkit.torch.pipeline import PipelineModule  # noqa: E402
from hvdkit.torch.pipeline.worker import Microbatch, Stage, TorchWorker  # noqa: E402

every_grid = pytest.mark.parametrize("grid", GRIDS, ids="data {0[0]} pipeline {0[1]}".format)
late_or_not = pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")


# Mixed precision


@late_or_not
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_autocast(schedule, recompute):
    """Around the call; losses and gradients as near as bfloat16 is."""

    def make():
        layers = plain(dtype=torch.float32)
        layers.insert(3, torch.nn.LayerNorm(WIDTH))
        return layers

    reference = Whole(make())
    model = PipelineModule(make(), mse, schedule=schedule, recompute=recompute)
    x, y = batch_of(0, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = mse(reference(x), y)
        found = model(x, y)
        assert_close(model.predict(x), reference(x).detach(), 0.02)
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=0.01)
    for name, parameter in model.named_parameters():
        theirs = dict(reference.named_parameters())[name]
        assert parameter.grad.dtype == torch.float32
        assert_close(parameter.grad, theirs.grad, 0.02)
    exact = Whole(make())
    mse(exact(x), y).backward()
    ours, theirs = model.named_parameters(), dict(exact.named_parameters())
    assert any(not torch.equal(p.grad, theirs[name].grad) for name, p in ours)  # it was on


@late_or_not
def test_autocast_leaves_double_precision_alone(schedule):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(plain, schedule=schedule, steps=2)


@late_or_not
def test_autocast_at_boundaries(schedule):
    """Between linear layers bfloat16 goes from stage to stage, and back."""

    def make():
        torch.manual_seed(1)
        return [linear(dtype=torch.float32) for _ in range(5)]

    reference, model = Whole(make()), PipelineModule(make(), mse, schedule=schedule)
    x, y = batch_of(0, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = mse(reference(x).float(), y)
        assert model.predict(x).dtype == torch.bfloat16
        found = model(x, y)
    assert found.item() == pytest.approx(wanted.item(), rel=0.02)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


class Overflowing(torch.nn.Module):
    """Lets everything through; its weight's gradient overflows when it is told to."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(WIDTH, dtype=DOUBLE))
        self.overflows = False

    def forward(self, x):
        weight = self.weight
        if self.overflows and weight.requires_grad and torch.is_grad_enabled():
            weight = weight * 1.0
            weight.register_hook(lambda gradient: gradient * math.inf)
        return x * weight


@every_grid
@late_or_not
def test_a_scaler_skips_the_step_on_all_ranks(grid, schedule):
    """If gradients overflow in any stage; and else trains as without."""
    mesh = mesh_of(grid)

    def make():
        return [layer for each in plain() for layer in (each, Overflowing())]

    reference = Whole(make())
    model = PipelineModule(make(), mse, mesh=mesh, schedule=schedule)
    ours, theirs = sgd(model.parameters()), sgd(reference.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    scale = 64.0
    for step, overflows in enumerate([None, 1, None, 19, None]):
        for number in (1, 19):
            if str(number) in model.layers:
                model.layers[str(number)].overflows = number == overflows
        x, y = batch_of(step)
        ours.zero_grad()
        found = model(part_of(x, mesh), part_of(y, mesh), scale=scaler.scale)
        theirs.zero_grad()
        wanted = mse(reference(x), y)
        wanted.backward()
        assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
        scaler.unscale_(ours)
        if overflows is None:
            assert_gradients(model, reference)
            theirs.step()
        scaler.step(ours)
        scaler.update()
        scale = scale / 2 if overflows is not None else scale
        assert scaler.get_scale() == scale
        assert_state(model, reference)


# Norms


@every_grid
@pytest.mark.parametrize("largest", [1e-3, 0.05, 1e6])
def test_clipping(grid, largest):
    """The norm is the whole model's, shared weights counted once."""
    mesh = mesh_of(grid)

    def make():
        torch.manual_seed(2)
        first = linear(bias=False)
        return [first, *plain(3), Head(first.weight)]

    reference, model = Whole(make()), PipelineModule(make(), mse, mesh=mesh)
    x, y = batch_of(0)
    mse(reference(x), y).backward()
    model(part_of(x, mesh), part_of(y, mesh))
    wanted = torch.nn.utils.clip_grad_norm_(reference.parameters(), largest)
    found = model.clip_grad_norm_(largest)
    assert_close(found.double(), wanted, 1e-6)
    assert_gradients(model, reference, 1e-12)


def test_clipping_single_precision():
    compare(lambda: plain(dtype=torch.float32), batches=singles, clip=0.01, tolerance=1e-6)


def singles(step):
    return batch_of(step, dtype=torch.float32)


def test_clipping_what_has_no_gradients():
    model = PipelineModule(plain(), mse)
    assert model.clip_grad_norm_(1.0).item() == 0.0


# Evaluation


def with_statistics():
    """Layers with buffers, and one that only trains."""
    torch.manual_seed(3)
    layers = plain()
    for number in (2, 7):
        layers.insert(number, torch.nn.BatchNorm1d(WIDTH, dtype=DOUBLE))
    return layers


@every_grid
def test_evaluate(grid):
    """The loss of the whole batch, by statistics that it does not change; nothing is trained."""
    mesh = mesh_of(grid)
    layers = [*with_statistics(), torch.nn.Dropout(0.5)]
    model = PipelineModule(copy.deepcopy(layers), mse, mesh=mesh)
    reference = Whole(layers).eval()
    state = copy.deepcopy(model.state_dict())
    for rows in (ROWS, SIZE * 2, 5 * SIZE):
        batch = batch_of(1, rows)
        wanted = mse(reference(batch[0]), batch[1]).item()
        mine = [part_of(each, mesh) for each in batch]
        assert model.training
        found = model.evaluate(*mine)
        assert model.training
        assert found.item() == pytest.approx(wanted, rel=1e-6)
        model.eval()
        assert model(*mine).item() == pytest.approx(wanted, rel=1e-6)
        assert not model.training
        model.train()
    assert not any(p.grad is not None or p.requires_grad is False for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


@every_grid
def test_predict(grid):
    """On every rank, of every row, in order."""
    mesh = mesh_of(grid)
    reference = Whole(with_statistics()).eval()
    model = PipelineModule(with_statistics(), mse, mesh=mesh)
    for rows in (SIZE, 7 * SIZE, 1):
        x = batch_of(2, rows)[0]
        mine = x if rows == 1 else part_of(x, mesh)
        found = model.predict(mine)
        assert_close(found, reference(mine).detach())
        assert not found.requires_grad


def test_predict_several_tensors():
    class Both(torch.nn.Module):
        def forward(self, x):
            return {"sum": x.sum(1), "several": (x, x.argmax(1))}

    layers = [*plain(), Both()]
    x = batch_of(3, 7)[0]
    wanted = Whole(layers)(x)
    found = PipelineModule(copy.deepcopy(layers), mse).predict(x)
    assert_close(found["sum"], wanted["sum"].detach())
    assert type(found["several"]) is tuple
    assert_close(found["several"][0], wanted["several"][0].detach())
    assert torch.equal(found["several"][1], wanted["several"][1])


def test_what_is_set_to_eval_stays_so():
    """As users do with a batch norm that is to keep its statistics."""
    model = PipelineModule(with_statistics(), mse)
    norms = [each for each in model.modules() if isinstance(each, torch.nn.BatchNorm1d)]
    for norm in norms:
        norm.eval()
    model.evaluate(*batch_of(0))
    model.predict(batch_of(0)[0])
    assert model.training
    assert not any(norm.training for norm in norms)


def test_training_and_evaluation_in_turns():
    """Also with a batch of another size, and after one that was not finished by a step."""
    reference, model = Whole(plain()), PipelineModule(plain(), mse)
    ours, theirs = sgd(model.parameters()), sgd(reference.parameters())
    for step in range(4):
        x, y = batch_of(step)
        ours.zero_grad()
        theirs.zero_grad()
        mse(reference(x), y).backward()
        model(x, y)
        a, b = batch_of(10, 5 + step)
        assert model.evaluate(a, b).item() == pytest.approx(mse(reference(a), b).item(), rel=1e-6)
        assert_gradients(model, reference)
        ours.step()
        theirs.step()
        assert_close(model.predict(a), reference(a).detach())


# Buffers


def microbatched(layers, batches, count):
    """Train one process on microbatches in order, as the stages of a pipeline see them."""
    reference = Whole(layers)
    optimizer = sgd(reference.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        for a, b in zip(x.tensor_split(count), y.tensor_split(count), strict=True):
            (mse(reference(a), b) * len(a) / len(x)).backward()
        optimizer.step()
    return reference


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_buffers_are_those_of_their_stage(schedule):
    """Statistics of batches are those of the microbatches, and on the rank of the layer alone."""
    reference = microbatched(with_statistics(), [batch_of(step) for step in range(4)], 3)
    model = PipelineModule(with_statistics(), mse, schedule=schedule, microbatches=3)
    optimizer = sgd(model.parameters())
    for step in range(4):
        optimizer.zero_grad()
        model(*batch_of(step))
        optimizer.step()
    assert_state(model, reference)
    found = [name for names in hvd.allgather_object(list(model.state_dict())) for name in names]
    assert sorted(found) == sorted(reference.state_dict())


# Text


class Words(torch.nn.Module):
    def __init__(self, words=17, places=10):
        super().__init__()
        self.words = torch.nn.Embedding(words, WIDTH, dtype=DOUBLE)
        self.places = torch.nn.Embedding(places, WIDTH, dtype=DOUBLE)

    def forward(self, tokens):
        return self.words(tokens) + self.places(torch.arange(tokens.shape[1]))


class Attention(torch.nn.Module):
    """A causal one, of one head."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH, dtype=DOUBLE)
        self.qkv = linear(WIDTH, 3 * WIDTH)
        self.out = linear()

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(found)


class Logits(torch.nn.Module):
    def __init__(self, words):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH, dtype=DOUBLE)
        self.weight = words.words.weight

    def forward(self, x):
        return torch.nn.functional.linear(self.norm(x), self.weight)


def language():
    torch.manual_seed(4)
    words = Words()
    return [words, *(Attention() for _ in range(4)), Logits(words)]


def entropy(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def text(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(17, (ROWS, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


@every_grid
@late_or_not
def test_a_language_model(grid, schedule):
    compare(
        language,
        mesh=mesh_of(grid),
        schedule=schedule,
        batches=text,
        loss=entropy,
        steps=3,
        clip=0.5,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        tolerance=1e-7,
    )


@pytest.mark.parametrize("window", [None, 4])
def test_generate(window):
    reference, model = Whole(language()), PipelineModule(language(), entropy)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    wanted = tokens
    for _ in range(5):
        seen = wanted if window is None else wanted[:, -window:]
        wanted = torch.cat([wanted, reference(seen)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(tokens, 5, window=window), wanted)
    assert torch.equal(model.generate(tokens, 0), tokens)
    assert tokens.shape == (2, 3)


def test_generate_by_drawing():
    """With the same seed on every rank, the same text."""
    model = PipelineModule(language(), entropy)
    generator = torch.Generator().manual_seed(6)

    def draw(logits):
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)

    found = model.generate(torch.tensor([[1, 2]] * 3), 6, choose=draw)
    everyone = hvd.allgather(found[None])
    assert (everyone == everyone[0]).all()
    assert len({tuple(row) for row in found.tolist()}) > 1


# Several models, and the end


def test_two_models_at_once():
    """With other schedules on other grids, in turns."""
    grids = [GRIDS[0], GRIDS[-1]]
    references = [Whole(plain(seed=seed)) for seed in range(2)]
    models = [
        PipelineModule(plain(seed=seed), mse, mesh=mesh_of(grid), schedule=schedule)
        for seed, (grid, schedule) in enumerate(zip(grids, ["1f1b", "gpipe"], strict=True))
    ]
    for step in range(2):
        x, y = batch_of(step)
        for model, reference in zip(models, references, strict=True):
            mse(reference(x), y).backward()
            model(part_of(x, model.mesh), part_of(y, model.mesh))
    for model, reference in zip(models, references, strict=True):
        assert_gradients(model, reference)


def test_beside_collectives_and_another_optimizer():
    """What else a rank does with the others, between steps and in a loss."""
    other = linear()
    model = PipelineModule(plain(), mse)
    optimizer = hvd.DistributedOptimizer(sgd(other.parameters()), other.named_parameters())
    for step in range(3):
        x, y = batch_of(step)
        handle = hvd.allreduce_async(torch.full((1000,), RANK, dtype=DOUBLE), op=hvd.Sum)
        model(x, y)
        assert (hvd.synchronize(handle) == SIZE * (SIZE - 1) / 2).all()
        optimizer.zero_grad()
        mse(other(model.predict(x)), y).backward()
        optimizer.step()
    weights = hvd.allgather(other.weight.detach()[None])
    assert (weights == weights[0]).all()


@several
def test_gradients_are_averaged_beside_the_drain():
    """Where stages have replicas: bucket by bucket, and not twice."""
    mesh = Mesh(data=SIZE, pipeline=1)
    model = PipelineModule(plain(), mse, mesh=mesh)
    x, y = batch_of(0)
    model(x[RANK::SIZE], y[RANK::SIZE])
    mine = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    everyone = hvd.allgather_object({name: grad.numpy() for name, grad in mine.items()})
    for theirs in everyone:
        for name, gradient in theirs.items():
            np.testing.assert_array_equal(gradient, mine[name])


def test_a_mesh_without_a_pipeline():
    """Is data parallelism alone."""

    def batches(step):
        return batch_of(step, 4 * SIZE)

    compare(plain, mesh=Mesh(data=-1), batches=batches, steps=2)


def test_a_mesh_with_a_third_axis():
    """Whose ranks do the same."""
    mesh = Mesh(tensor=SIZE, pipeline=1)
    compare(plain, mesh=mesh, steps=2)


@several
def test_replicas_start_alike():
    mesh = Mesh(data=SIZE, pipeline=1)
    model = PipelineModule(
        [*plain(seed=RANK), torch.nn.BatchNorm1d(WIDTH, dtype=DOUBLE)], mse, mesh=mesh
    )
    wanted = plain(seed=0)[0].weight.detach()
    assert torch.equal(model.layers["0"].weight.detach(), wanted)


@several
def test_a_model_of_before_the_shutdown():
    """Says so, on every rank; a new one trains."""
    model = PipelineModule(plain(), mse)
    model(*batch_of(0))
    hvd.shutdown()
    for call in (lambda: model(*batch_of(0)), lambda: model.predict(batch_of(0)[0])):
        with pytest.raises(hvd.NotInitializedError):
            call()
    hvd.init()
    compare(plain, steps=2)


@pytest.mark.parametrize("odd", [{}, None, 3, ({}, 1)], ids=repr)
def test_layers_that_return_what_cannot_be_sent(odd):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return (x, *odd) if isinstance(odd, tuple) else odd

    worker = TorchWorker(stages={0: Stage({0: Odd()})}, last=1, loss=None)
    worker.microbatches = [Microbatch(torch.ones(3))]
    with pytest.raises(hvd.ArgumentError, match="go tensors, and tuples of them"):
        worker.forward(0, 0, {})


# Checkpoints


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD], ids=["adamw", "sgd"])
def test_a_checkpoint_goes_on_in_another_mesh(tmp_path, kind):
    """From one pipeline of all ranks to replicas on all: the same losses as without a stop."""
    folder = hvd.broadcast_object(str(tmp_path))
    meshes = [Mesh(pipeline=-1), Mesh(data=-1)]

    def make(mesh, lr):
        model = PipelineModule(plain(), mse, mesh=mesh)
        momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return model, kind(model.parameters(), lr=lr, **momentum)

    def train(model, optimizer, steps):
        found = []
        for step in steps:
            parts = [batch_of(SIZE * step + i) for i in range(SIZE)]  # as many rows for each
            x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            optimizer.zero_grad()
            found.append(model(part_of(x, model.mesh), part_of(y, model.mesh)).item())
            optimizer.step()
        return found

    model, optimizer = make(meshes[0], 0.02)
    train(model, optimizer, range(3))
    model.save(folder, optimizer, {"step": 3})
    wanted = train(model, optimizer, range(3, 6))
    for mesh in meshes:
        model, optimizer = make(mesh, 0.5)  # which the checkpoint's learning rate replaces
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        begin = model.load(folder, optimizer)["step"]
        found = train(model, optimizer, range(begin, begin + 3))
        assert found == pytest.approx(wanted, rel=1e-6)
    hvd.barrier()


def test_a_checkpoint_of_another_model(tmp_path):
    folder = hvd.broadcast_object(str(tmp_path))
    model = PipelineModule(plain(), mse)
    with pytest.raises(hvd.CheckpointError):
        model.load(folder)
    model.save(folder)
    other = PipelineModule([torch.nn.Linear(6, 7) for _ in range(SIZE)], mse)
    with pytest.raises(hvd.CheckpointError):
        other.load(folder)
    hvd.barrier()
