"""SyncBatchNorm on each rank's rows equals BatchNorm on all of them."""

import copy
import itertools

import pytest

import hvdkit.torch as hvd

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from hvdkit.torch import sync_batch_norm  # noqa: E402  (torch may be missing)
from hvdkit.torch.sync_batch_norm import SyncBatchNorm  # noqa: E402

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")

CHANNELS = 5
INNER = {"2d": (), "3d": (7,), "4d": (4, 3), "5d": (2, 3, 2)}
BATCH_NORMS = {
    "2d": torch.nn.BatchNorm1d,
    "3d": torch.nn.BatchNorm1d,
    "4d": torch.nn.BatchNorm2d,
    "5d": torch.nn.BatchNorm3d,
}
ROWS = {
    "even": [4] * SIZE,
    "uneven": [2 + 3 * rank for rank in range(SIZE)],
    "one row on rank 0": [1] + [5] * (SIZE - 1) if SIZE > 1 else [3],
    "none on the last rank": [6] * (SIZE - 1) + [0] if SIZE > 1 else [6],
}
#: Allowed errors; the input gradients of float32 are differences of rounded terms.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}


def part_of(rows):
    """Return this rank's slice of the joined batch."""
    ends = list(itertools.accumulate(rows))
    return slice(ends[RANK] - rows[RANK], ends[RANK])


def draw(step, rows, inner, dtype=torch.float64):
    """Return a joined batch and its output's gradient, different in mean and spread by row."""
    generator = torch.Generator().manual_seed(step)
    shape = (sum(rows), CHANNELS, *inner)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    row = torch.arange(sum(rows)).reshape(-1, *[1] * (len(shape) - 1))
    x = x * (1 + row % 3) + row
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5 * x + 1
    return x.to(dtype), gradient.to(dtype)


def pair(kind="4d", dtype=torch.float64, **options):
    """Return a SyncBatchNorm and the BatchNorm that it must equal."""
    whole = BATCH_NORMS[kind](CHANNELS, **options).to(dtype)
    if whole.affine:
        torch.manual_seed(1)
        torch.nn.init.normal_(whole.weight)
        torch.nn.init.normal_(whole.bias)
    ours = SyncBatchNorm(CHANNELS, **options).to(dtype)
    ours.load_state_dict(whole.state_dict())
    return ours, whole


def assert_step_equals(ours, whole, x, gradient, rows):
    """Forward and backward, here on this rank's rows and there on all: compare everything."""
    tolerance = TOLERANCE[x.dtype]
    part = part_of(rows)
    mine, everything = x[part].clone().requires_grad_(), x.clone().requires_grad_()
    ours.zero_grad()
    whole.zero_grad()
    output, wanted = ours(mine), whole(everything)
    output.backward(gradient[part])
    wanted.backward(gradient)
    torch.testing.assert_close(output, wanted[part], **tolerance)
    torch.testing.assert_close(mine.grad, everything.grad[part], **tolerance)
    for local, total in zip(ours.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(hvd.allreduce(local.grad, op=hvd.Sum), total.grad, **tolerance)
    assert_buffers_equal(ours, whole, tolerance)


def assert_buffers_equal(ours, whole, tolerance):
    theirs = dict(whole.named_buffers())
    assert dict(ours.named_buffers()).keys() == theirs.keys()
    for name, mine in ours.named_buffers():
        torch.testing.assert_close(mine, theirs[name], **tolerance)
        everyone = hvd.allgather(mine[None])
        assert torch.equal(everyone, mine.expand(SIZE, *mine.shape)), name


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", INNER)
def test_steps_equal_batch_norm_on_the_joined_batch(kind, dtype, rows):
    ours, whole = pair(kind, dtype)
    for step in range(3):
        assert_step_equals(ours, whole, *draw(step, rows, INNER[kind], dtype), rows)
    x, _ = draw(9, rows, INNER[kind], dtype)
    ours.eval()
    whole.eval()
    torch.testing.assert_close(ours(x), whole(x), **TOLERANCE[dtype])


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"momentum": None},
        {"momentum": 1.0, "eps": 0.5},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_options(options):
    rows = ROWS["uneven"]
    ours, whole = pair(**options)
    for step in range(3):
        assert_step_equals(ours, whole, *draw(step, rows, INNER["4d"]), rows)


def test_no_running_statistics_means_evaluation_by_the_joined_batch():
    ours, whole = (module.eval() for module in pair(track_running_stats=False))
    assert_step_equals(ours, whole, *draw(0, ROWS["uneven"], INNER["4d"]), ROWS["uneven"])


def test_statistics_that_are_no_longer_tracked_stay_as_they_are():
    ours, whole = pair()
    ours.track_running_stats = whole.track_running_stats = False
    assert_step_equals(ours, whole, *draw(0, ROWS["even"], INNER["4d"]), ROWS["even"])
    assert int(ours.num_batches_tracked) == 0


def test_evaluation_is_local():
    ours, whole = (module.eval() for module in pair())
    if RANK == 0:  # would wait for the others, were it collective
        x, gradient = draw(0, [3], INNER["4d"])
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours(mine).backward(gradient)
        whole(theirs).backward(gradient)
        assert torch.equal(mine.grad, theirs.grad)
    hvd.barrier()


@pytest.mark.parametrize("trained", ["input", "weight", "bias"])
def test_gradients_only_where_they_are_wanted(trained):
    rows = ROWS["even"]
    ours, whole = pair()
    x, gradient = draw(0, rows, INNER["4d"])
    mine, theirs = x[part_of(rows)].clone(), x.clone()
    for module, batch in ((ours, mine), (whole, theirs)):
        batch.requires_grad_(trained == "input")
        module.weight.requires_grad_(trained == "weight")
        module.bias.requires_grad_(trained == "bias")
    ours(mine).backward(gradient[part_of(rows)])
    whole(theirs).backward(gradient)
    if trained == "input":
        torch.testing.assert_close(mine.grad, theirs.grad[part_of(rows)])
    else:
        local, total = getattr(ours, trained).grad, getattr(whole, trained).grad
        torch.testing.assert_close(hvd.allreduce(local, op=hvd.Sum), total)
    gradients = [mine.grad, ours.weight.grad, ours.bias.grad]
    assert sum(found is not None for found in gradients) == 1


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded gradient"])
def test_strides(layout):
    rows = [3] * SIZE
    x, gradient = draw(0, rows, (4, 4))
    ours, whole = pair()
    part = part_of(rows)
    mine = x[part].clone()
    if layout == "channels_last":
        mine = mine.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        mine = mine.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        gradient = torch.ones(()).double().expand_as(gradient)
    mine.requires_grad_()
    theirs = x.clone().requires_grad_()
    output, wanted = ours(mine), whole(theirs)
    if layout == "channels_last":
        assert output.is_contiguous(memory_format=torch.channels_last)
    output.backward(gradient[part])
    wanted.backward(gradient)
    torch.testing.assert_close(output, wanted[part])
    torch.testing.assert_close(mine.grad, theirs.grad[part])


@several  # torch's own, on one rank, keeps the statistics in the dtype of the parameters
@pytest.mark.parametrize("parameters", ["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype, parameters):
    """Against float64 on the same, rounded, inputs: off by no more than the results' rounding."""
    rows = ROWS["uneven"]
    ours, whole = pair()
    ours = ours.to(dtype if parameters == "same" else torch.float32)
    for name, mine in ours.state_dict().items():
        whole.state_dict()[name].copy_(mine)
    x, gradient = draw(0, rows, INNER["4d"], dtype)
    part = part_of(rows)
    mine, theirs = x[part].clone().requires_grad_(), x.double().requires_grad_()
    output, wanted = ours(mine), whole(theirs)
    output.backward(gradient[part])
    wanted.backward(gradient.double())
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5, "check_dtype": False}
    assert output.dtype == mine.grad.dtype == dtype
    torch.testing.assert_close(output, wanted[part], **close)
    torch.testing.assert_close(mine.grad, theirs.grad[part], **close)
    torch.testing.assert_close(ours.running_var, whole.running_var, **close)
    assert ours.weight.grad.dtype == ours.weight.dtype


@pytest.mark.parametrize("apart", [0.0, 3.0])
def test_a_large_mean_costs_no_more_than_in_batch_norm(apart):
    """With sums of squares in float32 nothing would be left of a variance of 1 beside 1e8.

    What is left is that a float32 mean near 1e4 is off by up to 5e-4, here as in BatchNorm.
    """
    rows = ROWS["uneven"]
    x, gradient = draw(0, rows, (6, 6), torch.float32)
    owner = torch.repeat_interleave(torch.arange(SIZE), torch.tensor(rows))
    x = x - x.mean((1, 2, 3), keepdim=True) + 1e4 + apart * owner.reshape(-1, 1, 1, 1)
    _, exact = pair()
    ours, single = pair(dtype=torch.float32)
    part = part_of(rows)
    results = {}
    for name, module, batch in (
        ("exact", exact, x.double()),
        ("single", single, x.clone()),
        ("ours", ours, x[part].clone()),
    ):
        batch.requires_grad_()
        output = module(batch)
        output.backward((gradient[part] if name == "ours" else gradient).to(batch.dtype))
        of = slice(None) if name == "ours" else part
        results[name] = (output.detach()[of].double(), batch.grad[of].double())
    for mine, theirs, wanted in zip(
        *(results[n] for n in ("ours", "single", "exact")), strict=True
    ):
        allowed = 2 * (theirs - wanted).abs().max() + 2e-3
        assert (mine - wanted).abs().max() <= allowed
    torch.testing.assert_close(ours.running_var.double(), exact.running_var, rtol=2e-4, atol=0.0)
    torch.testing.assert_close(ours.running_mean.double(), exact.running_mean, rtol=2e-7, atol=0.0)


@pytest.mark.parametrize("parts", [[4, 4], [1, 9], [0, 5, 0, 3], [2, 0], [0, 0]])
def test_combined_statistics(parts):
    x = torch.randn(sum(parts), 3, 2, dtype=torch.float64) + 1e6
    rows = [sync_batch_norm.local_statistics(part) for part in x.split(parts)]
    batch = sync_batch_norm.combine(torch.stack(rows))
    assert batch.count == 2 * sum(parts)
    if sum(parts):
        torch.testing.assert_close(batch.mean, x.mean((0, 2)), rtol=1e-14, atol=0.0)
        wanted = x.var((0, 2), correction=0)
        torch.testing.assert_close(batch.variance, wanted, rtol=1e-9, atol=0.0)
    else:
        assert not batch.mean.any()
        assert not batch.variance.any()


def test_a_batch_that_is_empty_everywhere():
    ours, whole = pair("2d")
    none = torch.empty(0, CHANNELS, dtype=torch.float64, requires_grad=True)
    output = ours(none)
    output.sum().backward()
    whole(none.detach())
    assert output.shape == none.grad.shape == none.shape
    assert not ours.weight.grad.any()
    assert_buffers_equal(ours, whole, TOLERANCE[torch.float64])


def network(norm):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 4, 3), norm(4), torch.nn.Tanh(), torch.nn.Conv2d(4, 3, 3)]
    head = [norm(3), torch.nn.Flatten(), torch.nn.Linear(12, 2)]
    return torch.nn.Sequential(*layers, *head).double()


@pytest.mark.parametrize("bucket_bytes", [1, None])
def test_training_with_distributed_optimizer_equals_one_process(bucket_bytes):
    """Buckets leave while backward still exchanges sums: all ranks must do so in one order."""
    model, reference = network(SyncBatchNorm), network(torch.nn.BatchNorm2d)
    ours = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), bucket_bytes=bucket_bytes
    )
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        x = torch.randn(3 * SIZE, 2, 6, 6, generator=generator, dtype=torch.float64)
        for net, optimizer, batch in ((model, ours, x[RANK::SIZE]), (reference, theirs, x)):
            optimizer.zero_grad()
            net(batch).sin().mean().backward()
            optimizer.step()
    for mine, wanted in zip(
        model.state_dict().values(), reference.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-11)


def test_convert():
    plain = torch.nn.ModuleDict(
        {
            "body": torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3, eps=0.1)),
            "bare": torch.nn.BatchNorm1d(4, affine=False, momentum=None),
            "forgetful": torch.nn.BatchNorm3d(2, track_running_stats=False).eval(),
            "other": torch.nn.InstanceNorm2d(3, affine=True),
        }
    ).double()
    plain["body"][1].bias = None
    before = copy.deepcopy(plain.state_dict())
    parameters = list(plain.parameters())
    model = SyncBatchNorm.convert_sync_batchnorm(plain)
    assert model is plain
    layers = [model["body"][1], model["bare"], model["forgetful"]]
    assert all(type(layer) is SyncBatchNorm for layer in layers)
    assert type(model["other"]) is torch.nn.InstanceNorm2d
    assert [layer.training for layer in layers] == [True, True, False]
    assert (layers[0].eps, layers[1].momentum) == (0.1, None)
    assert (layers[1].affine, layers[2].track_running_stats) == (False, False)
    assert layers[0].bias is None
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    x, _ = draw(0, ROWS["uneven"], (2, 2))
    whole = torch.nn.BatchNorm2d(3, eps=0.1).double()
    output = layers[0](x[part_of(ROWS["uneven"]), :3])
    torch.testing.assert_close(output, whole(x[:, :3])[part_of(ROWS["uneven"])])


def test_converted_batch_norm_itself():
    whole = torch.nn.BatchNorm1d(CHANNELS).double()
    converted = SyncBatchNorm.convert_sync_batchnorm(whole)
    assert type(converted) is SyncBatchNorm
    assert converted.running_mean is whole.running_mean
    x, _ = draw(0, ROWS["even"], ())
    again = copy.deepcopy(converted)
    output = again(x[part_of(ROWS["even"])])
    torch.testing.assert_close(output, whole(x)[part_of(ROWS["even"])])


@pytest.mark.parametrize("shape", [(5,), (2, 4), (2, 4, 5)])
def test_inputs_of_another_shape(shape):
    with pytest.raises(hvd.ArgumentError, match=r"takes inputs of shape \(N, 5, \.\.\.\), not"):
        SyncBatchNorm(CHANNELS)(torch.zeros(shape))


def test_inputs_that_are_not_floating_point():
    with pytest.raises(hvd.UnsupportedError, match="int64"):
        SyncBatchNorm(CHANNELS)(torch.zeros(2, CHANNELS, dtype=torch.int64))


def test_one_value_a_channel_on_all_ranks_together():
    layer = SyncBatchNorm(CHANNELS)
    with pytest.raises(ValueError, match="1 value per channel") as caught:
        layer(torch.zeros(int(RANK == 0), CHANNELS))
    if SIZE > 1:
        assert isinstance(caught.value, hvd.ArgumentError)
        assert "rank 0:" in str(caught.value)


@several
def test_ranks_that_differ_in_channels():
    channels = 3 + (RANK == SIZE - 1)
    with pytest.raises(hvd.MismatchError, match=r"sync_batch_norm\.forward"):
        SyncBatchNorm(channels)(torch.zeros(2, channels))
    assert SyncBatchNorm(3)(torch.ones(2, 3)).abs().max() == 0
