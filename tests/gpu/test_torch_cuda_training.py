"""Training on GPUs: as one process on all the data would, and with the exchange beside backward."""

import copy
import time
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs torch with CUDA, and a GPU", allow_module_level=True)

from gpu.slow import delay_copies, device, on, sleep, without_synchronisation  # noqa: E402

import hvdkit.torch as hvd  # noqa: E402  (torch may be missing)

RANK, SIZE = hvd.rank(), hvd.size()
ROWS = 6  # a rank
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mlp(*, dtype=torch.float64):
    layers = [torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(16, 4)).to(device(), dtype)


def batches(count=4, *, dtype=torch.float64):
    """Yield the inputs of all ranks together, and of this rank."""
    for _ in range(count):
        everything = torch.randn(SIZE * ROWS, 8, dtype=dtype).to(device())
        yield everything, everything[RANK * ROWS : (RANK + 1) * ROWS]


def loss_of(model, inputs):
    return model(inputs).square().mean()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def check_same_everywhere(model):
    for parameter in model.parameters():
        everyone = hvd.allgather(parameter.detach()[None])
        assert torch.equal(everyone, everyone[:1].expand_as(everyone))


@pytest.mark.parametrize("stream", ["default", "another"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"bucket_bytes": 0},
        {"gradient_as_bucket_view": False},
        {"num_groups": 2},
        {"gradient_predivide_factor": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_are_those_of_one_process_on_all_data(stream, how, set_to_none):
    with on(stream):
        model = mlp()
        alone = copy.deepcopy(model)
        optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters(), **how)
        reference = sgd(alone)
        for everything, inputs in batches():
            delay_copies()
            optimizer.zero_grad(set_to_none)
            loss_of(model, inputs).backward()
            optimizer.step()
            reference.zero_grad()
            loss_of(alone, everything).backward()
            reference.step()
            for parameter, wanted in zip(model.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(parameter, wanted)


class Forked(torch.nn.Module):
    """Two branches, computed on two streams."""

    def __init__(self):
        super().__init__()
        self.left, self.right = torch.nn.Linear(8, 400), torch.nn.Linear(8, 400)
        self.stream = None

    def forward(self, x):
        if self.stream is None:
            return self.left(x).sum() + self.right(x).square().sum()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            left = Late.apply(self.left(x)).sum()
        right = self.right(x).square().sum()
        current.wait_stream(self.stream)
        return left + right


class Late(torch.autograd.Function):
    """The identity, with a gradient that takes long."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        sleep()
        return gradient.clone()


def test_a_bucket_filled_on_several_streams():
    model = Forked().to(device())
    alone = copy.deepcopy(model)
    model.stream = torch.cuda.Stream()
    optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters())
    for _ in range(3):
        inputs = torch.randn(4, 8).to(device())  # the same on all ranks
        for each in (model, alone):
            each.zero_grad()
            each(inputs).backward()
        optimizer.synchronize()
        for parameter, wanted in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, wanted.grad)


@several
def test_the_exchange_runs_beside_backward():
    """The last layer's gradient is reduced while the GPU still works on the first one's."""
    first, last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    model = torch.nn.ModuleList([first, last]).to(device())
    optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters(), bucket_bytes=0)
    for number in range(3):
        optimizer.zero_grad()
        hidden = first(torch.ones(1, 8, device=device()))
        for _ in range(10):
            hidden = Late.apply(hidden)
        last(hidden).sum().backward()
        end = torch.cuda.current_stream().record_event()
        if number == 2:
            handles = optimizer._gradients[0]._reducer._handles
            deadline = time.perf_counter() + 30
            while not handles[0].poll() and time.perf_counter() < deadline:
                time.sleep(0.001)
            assert not end.query()
        optimizer.step()


def test_no_step_synchronises_behind_the_scenes():
    model = mlp()
    optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters())
    for number, (_, inputs) in enumerate(list(batches(6))):
        settled = number >= 2  # plans are made, and memory is taken
        with without_synchronisation() if settled else nullcontext():
            optimizer.zero_grad()
            loss_of(model, inputs).backward()
            optimizer.step()
    check_same_everywhere(model)


def test_gradient_accumulation_and_clipping():
    model = mlp()
    alone = copy.deepcopy(model)
    optimizer = hvd.DistributedOptimizer(
        sgd(model), model.named_parameters(), backward_passes_per_step=2
    )
    reference = sgd(alone)
    for _ in range(3):
        for everything, inputs in batches(2):
            loss_of(model, inputs).backward()
            loss_of(alone, everything).backward()
        optimizer.synchronize()
        for each in (model, alone):
            torch.nn.utils.clip_grad_norm_(each.parameters(), 0.1)
        with optimizer.skip_synchronize():
            optimizer.step()
        optimizer.zero_grad()
        reference.step()
        reference.zero_grad()
    for parameter, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted)


@pytest.mark.parametrize("compression", ["fp16", "bf16", "int8"])
def test_compression(compression):
    model = mlp(dtype=torch.float32)
    optimizer = hvd.DistributedOptimizer(
        sgd(model), model.named_parameters(), getattr(hvd.Compression, compression)
    )
    losses = []
    for everything, inputs in batches(dtype=torch.float32):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()
        losses.append(loss_of(model, everything).item())
    assert losses[-1] < losses[0]
    check_same_everywhere(model)


def test_mixed_precision_with_a_gradient_scaler():
    model = mlp(dtype=torch.float32)
    optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for number, (_, inputs) in enumerate(batches(5, dtype=torch.float32)):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = loss_of(model, inputs)
        overflows = number == 2 and RANK == 0  # on one rank; all must skip the step
        scaler.scale(loss * float("inf") if overflows else loss).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        unchanged = all(map(torch.equal, before, model.parameters()))
        assert unchanged == (number == 2)
        assert scaler.get_scale() == (1024 if number < 2 else 512)
        check_same_everywhere(model)


def test_sync_batch_norm():
    norm = torch.nn.BatchNorm2d(3).to(device(), torch.float64)
    synced = hvd.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(norm))
    for _ in range(3):
        everything = torch.randn(SIZE * 4, 3, 5, 5, dtype=torch.float64).to(device())
        rows = slice(RANK * 4, (RANK + 1) * 4)
        whole = everything.clone().requires_grad_()
        part = everything[rows].clone().requires_grad_()
        delay_copies()
        wanted, found = norm(whole), synced(part)
        torch.testing.assert_close(found, wanted[rows])
        wanted.pow(3).sum().backward()
        found.pow(3).sum().backward()
        torch.testing.assert_close(part.grad, whole.grad[rows])
    torch.testing.assert_close(synced.running_mean, norm.running_mean)
    torch.testing.assert_close(synced.running_var, norm.running_var)
    half = synced.float()(torch.randn(4, 3, 5, 5, device=device()).half())
    assert half.dtype == torch.float16


def test_parameters_on_the_cpu_and_on_the_gpu():
    there, here = torch.nn.Linear(8, 8).to(device()), torch.nn.Linear(8, 4)
    model = torch.nn.ModuleList([there, here])
    optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters())
    for _ in range(3):
        optimizer.zero_grad()
        inputs = torch.full((2, 8), float(RANK), device=device())
        here(there(inputs).cpu()).square().sum().backward()
        optimizer.step()
    for parameter in model.parameters():
        everyone = hvd.allgather(parameter.detach()[None])
        assert torch.equal(everyone, everyone[:1].expand_as(everyone))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs several GPUs")
def test_parameters_on_several_gpus():
    model = torch.nn.ModuleList(
        torch.nn.Linear(8, 8).to(f"cuda:{index}") for index in range(torch.cuda.device_count())
    )
    optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters())
    for _ in range(3):
        optimizer.zero_grad()
        data = torch.full((2, 8), float(RANK))
        for layer in model:
            data = layer(data.to(layer.weight.device))
        data.square().sum().backward()
        optimizer.step()
    check_same_everywhere(model)


@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_sparse_gradients(sparse_as_dense):
    table = torch.nn.Embedding(50, 4, sparse=True).to(device())
    start = table.weight.detach().clone()
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    optimizer = hvd.DistributedOptimizer(
        optimizer, table.named_parameters(), sparse_as_dense=sparse_as_dense
    )
    for _ in range(3):
        optimizer.zero_grad()
        table(torch.tensor([RANK, 40], device=device())).sum().backward()
        optimizer.step()
    wanted = start.clone()
    wanted[:SIZE] -= 3 / SIZE
    wanted[40] -= 3
    torch.testing.assert_close(table.weight.detach(), wanted)


def test_optimizers_come_and_go():
    """What they have registered is given back, also with copies under way."""
    for _ in range(3):
        model = mlp()
        optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters())
        for _, inputs in batches(2):
            optimizer.zero_grad()
            loss_of(model, inputs).backward()
            delay_copies()
            optimizer.step()
        del optimizer
    check_same_everywhere(model)


def test_adasum():
    model = mlp()
    optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters(), op=hvd.Adasum)
    for _, inputs in batches(3):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()
    check_same_everywhere(model)


@pytest.mark.parametrize("root", [0, SIZE - 1])
def test_starting_alike(root):
    torch.manual_seed(RANK)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    if root == RANK:
        loss_of(model, torch.randn(4, 8, dtype=torch.float64, device=device())).backward()
        optimizer.step()
    hvd.broadcast_parameters(model.state_dict(), root)
    hvd.broadcast_optimizer_state(optimizer, root)
    check_same_everywhere(model)
    for state in optimizer.state.values():
        assert state["exp_avg"].device == device()
        everyone = hvd.allgather(state["exp_avg"][None])
        assert torch.equal(everyone, everyone[:1].expand_as(everyone))
