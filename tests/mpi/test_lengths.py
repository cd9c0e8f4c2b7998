"""Lengths that are learnt once: calls in which they change, on all ranks, on one, and back."""

import numpy as np
import pytest

import hvdkit as hvd

RANK, SIZE = hvd.rank(), hvd.size()


def gather(rows_of, algorithm="auto", name=None):
    """All-gather `rows_of(rank)` rows and check them."""
    x = np.full((rows_of(RANK), 3), RANK, np.float32)
    wanted = np.repeat(np.arange(SIZE, dtype=np.float32), [rows_of(r) for r in range(SIZE)])
    result = hvd.allgather(x, algorithm=algorithm, name=name)
    np.testing.assert_array_equal(result, np.repeat(wanted[:, np.newaxis], 3, 1))


def exchange(rows_of, algorithm="auto", name=None):
    """All-to-all of `rows_of(from) + to` rows, checked."""
    splits = [rows_of(RANK) + to for to in range(SIZE)]
    x = np.repeat(10 * RANK + np.arange(SIZE), splits)
    received, counts = hvd.alltoall(x, splits, algorithm=algorithm, name=name)
    assert counts.tolist() == [rows_of(r) + RANK for r in range(SIZE)]
    np.testing.assert_array_equal(received, np.repeat(10 * np.arange(SIZE) + RANK, counts))


@pytest.mark.parametrize("algorithm", ["auto", "mpi", "ring"])
@pytest.mark.parametrize("collective", [gather, exchange])
def test_lengths_change(collective, algorithm):
    if collective is exchange and algorithm == "ring":
        algorithm = "pairwise"
    name = f"lengths.{collective.__name__}.{algorithm}"
    for _ in range(3):
        collective(lambda _: 4, algorithm, name)
    collective(lambda _: 5, algorithm, name)  # on every rank
    collective(lambda _: 4, algorithm, name)
    for last in (7, 7, 0, 4, 4):  # on the last rank only
        collective(lambda rank, last=last: last if rank == SIZE - 1 else 4, algorithm, name)


def test_the_first_change_is_on_one_rank_only():
    for _ in range(2):
        gather(lambda _: 2, name="one rank")
    gather(lambda rank: 3 if rank == 0 else 2, name="one rank")
    gather(lambda rank: 3 if rank == 0 else 2, name="one rank")


@pytest.mark.skipif(SIZE == 1, reason="one rank cannot disagree with itself")
def test_a_mismatch_after_lengths_were_learnt():
    """Half of the ranks go ahead with what they know, and must learn of the others' call."""
    for _ in range(2):
        gather(lambda _: 2, name="learnt")
    with pytest.raises(hvd.MismatchError, match="disagree on the dtype"):
        hvd.allgather(np.zeros((2, 3), np.float64 if RANK else np.float32), name="learnt")
    with pytest.raises(hvd.MismatchError, match="different collectives"):
        if RANK:
            hvd.barrier()
        else:
            gather(lambda _: 2, name="learnt")
    gather(lambda _: 2, name="learnt")
    gather(lambda rank: rank, name="learnt")
