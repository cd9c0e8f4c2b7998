"""Arrays from rank to rank between processes, over shared memory and over messages."""

import os
import time

import numpy as np
import pytest

import hvdkit as hvd
from hvdkit.api import communicator, context
from hvdkit.dtypes import DTYPES
from hvdkit.transport.courier import SLOT_BYTES, SLOTS

RANK, SIZE = hvd.rank(), hvd.size()
RING = SLOTS * SLOT_BYTES
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")


def start_again(**environment):
    """Begin anew with other settings; those that are None are not set."""
    hvd.shutdown()
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    hvd.init()


@pytest.fixture(scope="module", params=["1", "0"], ids=["shared", "messages"])
def shm(request):
    """With memory that ranks share, and without."""
    start_again(HVDKIT_SHM=request.param)
    yield request.param == "1"
    start_again(HVDKIT_SHM=None)


@pytest.fixture
def courier(shm):
    """Among all ranks."""
    found = context().courier(communicator(None))
    assert (found._rings is not None) == (shm and 1 < SIZE == hvd.local_size())
    yield found
    hvd.barrier()


def numbers(count, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).integers(0, 250, count).astype(dtype)


def assert_equal(found, wanted):
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(found, wanted)


def test_there_is_one_for_all(courier):
    assert context().courier(communicator(None)) is courier
    assert (courier.rank, courier.size) == (RANK, SIZE)


def test_any_array_from_everyone_to_everyone(courier):
    arrays = [
        *(numbers((3, 5), dtype) for dtype in DTYPES),
        np.array(2.5),
        np.empty((0, 3), np.complex64),
        numbers((4, 6)).T,
        numbers((700, 700))[::2, ::3],
        numbers(RING + 1, np.uint8),
    ]
    for destination in range(SIZE):
        for number, array in enumerate(arrays):
            courier.send(destination, number % 2, array)
    for source in range(SIZE):
        for number, array in enumerate(arrays):
            assert_equal(courier.receive(source, number % 2), array)


def test_rings_that_are_full_in_both_directions(courier):
    """Nobody receives before it has sent all."""
    count, each = 4, RING // 8
    for number in range(count):
        for destination in range(SIZE):
            courier.send(destination, number, np.full(each, RANK * 10.0 + number))
    for number in reversed(range(count)):
        for source in range(SIZE):
            assert_equal(courier.receive(source, number), np.full(each, source * 10.0 + number))


@several
def test_a_hundred_megabytes(courier):
    data = numbers(100_000_000 // 8)
    if RANK == 0:
        courier.send(SIZE - 1, "large", data)
    if RANK == SIZE - 1:
        assert_equal(courier.receive(0, "large"), data)


def test_many_small_ones(courier):
    """Around in a circle, each rank sending what it got."""
    after, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    for number in range(500):
        courier.send(after, "first", np.array([number, RANK]))
    for number in range(500):
        array = courier.receive(before, "first")
        assert array.tolist() == [number, before]
        courier.send(after, "second", array)
    for number in range(500):
        assert courier.receive(before, "second").tolist() == [number, (before - 1) % SIZE]


def test_while_collectives_run(courier):
    """Of this thread and of others."""
    after, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    for number in range(10):
        courier.send(after, "x", np.full(200_000, number + RANK))
        ones = np.ones(50_000)
        handle = communicator(None).allreduce_async(
            [(ones, ones)], name=f"beside {number}", op=hvd.Sum, result=ones
        )
        total = hvd.allreduce(np.full(50_000, 1.0), op=hvd.Sum)
        assert (total == SIZE).all()
        assert_equal(courier.receive(before, "x"), np.full(200_000, number + before))
        assert (handle.wait() == SIZE).all()


@pytest.mark.skipif(SIZE < 3, reason="needs three ranks")
def test_in_parts_of_the_ranks_at_once(courier):
    """Couriers of process sets, that of all ranks beside them."""
    sets = [hvd.add_process_set([rank, rank + 1]) for rank in range(min(SIZE, 4) - 1)]
    mine = [ranks for ranks in sets if ranks.included()]
    couriers = [context().courier(communicator(ranks)) for ranks in mine]
    courier.send(RANK, "x", numbers(4))
    for ranks, each in zip(mine, couriers, strict=True):
        assert (each.rank, each.size) == (ranks.rank(), 2)
        each.send(1 - each.rank, "x", np.full(RING // 4, ranks.process_set_id))
    for ranks, each in reversed(list(zip(mine, couriers, strict=True))):
        found = each.receive(1 - each.rank, "x")
        assert_equal(found, np.full(RING // 4, ranks.process_set_id))
    assert_equal(courier.receive(RANK, "x"), numbers(4))
    for each in sets:
        hvd.remove_process_set(each)


@several
@pytest.mark.usefixtures("shm")
def test_closing_with_what_nobody_takes():
    """Ends within seconds, and the next one knows nothing of it."""
    courier = context().courier(communicator(None))
    for destination in range(SIZE):
        courier.send(destination, "x", np.ones(RING // 4))
    began = time.monotonic()
    hvd.shutdown()
    assert time.monotonic() - began < 8
    with pytest.raises(hvd.NotInitializedError):
        courier.send(1 - RANK, "x", np.ones(3))
    hvd.init()
    courier = context().courier(communicator(None))
    courier.send((RANK + 1) % SIZE, "x", np.full(3, RANK))
    assert courier.receive((RANK - 1) % SIZE, "x").tolist() == [(RANK - 1) % SIZE] * 3
    hvd.barrier()
