"""Schedules executed over TCP: the executor's own tests, with sockets between the ranks."""

import numpy as np
import pytest

from hvdkit.collectives.executor import Executor
from hvdkit.collectives.program import bounds_of, even_bounds, lay_out
from hvdkit.native import NumpyKernels
from hvdkit.schedules.registry import ALGORITHMS, get

from .tcp_worlds import on_tcp_ranks
from .test_executor import integers

CASES = [
    (kind, name) for kind in ("allreduce", "broadcast", "allgather") for name in ALGORITHMS[kind]
]
SEGMENTS = 3


def executor(transport):
    return Executor(transport, NumpyKernels(), spin=0)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_schedule(size):
    """Messages of a few bytes, of none, and such as do not fit a socket's buffer."""
    shapes = [(0, 16), (7, 16), (331, 16), (1 << 20, 1 << 18)]

    def body(t):
        run = executor(t)
        for kind, name in CASES:
            algorithm = get(kind, name)
            chunks = algorithm.chunks(size, SEGMENTS)
            for count, segment_bytes in shapes:
                arrays = integers(size, count)
                data, counts = arrays[t.rank].copy(), None
                if kind == "allgather":
                    counts = [count // size + (r < count % size) for r in range(size)]
                bounds = even_bounds(data.size, chunks) if counts is None else bounds_of(counts)
                moves = lay_out(
                    algorithm.steps(t.rank, size, chunks),
                    size,
                    bounds,
                    longest=max(1, segment_bytes // data.itemsize),
                    root=0,
                )
                run.run(moves, data)
                if kind == "allreduce":
                    wanted = np.sum(arrays, 0)
                elif kind == "broadcast":
                    wanted = arrays[0]
                else:
                    ends = bounds_of(counts)
                    wanted = np.concatenate([arrays[r][ends[r] : ends[r + 1]] for r in range(size)])
                np.testing.assert_array_equal(data, wanted, err_msg=f"{kind} {name} {count}")

    on_tcp_ranks(size, body)
