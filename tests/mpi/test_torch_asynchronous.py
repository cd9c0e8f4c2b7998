"""hvdkit.torch by name: handles, dtypes, layouts, orders, process sets; errors on every rank."""

import random

import pytest
from adasum_oracle import adasum

import hvdkit.torch as hvd

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
DTYPES = [torch.bool, *INTEGERS, *FLOATS, *COMPLEX]


def of(rank, *shape, dtype=torch.float32):
    """Return the tensor of a rank: small whole numbers, which every dtype holds."""
    values = (torch.arange(torch.Size(shape).numel()) + rank) % 3 + 1
    return (
        values.reshape(shape).to(dtype) > 1
        if dtype == torch.bool
        else values.reshape(shape).to(dtype)
    )


def everyone(*shape, dtype=torch.float32, ranks=range(SIZE)):
    return [of(rank, *shape, dtype=dtype) for rank in ranks]


def combined(op, tensors):
    """Return what an all-reduce makes of all ranks' tensors, computed in the widest numbers."""
    dtype = tensors[0].dtype
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    stack = torch.stack(tensors).to(torch.complex128 if dtype.is_complex else wide)
    if op == hvd.Average:
        mean = stack.sum(0) / len(tensors)
        return (mean if wide == torch.float64 or dtype.is_complex else mean.trunc()).to(dtype)
    if op == hvd.Sum:
        return stack.sum(0).to(dtype)
    if op == hvd.Product:
        return stack.prod(0).to(dtype)
    return (stack.amin(0) if op == hvd.Min else stack.amax(0)).to(dtype)


def rows_of(rank):
    """Return which of `SIZE + 1` rows a reduce-scatter leaves a rank with."""
    return slice(0, 2) if rank == 0 else slice(rank + 1, rank + 2)


def assert_equal(found, wanted):
    """Equal in dtype, shape and value, but for the last bit of an average."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted)


def assert_still_works():
    found = hvd.synchronize(hvd.allreduce_async(of(RANK, 5), name="still works", op=hvd.Sum))
    assert_equal(found, combined(hvd.Sum, everyone(5)))


def ops_of(dtype):
    ops = [hvd.Sum, hvd.Product]
    if dtype != torch.bool:
        ops.append(hvd.Average)
    if not dtype.is_complex:
        ops += [hvd.Min, hvd.Max]
    return ops


# Each function on each dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allreduce(dtype):
    handles = [
        (op, hvd.allreduce_async(of(RANK, 2, 3, dtype=dtype), name=f"{op}", op=op))
        for op in ops_of(dtype)
    ]
    mine = {op: of(RANK, 2, 3, dtype=dtype) for op in ops_of(dtype)}
    in_place = [(op, hvd.allreduce_async_(mine[op], name=f"{op}_", op=op)) for op in mine]
    for op, handle in handles:
        assert_equal(hvd.synchronize(handle), combined(op, everyone(2, 3, dtype=dtype)))
    for op, handle in in_place:
        assert hvd.synchronize(handle) is mine[op]
        assert_equal(mine[op], combined(op, everyone(2, 3, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_only_moves_data(dtype):
    mine = of(RANK, RANK + 1, 2, dtype=dtype)
    gathered = hvd.allgather_async(mine, name="gather")
    root = SIZE - 1
    received = hvd.broadcast_async(of(RANK, 4, dtype=dtype), root, name="broadcast")
    target = of(RANK, 4, dtype=dtype)
    in_place = hvd.broadcast_async_(target, root, name="broadcast_")
    exchanged = hvd.alltoall_async(of(RANK, SIZE, 2, dtype=dtype), name="alltoall")
    scattered = hvd.reducescatter_async(of(RANK, SIZE + 1, dtype=dtype), "rs", op=hvd.Sum)

    wanted = torch.cat([of(rank, rank + 1, 2, dtype=dtype) for rank in range(SIZE)])
    assert_equal(hvd.synchronize(gathered), wanted)
    assert_equal(hvd.synchronize(received), of(root, 4, dtype=dtype))
    assert hvd.synchronize(in_place) is target
    assert_equal(target, of(root, 4, dtype=dtype))
    rows, splits = hvd.synchronize(exchanged)
    assert_equal(rows, torch.stack([t[RANK] for t in everyone(SIZE, 2, dtype=dtype)]))
    assert_equal(splits, torch.ones(SIZE, dtype=torch.int32))
    total = combined(hvd.Sum, everyone(SIZE + 1, dtype=dtype))
    assert_equal(hvd.synchronize(scattered), total[rows_of(RANK)])


def test_alltoall_with_splits():
    """Rank r sends i + r rows to rank i; the splits come back in the dtype in which they came."""
    counts = [i + RANK for i in range(SIZE)]
    x = of(RANK, sum(counts), 2)
    for splits in (counts, torch.tensor(counts), torch.tensor(counts, dtype=torch.int32)):
        rows, received = hvd.synchronize(hvd.alltoall_async(x, splits, name="splits"))
        wanted = []
        for rank in range(SIZE):
            begin = sum(i + rank for i in range(RANK))
            theirs = of(rank, sum(i + rank for i in range(SIZE)), 2)
            wanted.append(theirs[begin : begin + RANK + rank])
        assert_equal(rows, torch.cat(wanted))
        assert received.tolist() == [RANK + rank for rank in range(SIZE)]
        assert received.dtype == getattr(splits, "dtype", torch.int32)


def test_reducescatter_ops_and_factors():
    x = of(RANK, SIZE + 1, 2)
    for op in (hvd.Average, hvd.Sum, hvd.Min, hvd.Max, hvd.Product):
        handle = hvd.reducescatter_async(
            x, f"{op}", op=op, prescale_factor=2.0, postscale_factor=0.25
        )
        wanted = combined(op, [2 * t for t in everyone(SIZE + 1, 2)]) / 4
        assert_equal(hvd.synchronize(handle), wanted[rows_of(RANK)])


def test_grouped():
    shapes = [(3,), (2, 2), (), (0,), (40_000,)]
    tensors = [of(RANK, *shape) for shape in shapes]
    new = hvd.grouped_allreduce_async(tensors, name="new", op=hvd.Sum)
    mine = [tensor.clone() for tensor in tensors]
    in_place = hvd.grouped_allreduce_async_(mine, name="in place")
    gathered = hvd.grouped_allgather_async(tensors[:2], name="gathered")
    scattered = hvd.grouped_reducescatter_async(
        [of(RANK, SIZE + 1), of(RANK, SIZE + 1, 2)], name="scattered", op=hvd.Max
    )
    mixed = hvd.grouped_allreduce_async([of(RANK, 2), of(RANK, 2, dtype=torch.int64)], op=hvd.Sum)

    for found, shape in zip(hvd.synchronize(new), shapes, strict=True):
        assert_equal(found, combined(hvd.Sum, everyone(*shape)))
    assert all(a is b for a, b in zip(hvd.synchronize(in_place), mine, strict=True))
    for found, shape in zip(mine, shapes, strict=True):
        assert_equal(found, combined(hvd.Average, everyone(*shape)))
    for found, shape in zip(hvd.synchronize(gathered), shapes, strict=False):
        assert_equal(found, torch.cat(everyone(*shape)))
    for found, shape in zip(hvd.synchronize(scattered), [(), (2,)], strict=True):
        assert_equal(found, combined(hvd.Max, everyone(SIZE + 1, *shape))[rows_of(RANK)])
    for found, dtype in zip(hvd.synchronize(mixed), (torch.float32, torch.int64), strict=True):
        assert_equal(found, combined(hvd.Sum, everyone(2, dtype=dtype)))
    assert hvd.synchronize(hvd.grouped_allreduce_async([], name="nothing")) == []


def test_the_synchronous_forms_of_the_same():
    assert_equal(hvd.allreduce(of(RANK, 3), op=hvd.Max), combined(hvd.Max, everyone(3)))
    pair = [of(RANK, 3), of(RANK, 2)]
    for found, count in zip(hvd.grouped_allreduce(pair, op=hvd.Sum), (3, 2), strict=True):
        assert_equal(found, combined(hvd.Sum, everyone(count)))
    for found, count in zip(hvd.grouped_allgather(pair, name="g"), (3, 2), strict=True):
        assert_equal(found, torch.cat(everyone(count)))
    scattered = hvd.grouped_reducescatter([of(RANK, SIZE + 1)], op=hvd.Sum)
    assert_equal(scattered[0], combined(hvd.Sum, everyone(SIZE + 1))[rows_of(RANK)])
    for found, mine, count in zip(hvd.grouped_allreduce_(pair), pair, (3, 2), strict=True):
        assert found is mine
        assert_equal(mine, combined(hvd.Average, everyone(count)))
    hvd.barrier()


# Arguments


def test_factors():
    x = of(RANK, 4)
    for op in (hvd.Sum, hvd.Average, hvd.Max):
        handle = hvd.allreduce_async(x, name="f", op=op, prescale_factor=0.5, postscale_factor=3.0)
        assert_equal(hvd.synchronize(handle), 3 * combined(op, [t / 2 for t in everyone(4)]))
    assert_equal(x, of(RANK, 4))


def test_the_older_way_to_say_op():
    with pytest.warns(DeprecationWarning, match="average="):
        total = hvd.synchronize(hvd.allreduce_async(of(RANK, 2), False, "older"))
    assert_equal(total, combined(hvd.Sum, everyone(2)))
    with pytest.warns(DeprecationWarning, match="average="):
        mean = hvd.allreduce(of(RANK, 2), average=True)
    assert_equal(mean, combined(hvd.Average, everyone(2)))
    with pytest.raises(hvd.ArgumentError, match="one of them"):
        hvd.allreduce_async(of(RANK, 2), average=True, op=hvd.Sum)
    with pytest.raises(hvd.ArgumentError, match="one of them"):
        hvd.allreduce(of(RANK, 2), average=True, op=hvd.Sum)


def test_without_names_calls_are_matched_by_order():
    handles = [hvd.allreduce_async(of(RANK, 2) + i, op=hvd.Sum) for i in range(5)]
    handles += [hvd.allgather_async(of(RANK, 2)), hvd.broadcast_async(of(RANK, 2), 0)]
    for i, handle in enumerate(handles[:5]):
        assert_equal(hvd.synchronize(handle), combined(hvd.Sum, [t + i for t in everyone(2)]))
    assert_equal(hvd.synchronize(handles[5]), torch.cat(everyone(2)))
    assert_equal(hvd.synchronize(handles[6]), of(0, 2))


def test_compression_of_a_single_call():
    x = of(RANK, 5) / 4
    for kind in (hvd.Compression.fp16, hvd.Compression.bf16):
        found = hvd.allreduce(x, op=hvd.Sum, compression=kind)
        assert_equal(found, combined(hvd.Sum, [t / 4 for t in everyone(5)]))
        numbers = of(RANK, 3, dtype=torch.int32)
        found = hvd.allreduce(numbers, op=hvd.Sum, compression=kind)
        assert_equal(found, combined(hvd.Sum, everyone(3, dtype=torch.int32)))
    with pytest.raises(hvd.ArgumentError, match="DistributedOptimizer"):
        hvd.allreduce(x, compression=hvd.Compression.int8)


# Layouts


LAYOUTS = {
    "transposed": lambda x: x.t(),
    "every other": lambda x: x[::2, 1:],
    "channels last": lambda x: x.reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "of a larger one": lambda x: x[1],
    "scalar": lambda x: x[0, 0],
    "empty": lambda x: x[:0],
    "requires grad": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Every layout is read as what it is, and in place nothing else is written."""
    view = LAYOUTS[layout]
    wanted = combined(hvd.Sum, [view(t).detach() for t in everyone(4, 6)])
    found = hvd.synchronize(hvd.allreduce_async(view(of(RANK, 4, 6)), name="new", op=hvd.Sum))
    assert_equal(found, wanted)
    assert not found.requires_grad
    for function, result in (
        (lambda x: hvd.allreduce_async_(x, name="in place", op=hvd.Sum), wanted),
        (lambda x: hvd.broadcast_async_(x, 0, name="root's"), view(of(0, 4, 6)).detach()),
    ):
        whole = of(RANK, 4, 6)
        mine, untouched = view(whole), whole.clone()
        assert hvd.synchronize(function(mine)) is mine
        assert_equal(mine.detach(), result)
        if mine.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
            view(untouched).copy_(mine.detach())
            assert_equal(whole, untouched)


def test_scalars_and_nothing_are_gathered():
    assert_equal(hvd.synchronize(hvd.allgather_async(torch.tensor(RANK))), torch.arange(SIZE))
    mine = of(RANK, 2, 3) if RANK == SIZE - 1 else torch.empty(0, 3)
    assert_equal(hvd.synchronize(hvd.allgather_async(mine, name="some")), of(SIZE - 1, 2, 3))
    nothing = hvd.synchronize(hvd.allgather_async(torch.empty(0, 3, dtype=torch.bfloat16)))
    assert_equal(nothing, torch.empty(0, 3, dtype=torch.bfloat16))


def test_a_conjugate_that_torch_has_put_off():
    x = torch.tensor([1 + 2j, 3 - 1j])
    found = hvd.synchronize(hvd.allreduce_async(x.conj(), name="conj", op=hvd.Sum))
    assert_equal(found, torch.conj_physical(x) * SIZE)
    with pytest.raises(hvd.UnsupportedError, match="resolve_conj"):
        hvd.allreduce_async_(x.conj())
    with pytest.raises(hvd.UnsupportedError, match="resolve_conj"):
        hvd.broadcast_async_(x.conj(), 0)


def test_what_is_no_dense_tensor():
    for call in (
        hvd.allreduce_async,
        hvd.allgather_async,
        lambda x: hvd.broadcast_async(x, 0),
        hvd.alltoall_async,
        hvd.reducescatter_async,
    ):
        with pytest.raises(hvd.UnsupportedError, match=r"torch\.Tensor"):
            call([1.0])
        with pytest.raises(hvd.UnsupportedError, match="to_dense"):
            call(torch.eye(3).to_sparse())
        with pytest.raises(hvd.UnsupportedError, match="float8"):
            call(torch.zeros(SIZE, dtype=torch.float8_e4m3fn))
    assert_still_works()


# Handles


def test_names_in_another_order_on_every_rank():
    calls = [(f"x{i}", i) for i in range(20)]
    random.Random(RANK).shuffle(calls)
    handles = {i: hvd.allreduce_async(of(RANK, i + 1), name=name, op=hvd.Sum) for name, i in calls}
    random.Random(RANK + 100).shuffle(calls)
    for _, i in calls:
        assert_equal(hvd.synchronize(handles[i]), combined(hvd.Sum, everyone(i + 1)))


@several
def test_poll_and_timeouts():
    """The last rank comes only when the others have seen that it has not."""
    last = RANK == SIZE - 1
    if last:
        hvd.barrier()
    handle = hvd.allreduce_async(of(RANK, 3), name="late", op=hvd.Sum)
    if not last:
        assert not hvd.poll(handle)
        with pytest.raises(TimeoutError, match="'late'"):
            hvd.synchronize(handle, timeout=0.01)
        hvd.barrier()
    for _ in range(2):  # a second time it returns the same
        assert_equal(hvd.synchronize(handle), combined(hvd.Sum, everyone(3)))
    assert hvd.poll(handle)


def test_synchronous_calls_overtake_asynchronous_ones():
    handle = None
    if RANK:
        handle = hvd.allreduce_async(of(RANK, 3), name="overtaken")
    assert_equal(hvd.allreduce(of(RANK, 2), op=hvd.Sum), combined(hvd.Sum, everyone(2)))
    handle = handle or hvd.allreduce_async(of(RANK, 3), name="overtaken")
    assert_equal(hvd.synchronize(handle), combined(hvd.Average, everyone(3)))


def test_join():
    """Each rank has one more tensor than the one before; what is missing counts as zeros."""
    for i in range(RANK + 1):
        found = hvd.synchronize(hvd.allreduce_async(of(RANK, 3), name=f"joined.{i}", op=hvd.Sum))
        assert_equal(found, combined(hvd.Sum, everyone(3, ranks=range(i, SIZE))))
    assert 0 <= hvd.join() < SIZE
    assert_still_works()


# Process sets


@pytest.fixture
def new_set():
    """Makes process sets, and lets go of them in the end."""
    made = []

    def add(ranks):
        made.append(hvd.add_process_set(ranks))
        return made[-1]

    yield add
    for process_set in made:
        hvd.remove_process_set(process_set)


@several
def test_every_function_in_disjoint_sets(new_set):
    halves = [list(range(SIZE // 2)), list(range(SIZE // 2, SIZE))]
    sets = [new_set(ranks) for ranks in halves]
    mine = sets[RANK >= SIZE // 2]
    ranks, place, count = mine.ranks, mine.rank(), mine.size()
    assert [s.included() for s in sets] == [s is mine for s in sets]
    assert_equal(
        hvd.synchronize(hvd.allreduce_async(of(RANK, 3), name="x", process_set=mine)),
        combined(hvd.Average, everyone(3, ranks=ranks)),
    )
    found = hvd.grouped_allreduce([of(RANK, 3)], op=hvd.Sum, process_set=mine)
    assert_equal(found[0], combined(hvd.Sum, everyone(3, ranks=ranks)))
    assert_equal(hvd.allgather(of(RANK, 2), process_set=mine), torch.cat(everyone(2, ranks=ranks)))
    for root in ranks:  # roots count among all ranks
        handle = hvd.broadcast_async(of(RANK, 3), root, name="root", process_set=mine)
        assert_equal(hvd.synchronize(handle), of(root, 3))
        assert_equal(hvd.broadcast(of(RANK, 3), root, process_set=mine), of(root, 3))
    rows, _ = hvd.synchronize(hvd.alltoall_async(of(RANK, count), process_set=mine))
    assert_equal(rows, torch.stack([of(rank, count)[place] for rank in ranks]))
    scattered = hvd.reducescatter(of(RANK, count, 2), op=hvd.Sum, process_set=mine)
    assert_equal(scattered[0], combined(hvd.Sum, everyone(count, 2, ranks=ranks))[place])
    assert hvd.allgather_object(RANK, process_set=mine) == ranks
    assert hvd.broadcast_object(RANK, ranks[-1], process_set=mine) == ranks[-1]
    hvd.barrier(process_set=mine)


@several
def test_overlapping_sets_in_another_order_on_every_rank(new_set):
    """Each rank is in two rings of neighbours; both are under way at once."""
    pairs = sorted({tuple(sorted({rank, (rank + 1) % SIZE})) for rank in range(SIZE)})
    sets = [new_set(pair) for pair in pairs if len(pair) < SIZE]
    mine = [s for s in [*sets, hvd.global_process_set] if RANK in s.ranks]
    random.Random(RANK).shuffle(mine)
    for name in ("first", "second"):
        handles = [
            (s, hvd.allreduce_async(of(RANK, 3), name=name, op=hvd.Sum, process_set=s))
            for s in mine
        ]
        random.Random(RANK + 50).shuffle(handles)
        for process_set, handle in handles:
            wanted = combined(hvd.Sum, everyone(3, ranks=process_set.ranks))
            assert_equal(hvd.synchronize(handle), wanted)


@several
def test_sets_come_and_go():
    for _ in range(2):
        process_set = hvd.add_process_set([0])
        with pytest.raises(hvd.ArgumentError, match="already"):
            hvd.add_process_set([0])
        if RANK == 0:
            assert_equal(hvd.allreduce(of(0, 3), process_set=process_set), of(0, 3))
        else:
            for function in (hvd.allreduce, hvd.allreduce_async):
                with pytest.raises(hvd.ArgumentError, match="not in the process set"):
                    function(of(RANK, 3), process_set=process_set)
        assert hvd.remove_process_set(process_set)
        assert not hvd.remove_process_set(process_set)
        with pytest.raises(hvd.ArgumentError, match="not known"):
            hvd.allreduce_async(of(RANK, 3), process_set=process_set)
    assert not hvd.remove_process_set(hvd.global_process_set)
    assert_still_works()


@several
def test_a_root_that_is_not_in_the_set(new_set):
    """Found here: rank 1 of all was taken for rank 1 of the set."""
    tail = new_set(range(1, SIZE))
    if RANK:
        with pytest.raises(hvd.ArgumentError, match="root_rank 0 is not"):
            hvd.synchronize(hvd.broadcast_async(of(RANK, 3), 0, name="root", process_set=tail))
        with pytest.raises(hvd.ArgumentError, match="root_rank 0 is not"):
            hvd.broadcast(of(RANK, 3), 0, process_set=tail)
    assert_still_works()


# Errors on every rank


@several
@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("shape", lambda odd: hvd.allreduce_async(torch.zeros(3 + odd), name="e")),
        ("dtype", lambda odd: hvd.allreduce_async(of(0, 3, dtype=FLOATS[2 + odd]), name="e")),
        ("op", lambda odd: hvd.allreduce_async(of(0, 3), name="e", op=hvd.Max if odd else hvd.Sum)),
        (
            "prescale_factor",
            lambda odd: hvd.allreduce_async(of(0, 3), name="e", prescale_factor=1.0 + odd),
        ),
        ("tensors", lambda odd: hvd.grouped_allreduce_async([of(0, 3)] * (2 + odd), name="e")),
        ("shape", lambda odd: hvd.allgather_async(torch.zeros(2, 3 + odd), name="e")),
        ("root_rank", lambda odd: hvd.broadcast_async(of(0, 3), odd, name="e")),
        ("root_rank", lambda odd: hvd.broadcast_async_(of(0, 3), odd, name="e")),
        ("shape", lambda odd: hvd.alltoall_async(torch.zeros(SIZE, 3 + odd), name="e")),
        ("op", lambda odd: hvd.reducescatter_async(of(0, 9), "e", hvd.Max if odd else hvd.Sum)),
        (
            "op",
            lambda odd: hvd.sparse_allreduce_async(
                torch.eye(3).to_sparse(), "e", hvd.Average if odd else hvd.Sum
            ),
        ),
        (
            "size",
            lambda odd: hvd.sparse_allreduce_async(
                torch.eye(3)[: 3 - odd].to_sparse(), "e", hvd.Sum
            ),
        ),
    ],
)
def test_what_ranks_disagree_on(what, call):
    handle = call(int(RANK == SIZE - 1))
    with pytest.raises(hvd.MismatchError, match=f"disagree on the {what}"):
        hvd.synchronize(handle)
    assert_still_works()


@several
def test_different_collectives_of_one_name():
    start = hvd.allgather_async if RANK else hvd.allreduce_async
    with pytest.raises(hvd.MismatchError, match="different collectives"):
        hvd.synchronize(start(of(RANK, 3), name="same"))
    assert_still_works()


@several
def test_a_call_that_one_rank_cannot_make():
    """The rank that errs gets its own error at once, the others learn of it."""
    if RANK == 0:
        with pytest.raises(hvd.UnsupportedError, match="bool"):
            hvd.allreduce_async(torch.zeros(3, dtype=torch.bool), name="cannot")
    else:
        with pytest.raises(hvd.MismatchError, match="Average is not defined for bool"):
            hvd.synchronize(hvd.allreduce_async(torch.zeros(3), name="cannot"))
    if RANK == 0:
        with pytest.raises(hvd.ArgumentError, match="unknown operation"):
            hvd.allreduce_async(torch.zeros(3), name="cannot", op="median")
    else:
        with pytest.raises(hvd.MismatchError, match="unknown operation"):
            hvd.synchronize(hvd.allreduce_async(torch.zeros(3), name="cannot"))
    assert_still_works()


@several
@pytest.mark.parametrize(
    "splits", [[1], [-1] + [1] * (SIZE - 1), [0.5] * SIZE, [7] * SIZE], ids=str
)
def test_splits_that_do_not_fit(splits):
    x = of(RANK, SIZE)
    if RANK == 0:
        with pytest.raises(hvd.ArgumentError, match="splits"):
            hvd.synchronize(hvd.alltoall_async(x, splits, name="a"))
    else:
        with pytest.raises(hvd.MismatchError, match="splits"):
            hvd.synchronize(hvd.alltoall_async(x, [1] * SIZE, name="a"))
    with pytest.raises(hvd.ArgumentError if RANK == 0 else hvd.MismatchError, match="splits"):
        hvd.alltoall(x, torch.tensor(splits) if RANK == 0 else None)
    assert_still_works()


@several
def test_what_no_rank_can_do():
    scalar = torch.tensor(1.0)
    for call in (
        lambda: hvd.reducescatter_async(scalar, name="n"),
        lambda: hvd.alltoall_async(scalar, name="n"),
        lambda: hvd.reducescatter_async(torch.zeros(SIZE, dtype=torch.bool), name="n"),
        lambda: hvd.reducescatter_async(of(RANK, SIZE), name="n", op=hvd.Adasum),
        lambda: hvd.broadcast_async(of(RANK, 3), SIZE, name="n"),
        lambda: hvd.broadcast_async(of(RANK, 3), "root", name="n"),
    ):
        with pytest.raises(hvd.HvdkitError):
            hvd.synchronize(call())
    assert_still_works()


@several
def test_a_name_that_is_used_twice():
    """It is an error on the rank that does it, and the others' next use of the name one as well."""
    if RANK:
        first = hvd.allreduce_async(of(RANK, 3), name="twice", op=hvd.Sum)
        with pytest.raises(hvd.ArgumentError, match="in use"):
            hvd.allreduce_async(of(RANK, 3), name="twice")
        hvd.barrier()
    else:
        hvd.barrier()
        first = hvd.allreduce_async(of(RANK, 3), name="twice", op=hvd.Sum)
    assert_equal(hvd.synchronize(first), combined(hvd.Sum, everyone(3)))
    if RANK == 0:
        with pytest.raises(hvd.MismatchError, match="in use"):
            hvd.synchronize(hvd.allreduce_async(of(RANK, 3), name="twice", op=hvd.Sum))
    assert_still_works()


# Sparse tensors, Adasum


def sparse_of(rank):
    """Return a sparse tensor in which one row occurs twice; rank 0 has none."""
    indices = torch.tensor([[rank, rank + 1, rank]])[:, : 3 if rank else 0]
    values = torch.arange(1.0, 1 + 2 * indices.shape[1]).reshape(-1, 2) * rank
    return torch.sparse_coo_tensor(indices, values, (SIZE + 1, 2), check_invariants=True)


def test_sparse():
    dense = torch.stack([sparse_of(rank).to_dense() for rank in range(SIZE)])
    for op, wanted in ((hvd.Sum, dense.sum(0)), (hvd.Average, dense.mean(0)), (1, dense.sum(0))):
        handle = hvd.sparse_allreduce_async(sparse_of(RANK), "sparse", op)
        total = hvd.synchronize(handle, timeout=30.0)
        assert hvd.poll(handle)
        assert total.is_sparse
        torch.testing.assert_close(total.to_dense(), wanted)
    torch.testing.assert_close(handle().to_dense(), dense.sum(0))  # as Horovod's can be called
    coalesced = hvd.synchronize(
        hvd.sparse_allreduce_async(sparse_of(RANK).coalesce(), "coalesced", hvd.Sum)
    )
    torch.testing.assert_close(coalesced.to_dense(), dense.sum(0))


def test_sparse_mistakes():
    with pytest.raises(hvd.ArgumentError, match="Max"):
        hvd.sparse_allreduce_async(sparse_of(RANK), "mistake", hvd.Max)
    with pytest.raises(hvd.UnsupportedError, match="to_sparse"):
        hvd.sparse_allreduce_async(torch.eye(3), "mistake", hvd.Sum)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_adasum(dtype):
    tensors = [of(RANK, 7, dtype=dtype), of(RANK + 1, 4, dtype=dtype)]
    wanted = [
        adasum([of(rank + i, count, dtype=torch.float64) for rank in range(SIZE)])
        for i, count in enumerate((7, 4))
    ]
    single = hvd.allreduce_async(tensors[0], name="single", op=hvd.Adasum)
    grouped = hvd.grouped_allreduce_async(tensors, name="grouped", op=hvd.Adasum)
    close = {"rtol": 0, "atol": {torch.float16: 0.01, torch.bfloat16: 0.1}.get(dtype, 1e-5)}
    torch.testing.assert_close(hvd.synchronize(single).double(), wanted[0], **close)
    for found, theirs in zip(hvd.synchronize(grouped), wanted, strict=True):
        torch.testing.assert_close(found.double(), theirs, **close)
    found = hvd.allreduce(tensors[1], op=hvd.Adasum, prescale_factor=2.0)
    torch.testing.assert_close(found.double(), 2 * wanted[1], **(close | {"rtol": 0.02}))


def test_adasum_of_what_has_no_angle():
    with pytest.raises(hvd.UnsupportedError, match="Adasum"):
        hvd.allreduce_async(of(RANK, 3, dtype=torch.int32), op=hvd.Adasum)
    assert_still_works()
