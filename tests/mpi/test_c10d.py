"""The torch.distributed backend: collectives against numpy, and DDP against one process."""

import copy
import threading
import time
from datetime import timedelta

import numpy as np
import pytest

import hvdkit as hvd

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import hvdkit.torch.c10d  # noqa: E402

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")
either_way = pytest.mark.parametrize("async_op", [False, True], ids=["sync", "async"])
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # names before torch 2.13

SUM, AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG
LENGTHS = sorted({0, 1, SIZE - 1, SIZE, SIZE + 1, 70_001})
RIGHT, LEFT = (RANK + 1) % SIZE, (RANK - 1) % SIZE


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("hvdkit")
    yield
    dist.destroy_process_group()


def values(rank, length, dtype=np.float32):
    """What a rank contributes: small integers, whose sums and products are exact."""
    return np.random.default_rng(rank).integers(1, 4, length).astype(dtype)


def tensor(rank, length, dtype=np.float32):
    return torch.from_numpy(values(rank, length, dtype))


def every(length, dtype=np.float32):
    return np.stack([values(rank, length, dtype) for rank in range(SIZE)])


def finish(work, async_op):
    """Wait for what an asynchronous call returned; a synchronous one returns None."""
    assert (work is not None) == async_op
    if async_op:
        assert work.wait()
        assert work.is_completed()
        assert work.is_success()


def assert_still_works(group=None):
    x = torch.ones(3)
    dist.all_reduce(x, group=group)
    assert x.tolist() == [dist.get_world_size(group)] * 3


def test_ranks_are_those_of_hvdkit():
    assert (dist.get_rank(), dist.get_world_size()) == (RANK, SIZE)
    assert dist.get_backend() == "hvdkit"
    assert dist.group.WORLD.name() == "hvdkit"


# Reductions


@either_way
@pytest.mark.parametrize("length", LENGTHS)
def test_all_reduce(length, async_op):
    x = tensor(RANK, length)
    place = x.data_ptr()
    finish(dist.all_reduce(x, async_op=async_op), async_op)
    np.testing.assert_array_equal(x, every(length).sum(0))
    assert x.data_ptr() == place


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("SUM", lambda all_of: all_of.sum(0)),
        ("PRODUCT", lambda all_of: all_of.prod(0)),
        ("MIN", lambda all_of: all_of.min(0)),
        ("MAX", lambda all_of: all_of.max(0)),
        ("AVG", lambda all_of: all_of.mean(0)),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "uint8"])
def test_reduce_ops(op, expected, dtype):
    if op == "AVG" and dtype in ("int32", "uint8"):
        pytest.skip("integer averages are truncated")
    x = tensor(RANK, 50, dtype)
    dist.all_reduce(x, getattr(dist.ReduceOp, op))
    assert str(x.dtype) == f"torch.{dtype}"
    np.testing.assert_allclose(x, expected(every(50, dtype)), rtol=1e-3)


def test_bool_bfloat16_and_complex():
    some = torch.tensor([RANK == 0, False])
    dist.all_reduce(some)
    assert some.tolist() == [True, False]
    half = tensor(RANK, 9).bfloat16()
    dist.all_reduce(half)
    np.testing.assert_array_equal(half.float(), every(9).sum(0))
    turned = torch.full((3,), RANK + 1j)
    dist.all_reduce(turned)
    assert turned.tolist() == [sum(range(SIZE)) + SIZE * 1j] * 3


def premul_sum(factor):
    from torch._C._distributed_c10d import _make_nccl_premul_sum

    return _make_nccl_premul_sum(factor)


def test_factor_of_each_contribution():
    x = tensor(RANK, 5)
    dist.all_reduce(x, premul_sum(0.25))
    np.testing.assert_array_equal(x, every(5).sum(0) / 4)


def test_what_is_not_contiguous():
    x = torch.zeros(4, 6)
    x[:, ::2] = 1 + RANK
    dist.all_reduce(x.t()[::2])
    assert x.sum() == 12 * sum(range(1, SIZE + 1))
    assert x[:, 1::2].abs().sum() == 0
    gathered = torch.zeros(3, 2 * SIZE).t()
    dist.all_gather_into_tensor(gathered, torch.arange(6.0).reshape(3, 2).t() + RANK)
    for rank in range(SIZE):
        assert torch.equal(
            gathered[2 * rank : 2 * rank + 2], torch.arange(6.0).reshape(3, 2).t() + rank
        )


def test_all_reduce_coalesced():
    several_of = [tensor(RANK, length) for length in (3, 0, 1000)]
    with dist.distributed_c10d._coalescing_manager():
        for x in several_of:
            dist.all_reduce(x)
    for x in several_of:
        np.testing.assert_array_equal(x, every(len(x)).sum(0))


@either_way
def test_reduce(async_op):
    for root in range(SIZE):
        x = tensor(RANK, 11)
        finish(dist.reduce(x, root, async_op=async_op), async_op)
        np.testing.assert_array_equal(x, every(11).sum(0) if root == RANK else values(RANK, 11))


@either_way
@pytest.mark.parametrize("length", LENGTHS)
def test_reduce_scatter(length, async_op):
    mine = every(length * SIZE, np.float64)[:, length * RANK : length * (RANK + 1)]
    given = tensor(RANK, length * SIZE, np.float64)
    out = torch.zeros(length, dtype=torch.float64)
    finish(dist.reduce_scatter_tensor(out, given, AVG, async_op=async_op), async_op)
    np.testing.assert_allclose(out, mine.mean(0), rtol=1e-14)
    out.zero_()
    finish(dist.reduce_scatter(out, list(given.chunk(SIZE)), async_op=async_op), async_op)
    np.testing.assert_array_equal(out, mine.sum(0))


def test_reduce_scatter_of_different_lengths():
    parts = [tensor(RANK, rank + 1) for rank in range(SIZE)]
    out = torch.zeros(RANK + 1)
    dist.reduce_scatter(out, parts)
    np.testing.assert_array_equal(out, every(RANK + 1).sum(0))


# Movements


@either_way
@pytest.mark.parametrize("dtype", ["float32", "bool", "int64", "complex64", "float8_e4m3fn"])
def test_broadcast(dtype, async_op):
    for root in range(SIZE):
        x = tensor(RANK, 13).to(getattr(torch, dtype))
        finish(dist.broadcast(x, root, async_op=async_op), async_op)
        expected = tensor(root, 13).to(getattr(torch, dtype))
        assert torch.equal(x.to(torch.complex64), expected.to(torch.complex64))


@either_way
@pytest.mark.parametrize("length", LENGTHS)
def test_all_gather(length, async_op):
    outs = [torch.zeros(length) for _ in range(SIZE)]
    finish(dist.all_gather(outs, tensor(RANK, length), async_op=async_op), async_op)
    np.testing.assert_array_equal(torch.stack(outs), every(length))
    out = torch.zeros(SIZE, length)
    finish(dist.all_gather_into_tensor(out, tensor(RANK, length), async_op=async_op), async_op)
    np.testing.assert_array_equal(out, every(length))


def test_all_gather_in_place():
    """FSDP's input is this rank's part of its output."""
    out = torch.zeros(SIZE, 50_000)
    out[RANK] = tensor(RANK, 50_000)
    dist.all_gather_into_tensor(out, out[RANK])
    np.testing.assert_array_equal(out, every(50_000))


def test_all_gather_of_different_lengths():
    outs = [torch.zeros(rank + 1, 2) for rank in range(SIZE)]
    dist.all_gather(outs, torch.full((RANK + 1, 2), float(RANK)))
    assert [out.unique().tolist() for out in outs] == [[float(rank)] for rank in range(SIZE)]


def test_all_gather_coalesced():
    outs = [torch.zeros(SIZE, 3), torch.zeros(SIZE, 5)]
    with dist.distributed_c10d._coalescing_manager():
        for out in outs:
            dist.all_gather_into_tensor(out, tensor(RANK, out.shape[1]))
    for out in outs:
        np.testing.assert_array_equal(out, every(out.shape[1]))


@either_way
def test_gather_and_scatter(async_op):
    for root in range(SIZE):
        here = root == RANK
        outs = [torch.zeros(7) for _ in range(SIZE)] if here else None
        finish(dist.gather(tensor(RANK, 7), outs, root, async_op=async_op), async_op)
        if here:
            np.testing.assert_array_equal(torch.stack(outs), every(7))
        out = torch.zeros(7)
        parts = [tensor(rank, 7) for rank in range(SIZE)] if here else None
        finish(dist.scatter(out, parts, root, async_op=async_op), async_op)
        np.testing.assert_array_equal(out, values(RANK, 7))


@either_way
def test_all_to_all(async_op):
    given = torch.arange(2.0 * SIZE).reshape(SIZE, 2) + 100 * RANK
    expected = torch.stack([torch.arange(2.0) + 2 * RANK + 100 * rank for rank in range(SIZE)])
    out = torch.zeros(SIZE, 2)
    finish(dist.all_to_all_single(out, given, async_op=async_op), async_op)
    assert torch.equal(out, expected)
    outs = list(torch.zeros(SIZE, 2))
    finish(dist.all_to_all(outs, list(given), async_op=async_op), async_op)
    assert torch.equal(torch.stack(outs), expected)


def test_all_to_all_with_splits():
    """Rank r sends r + s rows to rank s."""
    splits = [RANK + rank for rank in range(SIZE)]
    given = torch.full((sum(splits), 2), float(RANK))
    out = torch.zeros(sum(splits), 2)
    dist.all_to_all_single(out, given, splits, splits)
    assert out[:, 0].tolist() == [float(rank) for rank in range(SIZE) for _ in range(RANK + rank)]


def test_objects():
    everyone = [None] * SIZE
    dist.all_gather_object(everyone, {"rank": RANK, "more": "x" * RANK})
    assert [found["rank"] for found in everyone] == list(range(SIZE))
    told = ["hello", {1, 2}] if RANK == SIZE - 1 else [None, None]
    dist.broadcast_object_list(told, src=SIZE - 1)
    assert told == ["hello", {1, 2}]
    got = [None]
    dist.scatter_object_list(got, [f"for {rank}" for rank in range(SIZE)] if RANK == 0 else None)
    assert got == [f"for {RANK}"]


def test_barrier():
    came = time.monotonic()
    if RANK == SIZE - 1:
        time.sleep(0.2)
    dist.barrier()
    assert SIZE == 1 or time.monotonic() - came > 0.15


# Messages


@pytest.mark.parametrize("length", [0, 1, 300_000])
def test_messages_around_a_ring(length):
    out = torch.zeros(length)
    works = [dist.isend(tensor(RANK, length), RIGHT), dist.irecv(out, LEFT)]
    for work in works:
        assert work.wait()
    np.testing.assert_array_equal(out, values(LEFT, length))


@several
def test_messages_are_matched_by_tag():
    if RANK == 0:
        sent = [dist.isend(torch.full((50_000,), float(tag)), 1, tag=tag) for tag in range(4)]
        for work in sent:
            work.wait()
    if RANK == 1:
        for tag in (3, 1, 0, 2):
            x = torch.zeros(100_000)[::2]
            dist.recv(x, 0, tag=tag)
            assert x.unique().tolist() == [tag]


@several
def test_receive_from_any_rank():
    if RANK:
        dist.send(torch.tensor([RANK]), 0, tag=7)
        return
    x, senders = torch.zeros(1, dtype=torch.int64), set()
    for _ in range(SIZE - 1):
        sender = dist.recv(x, tag=7)
        assert x.item() == sender
        senders.add(sender)
    assert senders == set(range(1, SIZE))


@several
def test_a_batch_of_messages_and_their_futures():
    there = torch.zeros(2, dtype=torch.complex64)
    operations = [
        dist.P2POp(dist.irecv, there, LEFT),
        dist.P2POp(dist.isend, torch.full((2,), RANK + 1j), RIGHT),
    ]
    received, sent = dist.batch_isend_irecv(operations)
    assert torch.equal(received.get_future().wait()[0], torch.view_as_real(there))
    assert there.tolist() == [LEFT + 1j] * 2
    sent.wait()


@several
@pytest.mark.parametrize("sent", [3, 300_000])
def test_a_message_of_the_wrong_length(sent):
    if RANK == 0:
        work = dist.isend(torch.zeros(sent), 1)
        dist.send(torch.ones(4), 1)
        work.wait()
    if RANK == 1:
        x = torch.zeros(4)
        with pytest.raises(hvd.MismatchError, match=rf"rank 0 sent {4 * sent} bytes.* 16"):
            dist.recv(x, 0)
        dist.recv(x, 0)
        assert x.tolist() == [1] * 4


@several
def test_messages_move_while_their_receiver_waits_for_something_else():
    """The sender waits for the receiver, and the receiver, in a barrier, for the sender."""
    x = torch.zeros(300_000)
    if RANK == 0:
        work = dist.irecv(x, 1)
    if RANK == 1:
        dist.send(tensor(1, 300_000), 0)
    dist.barrier()
    if RANK == 0:
        work.wait()
        np.testing.assert_array_equal(x, values(1, 300_000))


def test_a_tag_that_there_is_not():
    with pytest.raises(hvd.ArgumentError, match="tags are 0 or more"):
        dist.isend(torch.zeros(1), RANK, tag=-1)


# Asynchronous calls


def test_future_and_its_callbacks():
    x = torch.ones(2)
    work = dist.all_reduce(x, async_op=True)
    future = work.get_future().then(lambda done: done.value()[0] * 10)
    assert future.wait().tolist() == [10 * SIZE] * 2
    assert work.result()[0] is x
    assert work.exception() is None
    assert work.get_future().value()[0] is x


def test_what_callbacks_start_comes_before_the_next_operation():
    """PowerSGD's hook all-reduces again, and waits, in a callback of an all-reduce.

    On the thread that has to do it, this must not wait for that thread; and on every rank the
    second all-reduce of the first chain must come before that of the second chain.
    """
    for _ in range(20):
        chains = []
        for length in (5, 6, 7):
            x = torch.ones(length)

            def again(done):
                return dist.all_reduce(done.value()[0], async_op=True).get_future().wait()[0]

            def twice(done):
                dist.all_reduce(done.value())
                return done.value()

            work = dist.all_reduce(x, async_op=True)
            chains.append(work.get_future().then(again).then(twice))
        for length, chain in zip((5, 6, 7), chains, strict=True):
            assert chain.wait().tolist() == [SIZE**3] * length


def test_threads_have_groups_of_their_own():
    groups = [dist.new_group() for _ in range(3)]
    results = [None] * 3

    def work(number):
        x = torch.full((1000,), float(number))
        for _ in range(10):
            dist.all_reduce(x, AVG, group=groups[number])
        results[number] = x

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [x.unique().tolist() for x in results] == [[0.0], [1.0], [2.0]]
    for group in groups:
        dist.destroy_process_group(group)


# Groups


@several
def test_subset():
    evens = list(range(0, SIZE, 2))
    group = dist.new_group(evens)
    if RANK in evens:
        assert dist.get_rank(group) == evens.index(RANK)
        x = tensor(RANK, 20)
        dist.all_reduce(x, group=group)
        np.testing.assert_array_equal(x, every(20)[evens].sum(0))
        root = evens[-1]
        dist.broadcast(x.fill_(RANK), root, group=group)
        assert x.unique().tolist() == [root]
        dist.destroy_process_group(group)
    assert_still_works()


@several
def test_each_pair():
    for other in range(1, SIZE):
        group = dist.new_group([0, other], use_local_synchronization=True)
        if RANK in (0, other):
            assert_still_works(group)
            dist.destroy_process_group(group)


@several
def test_another_backend_beside():
    """The store that hvdkit made will do for gloo."""
    group = dist.new_group(backend="gloo")
    assert_still_works(group)
    dist.destroy_process_group(group)


def test_initialised_a_second_time():
    dist.destroy_process_group()
    assert not dist.is_initialized()
    dist.init_process_group("hvdkit", init_method="hvdkit://", rank=RANK, world_size=SIZE)
    assert_still_works()


@pytest.mark.skipif(SIZE != 4, reason="a mesh of 2 x 2")
def test_mesh_and_sharded_model():
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    column = mesh.get_group("rows")
    assert functional.all_reduce(torch.ones(1) * RANK, "sum", column).item() == 2 * (RANK % 2) + 2
    gathered = functional.all_gather_tensor(torch.ones(1) * RANK, 0, column)
    assert gathered.tolist() == [RANK % 2, RANK % 2 + 2]
    alone, model = small_model(), small_model()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert_same(train(model, RANK, SIZE), train(alone, 0, 1), tolerance=1e-12)


# Errors


@several
@either_way
def test_ranks_that_disagree(async_op):
    def attempt(call, match):
        with pytest.raises(hvd.MismatchError, match=match):
            work = call()
            if async_op:
                work.wait()
        assert_still_works()

    options = {"async_op": True} if async_op else {}
    first = RANK == 0

    def all_reduce():
        return dist.all_reduce(torch.zeros(3 + first), **options)

    def types():
        out = torch.zeros(SIZE, dtype=torch.int32 if first else torch.float32)
        return dist.all_gather_into_tensor(out, out[:1].clone(), **options)

    def roots():
        return dist.broadcast(torch.zeros(3), int(first), **options)

    def calls():
        return dist.barrier(**options) if first else dist.all_reduce(torch.zeros(3), **options)

    for call, match in [
        (all_reduce, "disagree on the shape"),
        (types, "disagree on the dtype"),
        (roots, "disagree on the root_rank"),
        (calls, "called different collectives"),
    ]:
        attempt(call, match)


def test_what_is_not_supported():
    with pytest.raises(hvd.UnsupportedError, match=r"BXOR.*SUM, AVG"):
        dist.all_reduce(torch.zeros(2, dtype=torch.int32), dist.ReduceOp.BXOR)
    with pytest.raises(hvd.UnsupportedError, match="to_dense"):
        dist.all_reduce(torch.eye(2).to_sparse())
    with pytest.raises(hvd.UnsupportedError, match=r"on meta.*\.cpu\(\)"):
        dist.all_reduce(torch.zeros(2, device="meta"))
    with pytest.raises(hvd.UnsupportedError, match="factor"):
        dist.all_reduce(torch.zeros(2), premul_sum(torch.ones(1)))
    with pytest.raises(hvd.UnsupportedError, match="float8"):
        dist.all_reduce(torch.zeros(2).to(torch.float8_e4m3fn))
    with pytest.raises(hvd.ArgumentError, match="different dtypes: float32, float64"):
        dist.all_gather_into_tensor(torch.zeros(SIZE), torch.zeros(1).double())
    with pytest.raises(hvd.ArgumentError, match="do not fill the output"):
        dist.group.WORLD.all_gather_single(torch.zeros(SIZE + 1), torch.zeros(1)).wait()
    assert_still_works()


@several
def test_what_one_rank_cannot_do_is_an_error_on_all():
    x = torch.zeros(2)
    kind = hvd.UnsupportedError if RANK == 0 else hvd.MismatchError
    with pytest.raises(kind, match="to_dense"):
        dist.all_reduce(x.to_sparse() if RANK == 0 else x)
    assert_still_works()


@several
def test_outputs_that_do_not_fit():
    with pytest.raises(hvd.MismatchError, match="output_split_sizes"):
        dist.all_to_all_single(
            torch.zeros(SIZE), torch.zeros(SIZE), [SIZE] + [0] * (SIZE - 1), [1] * SIZE
        )
    assert_still_works()


@several
def test_error_in_a_future():
    work = dist.all_reduce(torch.zeros(2 + RANK), async_op=True)
    with pytest.raises(RuntimeError, match="MismatchError: allreduce: ranks disagree"):
        work.get_future().then(lambda done: done.value()).wait()
    assert isinstance(work.exception(), hvd.MismatchError)
    assert work.is_completed()
    assert not work.is_success()


@several
@either_way
def test_time_limit(async_op):
    """An operation that takes too long ends, and so does every later one of the group."""
    group = dist.new_group(timeout=timedelta(seconds=0.3))
    for _ in range(2):
        if RANK == 0:
            began = time.monotonic()
            with pytest.raises(hvd.HvdkitError, match="allreduce took longer than the timeout"):
                group.allreduce([torch.zeros(2)], options(async_op)).wait()
            assert time.monotonic() - began < 2
    assert_still_works()


def options(async_op):
    made = dist.AllreduceOptions()
    made.asyncOp = async_op
    return made


@several
def test_a_wait_that_is_given_up():
    x = torch.ones(2)
    if RANK == 0:
        work = dist.all_reduce(x, async_op=True)
        with pytest.raises(hvd.HvdkitError, match=r"allreduce did not complete within 0\.1 s"):
            work.wait(timedelta(seconds=0.1))
        assert not work.is_completed()
        dist.send(x, 1)
        for rank in range(2, SIZE):
            dist.send(x, rank)
        work.wait()
    else:
        dist.recv(torch.zeros(2), 0)
        dist.all_reduce(x)
    assert x.tolist() == [SIZE] * 2


def test_storage_can_be_resized_afterwards():
    """FSDP frees what it has gathered so, which a tensor that numpy has seen does not allow."""
    x = torch.ones(4)
    dist.all_reduce(x)
    dist.broadcast(x, 0)
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().size() == 0


# Training

BATCH, STEPS = 12, 4


def small_model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(40, 2)).double()


def train(model, rank, size):
    """Train on this rank's part of the batch; return the parameters."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH * SIZE, 6, generator=generator).double()[rank::size]
    y = torch.randn(BATCH * SIZE, 2, generator=generator).double()[rank::size]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return [
        parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
        for parameter in model.parameters()
    ]


def distributed(hook=None, state=None, **how):
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005, **how)
    if hook is not None:
        model.register_comm_hook(state, hook)
    return train(model, RANK, SIZE)


def assert_same(some, others, tolerance):
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "option", ["", "gradient_as_bucket_view", "static_graph", "find_unused_parameters"]
)
def test_ddp_equals_one_process_with_the_whole_batch(option):
    how = {option: True} if option else {}
    assert_same(distributed(**how), train(small_model(), 0, 1), tolerance=1e-14)


@several
def test_ddp_equals_gloo():
    group = dist.new_group(backend="gloo")
    assert_same(distributed(), distributed(process_group=group), tolerance=1e-15)
    dist.destroy_process_group(group)


def test_ddp_on_a_subset_of_the_ranks():
    group = dist.new_group([SIZE - 1])
    if RANK == SIZE - 1:
        model = DistributedDataParallel(small_model(), process_group=group)
        assert_same(train(model, 0, 1), train(small_model(), 0, 1), tolerance=0)
        dist.destroy_process_group(group)


def test_comm_hooks():
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    def hook(state, bucket):
        work = dist.all_reduce(bucket.buffer(), AVG, async_op=True)
        state.append(bucket.index())
        return work.get_future().then(lambda done: done.value()[0])

    whole, seen = train(small_model(), 0, 1), []
    assert_same(distributed(hook, seen), whole, tolerance=1e-14)
    assert len(set(seen)) > 1
    assert_same(distributed(default_hooks.allreduce_hook), whole, tolerance=1e-14)
    assert_same(distributed(default_hooks.fp16_compress_hook), whole, tolerance=1e-3)


def test_powersgd_hook():
    """Its approximations of a full rank are exact, so that it equals plain training."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    state = powerSGD_hook.PowerSGDState(
        None,
        matrix_approximation_rank=40,
        start_powerSGD_iter=2,
        min_compression_rate=0,
        orthogonalization_epsilon=1e-12,
    )
    weights = distributed(powerSGD_hook.powerSGD_hook, state)
    assert_same(weights, train(small_model(), 0, 1), tolerance=1e-6)
    assert state.iter > 2


@several
def test_a_hook_whose_ranks_disagree_is_an_error_of_backward():
    def hook(_, bucket):
        work = dist.all_reduce(torch.zeros(2 + RANK), async_op=True)
        return work.get_future().then(lambda done: done.value() and bucket.buffer())

    with pytest.raises(RuntimeError, match="ranks disagree on the shape"):
        distributed(hook)


def test_copies_of_a_model_start_as_rank_0_has_it():
    model = small_model()
    if RANK:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    same = DistributedDataParallel(copy.deepcopy(model))
    assert_same(
        [p.detach() for p in same.parameters()],
        [p.detach() for p in small_model().parameters()],
        tolerance=0,
    )
