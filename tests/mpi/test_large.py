"""Above every eager limit, above 2 GiB, and user messages on the same communicator."""

import os

import numpy as np
import pytest

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.collectives.pick import known_algorithms

RANK, SIZE = hvd.rank(), hvd.size()


def memory_bytes():
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def names(kind):
    group = context().group
    there = {"shm": group.arena, "hierarchical": group.hierarchy}
    return [n for n in known_algorithms(kind) if n != "auto" and there.get(n, n) is not None]


@pytest.mark.parametrize("algorithm", names("allreduce"))
def test_allreduce_of_8_mib(algorithm):
    x = np.arange(2**21, dtype=np.float32) % 1000
    result = hvd.allreduce(x + RANK, op=hvd.Sum, algorithm=algorithm)
    np.testing.assert_array_equal(result, x * SIZE + sum(range(SIZE)))


@pytest.mark.parametrize("algorithm", names("broadcast"))
def test_broadcast_of_8_mib(algorithm):
    x = np.arange(2**20, dtype=np.float64)
    mine = x if RANK == SIZE - 1 else np.zeros_like(x)
    np.testing.assert_array_equal(hvd.broadcast(mine, SIZE - 1, algorithm=algorithm), x)


@pytest.mark.parametrize("algorithm", names("alltoall"))
def test_alltoall_of_8_mib(algorithm):
    rows = 2**20 // SIZE
    x = np.repeat(np.arange(SIZE) + 10.0 * RANK, rows)
    wanted = np.repeat(RANK + 10.0 * np.arange(SIZE), rows)
    np.testing.assert_array_equal(hvd.alltoall(x, algorithm=algorithm), wanted)


@pytest.mark.parametrize("algorithm", names("allgather"))
def test_allgather_of_8_mib(algorithm):
    x = np.full((1, 2**20), RANK, np.int32)
    wanted = np.repeat(np.arange(SIZE, dtype=np.int32), 2**20).reshape(SIZE, -1)
    np.testing.assert_array_equal(hvd.allgather(x, algorithm=algorithm), wanted)


@pytest.mark.parametrize("algorithm", names("reducescatter"))
def test_reducescatter_of_8_mib(algorithm):
    x = np.repeat(np.arange(SIZE, dtype=np.int32)[:, np.newaxis], 2**20, 1)
    result = hvd.reducescatter(x + RANK, op=hvd.Max, algorithm=algorithm)
    np.testing.assert_array_equal(result, np.full((1, 2**20), RANK + SIZE - 1, np.int32))


@pytest.mark.skipif(SIZE != 2, reason="once is enough")
@pytest.mark.skipif(memory_bytes() < 16 * 2**30, reason="needs 16 GiB of memory")
@pytest.mark.parametrize("algorithm", ["auto", "ring", "mpi"])
def test_more_bytes_than_32_bits_count(algorithm):
    x = np.full(2**31 + 5, RANK + 1, np.uint8)
    hvd.allreduce_(x, op=hvd.Sum, algorithm=algorithm)
    assert x.min() == x.max() == 3


@pytest.mark.skipif(context().kind != "mpi", reason="the ranks are not MPI processes")
def test_messages_of_the_user_do_not_meet_ours():
    """All traffic is on a duplicate: a wildcard receive of the user's does not catch it."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    caught = np.zeros(1)
    request = world.Irecv(caught, source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)
    result = hvd.allreduce(np.ones(70_000), op=hvd.Sum, algorithm="ring")
    assert (result == SIZE).all()
    assert not request.Test()
    hvd.barrier()  # nobody sends before everybody has looked
    sent = world.Isend(np.array([7.0 + RANK]), dest=(RANK + 1) % SIZE)
    request.Wait()
    sent.Wait()
    assert caught[0] == 7.0 + (RANK - 1) % SIZE


@pytest.mark.skipif(
    SIZE != 2 or context().kind != "mpi", reason="once is enough, of ranks that are MPI processes"
)
@pytest.mark.parametrize("kind", ["allgather", "alltoall"])
def test_a_library_that_cannot_count_so_far_says_so(kind, monkeypatch):
    monkeypatch.setattr(type(context().group.transport), "largest_count", 999)
    with pytest.raises(hvd.UnsupportedError, match="counts in 32 bits, and the message has 1000"):
        getattr(hvd, kind)(
            np.zeros(500 if kind == "allgather" else 1000, np.uint8), algorithm="mpi"
        )
    assert hvd.allreduce(np.ones(1), op=hvd.Sum)[0] == SIZE


@pytest.mark.parametrize("count", [20_000, 300_001])
def test_slots_filled_through_the_cache_and_past_it(count):
    """The first calls of a size try both ways in turn; nobody may see a difference."""
    x = np.arange(count, dtype=np.float32) % 97
    for step in range(6):
        mine = x * (RANK + 1) + step
        total = x * sum(range(1, SIZE + 1)) + step * SIZE
        everyone = np.concatenate([x * (rank + 1) + step for rank in range(SIZE)])
        np.testing.assert_array_equal(hvd.allreduce(mine, op=hvd.Sum), total)
        np.testing.assert_array_equal(hvd.allgather(mine), everyone)
        np.testing.assert_array_equal(hvd.broadcast(mine, SIZE - 1), x * SIZE + step)
        rows = np.tile(mine, (SIZE, 1))
        np.testing.assert_array_equal(hvd.reducescatter(rows, op=hvd.Sum)[0], total)
        np.testing.assert_array_equal(hvd.alltoall(rows).ravel(), everyone)
