"""Adasum between processes: the tree in plain numpy is the oracle, the same bits on every rank."""

import numpy as np
import pytest
from adasum_oracle import adasum as expected

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.collectives.adasum import adasum

RANK, SIZE = hvd.rank(), hvd.size()


def combine(parts, **changes):
    """Run Adasum as the context would, between the collectives that may be under way."""
    arguments = {"name": None, "prescale": 1.0, "postscale": 1.0} | changes
    context().world.call(adasum, parts, **arguments)


def gradient(rank, count):
    rng = np.random.default_rng([count, rank])
    return np.linspace(1, 2, count) * (rank + 1) + rng.standard_normal(count)


@pytest.mark.parametrize("counts", [(1,), (SIZE + 1, 7), (300_001, 5, 40_000)], ids=str)
def test_against_numpy(counts):
    """From eager messages to several segments a step, far above what MPI buffers."""
    parts = [gradient(RANK, count).astype(np.float32) for count in counts]
    combine(parts, prescale=2.0)
    for part, count in zip(parts, counts, strict=True):
        wanted = 2 * expected([gradient(rank, count) for rank in range(SIZE)])
        np.testing.assert_allclose(part, wanted, rtol=0, atol=1e-4)
        everyone = hvd.allgather(part.view(np.uint32)[np.newaxis])
        assert (everyone == everyone[0]).all()


def test_a_buffer_in_the_arena():
    buffer = hvd.empty(3000, np.float64)
    buffer[:] = gradient(RANK, 3000)
    combine([buffer])
    wanted = expected([gradient(rank, 3000) for rank in range(SIZE)])
    np.testing.assert_allclose(buffer, wanted, rtol=0, atol=1e-10)


@pytest.mark.skipif(SIZE == 1, reason="one rank cannot disagree with itself")
def test_wrong_calls_are_errors_on_every_rank():
    with pytest.raises(hvd.MismatchError, match="disagree on the shape"):
        combine([np.zeros(3 + (RANK == 1))])
    with pytest.raises(hvd.MismatchError, match="disagree on the op"):
        if RANK:
            combine([np.zeros(3)])
        else:
            hvd.allreduce(np.zeros(3))
    with pytest.raises(hvd.UnsupportedError if RANK == 1 else hvd.MismatchError, match="int64"):
        combine([np.zeros(3, np.int64 if RANK == 1 else np.float64)])
    x = np.ones(3)
    combine([x])
    np.testing.assert_array_equal(x, 1.0)
