"""Collectives on CUDA tensors: the values, and that nobody has to wait to use them."""

import time
from functools import partial

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs torch with CUDA, and a GPU", allow_module_level=True)

from gpu.slow import (  # noqa: E402
    delay_copies,
    device,
    late,
    on,
    sleep,
    spoil_free_memory,
    without_synchronisation,
)

import hvdkit.torch as hvd  # noqa: E402  (torch may be missing)
from hvdkit.torch import direct  # noqa: E402
from hvdkit.transport.opening import load_mpi  # noqa: E402

RANK, SIZE = hvd.rank(), hvd.size()
MEAN = (SIZE - 1) / 2
streams = pytest.mark.parametrize("stream", ["default", "another"])

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
OTHERS = [torch.bool, torch.complex64, torch.complex128]


def mine(*shape, dtype=torch.float32):
    """Return a tensor of this rank's number, computed late."""
    return late(torch.full(shape, RANK, dtype=dtype))


def check(tensor, value):
    """Check every element, as the current stream sees it."""
    assert tensor.device == device()
    assert tensor.detach().float().sub(value).abs().max().item() < 1e-6 * (1 + abs(value))


# Values


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS + OTHERS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (1 << 20,)], ids=str)
def test_sum_as_on_the_cpu(dtype, shape):
    given = (torch.arange(RANK, RANK + torch.Size(shape).numel()) % 5).reshape(shape).to(dtype)
    wanted = hvd.allreduce(given, op=hvd.Sum)
    tensor = given.to(device())
    assert torch.equal(hvd.allreduce(tensor, op=hvd.Sum).cpu(), wanted)
    assert torch.equal(hvd.synchronize(hvd.allreduce_async(tensor, op=hvd.Sum)).cpu(), wanted)
    assert torch.equal(tensor.cpu(), given)
    hvd.allreduce_(tensor, op=hvd.Sum)
    assert torch.equal(tensor.cpu(), wanted)


@pytest.mark.parametrize("op", [hvd.Average, hvd.Min, hvd.Max, hvd.Product, hvd.Adasum], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_operations_as_on_the_cpu(op, dtype):
    given = torch.linspace(1, 2 + RANK, 1000).to(dtype)
    how = {"op": op, "prescale_factor": 0.5, "postscale_factor": 3.0}
    found = hvd.allreduce(given.to(device()), **how).cpu()
    torch.testing.assert_close(found, hvd.allreduce(given, **how))


def test_other_collectives_as_on_the_cpu():
    given = torch.arange(SIZE * 6.0).reshape(SIZE * 2, 3) + 100 * RANK
    splits = [2] * SIZE
    for call in (
        partial(hvd.broadcast, root_rank=SIZE - 1),
        hvd.allgather,
        hvd.alltoall,
        partial(hvd.reducescatter, op=hvd.Sum),
        partial(hvd.allreduce, compression=hvd.Compression.fp16),
        lambda t: hvd.alltoall(t, splits=splits)[0],
        lambda t: hvd.allgather(t[:RANK]),
        lambda t: hvd.grouped_allreduce([t, t + 1])[1],
        lambda t: hvd.grouped_allgather([t, t + 1])[1],
        lambda t: hvd.grouped_reducescatter([t, t + 1])[1],
        lambda t: hvd.synchronize(hvd.broadcast_async(t, SIZE - 1)),
        lambda t: hvd.synchronize(hvd.allgather_async(t)),
        lambda t: hvd.synchronize(hvd.alltoall_async(t))[0],
        lambda t: hvd.synchronize(hvd.reducescatter_async(t)),
        lambda t: hvd.synchronize(hvd.grouped_allreduce_async([t, t + 1]))[1],
        lambda t: hvd.synchronize(hvd.grouped_allgather_async([t, t + 1]))[1],
    ):
        found = call(given.to(device()))
        assert found.device == device()
        torch.testing.assert_close(found.cpu(), call(given))


def test_tensors_of_any_strides():
    whole = torch.full((4, 6), float(RANK), device=device())
    part = whole[:, ::2]
    check(hvd.allreduce(part.t()), MEAN)
    assert hvd.allreduce_(part) is part
    check(part, MEAN)
    check(whole[:, 1::2], RANK)
    column = whole.t()[1]
    assert hvd.synchronize(hvd.broadcast_async_(column, SIZE - 1, name="column")) is column
    check(whole[:, 1], SIZE - 1)
    check(whole[:, 3::2], RANK)


def test_lazy_conjugates_and_negations():
    given = torch.full((100_000,), 1 + 2j, device=device())
    assert torch.all(hvd.allreduce(given.conj()) == 1 - 2j).item()
    assert torch.all(hvd.allreduce(given.conj().imag) == -2).item()
    with pytest.raises(hvd.UnsupportedError, match="lazy conjugate"):
        hvd.allreduce_(given.conj())


@pytest.mark.skipif(SIZE == 1, reason="needs several ranks")
def test_what_ranks_ask_for_differently_is_an_error_and_nothing_more():
    tensor = torch.ones(RANK + 1, device=device())
    with pytest.raises(hvd.MismatchError):
        hvd.allreduce(tensor, name="x")
    with pytest.raises(hvd.MismatchError):
        hvd.synchronize(hvd.allreduce_async(tensor, name="x"))
    check(hvd.allreduce(torch.ones(3, device=device())), 1)


def test_ranks_on_gpus_and_ranks_on_cpus():
    tensor = torch.full((1000,), float(RANK), device=device() if RANK == 0 else "cpu")
    found = hvd.allreduce(tensor)
    assert found.device == tensor.device
    assert found.mean().item() == MEAN


# Going on at once


@streams
def test_synchronous_results_are_used_at_once(stream):
    with on(stream):
        for shape in ((10,), (300, 1000)):
            tensor = mine(*shape)
            delay_copies()
            check(hvd.allreduce(tensor) + 1, MEAN + 1)
            delay_copies()
            check(hvd.allgather(tensor)[: shape[0]] + 1, 1)
            delay_copies()
            hvd.broadcast_(tensor, SIZE - 1)
            tensor.add_(1)
            check(tensor, SIZE)


@streams
@pytest.mark.parametrize("in_place", [False, True])
def test_asynchronous_results_are_used_at_once(stream, in_place):
    start = hvd.allreduce_async_ if in_place else hvd.allreduce_async
    with on(stream):
        tensors = [mine(300, 1000) + i for i in range(3)]
        delay_copies()
        handles = [start(tensor, name=f"t{i}") for i, tensor in enumerate(tensors)]
        sleep()  # which the copies do not wait for
        for i, handle in enumerate(handles):
            check(hvd.synchronize(handle) * 2, 2 * (MEAN + i))


@streams
def test_a_source_that_nobody_keeps(stream):
    with on(stream):
        like = torch.empty(300, 1000, device=device())
        delay_copies()
        handle = hvd.allreduce_async(mine(300, 1000))
        spoil_free_memory(like)
        check(hvd.synchronize(handle), MEAN)


@streams
def test_a_result_that_nobody_keeps(stream):
    with on(stream):
        tensor = mine(300, 1000)
        result = hvd.allreduce(tensor)
        sleep()  # so that the result is read late
        copy = result + 1
        del result
        others = [hvd.allreduce(tensor * 0 - 5) for _ in range(4)]
        check(copy, MEAN + 1)
        for other in others:
            check(other, -5)


def test_a_handle_that_nobody_waits_for():
    target = mine(300, 1000)
    kept = target.clone()
    hvd.allreduce_async_(target, name="dropped")
    del target
    spoil_free_memory(kept)
    for _ in range(3):
        check(hvd.allreduce(kept), MEAN)


def test_another_stream_may_ask_for_the_result():
    tensor = mine(300, 1000)
    handle = hvd.allreduce_async(tensor)
    stream = torch.cuda.Stream()
    delay_copies()
    with torch.cuda.stream(stream):
        check(hvd.synchronize(handle) + 1, MEAN + 1)


def test_the_caller_of_an_asynchronous_operation_does_not_wait():
    tensor = torch.full((1 << 20,), float(RANK), device=device())
    hvd.synchronize(hvd.allreduce_async(tensor, name="warm"))
    torch.cuda.current_stream().synchronize()
    sleep(1.0)
    busy = torch.cuda.current_stream().record_event()
    tensor.add_(0)
    began = time.perf_counter()
    handle = hvd.allreduce_async(tensor, name="cold")
    assert time.perf_counter() - began < 0.5
    assert not busy.query()
    check(hvd.synchronize(handle), MEAN)


def test_nothing_synchronises_behind_the_scenes():
    tensor = torch.full((1 << 20,), float(RANK), device=device())
    hvd.allreduce(tensor)
    with without_synchronisation():
        results = [
            hvd.allreduce(tensor),
            hvd.synchronize(hvd.allreduce_async(tensor)),
            hvd.broadcast(tensor, 0),
            hvd.allgather(tensor),
            hvd.allreduce_(tensor.clone()),
            hvd.synchronize(hvd.allreduce_async_(tensor.view(1024, 1024).t().clone().t())),
        ]
    for result, value in zip(results, [MEAN, MEAN, 0, None, MEAN, MEAN], strict=True):
        if value is not None:
            check(result, value)


# Autograd


@pytest.mark.parametrize(
    "call",
    [
        partial(hvd.allreduce, op=hvd.Sum),
        partial(hvd.broadcast, root_rank=0),
        hvd.allgather,
        hvd.alltoall,
        hvd.reducescatter,
    ],
    ids=["allreduce", "broadcast", "allgather", "alltoall", "reducescatter"],
)
def test_gradients_as_on_the_cpu(call):
    given = torch.arange(SIZE * 4.0).reshape(SIZE, 4) + RANK
    gradients = []
    for place in ("cpu", device()):
        leaf = given.to(place).requires_grad_()
        result = call(leaf * 2)
        result = result[0] if isinstance(result, tuple) else result
        if place != "cpu":
            sleep()
        (result * (RANK + 1)).sum().backward()
        gradients.append(leaf.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0])


# The MPI library's own


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
def test_the_librarys_own_collectives(dtype):
    """Direct where the library can do that, else staged."""
    how = {"algorithm": "mpi"}
    total = SIZE * (SIZE - 1) / 2
    for _ in range(2):
        tensor = mine(300, 100, dtype=dtype)
        check(hvd.allreduce(tensor, op=hvd.Sum, **how) + 1, total + 1)
        check(hvd.allgather(tensor, **how)[-300:] + 1, SIZE)
        check(hvd.broadcast(tensor, SIZE - 1, **how) + 1, SIZE)
        check(tensor, RANK)
        hvd.allreduce_(tensor, op=hvd.Sum, **how)
        check(tensor + 1, total + 1)
        hvd.broadcast_(tensor.t()[:1], SIZE - 1, **how)
        check(tensor, total)


@pytest.mark.skipif(not load_mpi().cuda_aware(), reason="this MPI library is not CUDA-aware")
def test_a_cuda_aware_library_is_given_the_tensors_memory(monkeypatch):
    calls = []
    moves = direct.moves
    monkeypatch.setattr(direct, "moves", lambda *a: calls.append(moves(*a)) or calls[-1])
    check(hvd.allreduce(mine(1000), algorithm="mpi"), MEAN)
    assert calls == [True]


# Devices


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs several GPUs")
def test_tensors_on_several_devices():
    for index in range(torch.cuda.device_count()):
        tensor = torch.full((1000,), float(RANK), device=f"cuda:{index}")
        found = hvd.synchronize(hvd.allreduce_async(tensor, name=f"on {index}"))
        assert found.device == tensor.device
        assert (found + 1).mean().item() == MEAN + 1
        assert hvd.allreduce(tensor).mean().item() == MEAN


def test_ranks_have_a_context_on_their_own_device_alone():
    if torch.cuda.device_count() < 2 or device().index == 0:
        pytest.skip("this rank's device is the first")
    hvd.synchronize(hvd.allreduce_async(mine(1000), name="alone"))
    others = [i for i in range(torch.cuda.device_count()) if i != device().index]
    assert not any(torch._C._cuda_hasPrimaryContext(index) for index in others)
