"""What this machine could do at best, measured in the same turns as everything else.

The memory roof: of each byte that a rank is given, or is to get, it must at least read and write
that one once, and all ranks do so at once over the cores that they share.  For an all-reduce that
is an addition in place.  By size, for caches are faster than memory.

The message roof: the bytes that a rank must send and receive at the least, 2n(p-1)/p for an
all-reduce, in one message each way, from each rank to the next by the MPI library's Sendrecv; on
several nodes by the first rank of each, what a node must send and receive.  What ranks of one node
do in their shared memory, without messages, may be above it.
"""

from __future__ import annotations

import platform
import time

import numpy as np
from measuring import Candidate, Prepared
from mpi4py import MPI
from records import ROOF, bus_factor

import hvdkit as hvd

#: Below this a call takes longer than its bytes, and says nothing of the memory.
SMALLEST_IN_MEMORY = 4096

#: From this on a node's other ranks sleep meanwhile: less would be over before they woke up.
SLEEP_FROM = 2**19

#: float32 that are added up at a time, so that the sum stays in the cache.
SLAB = 16384


def roofs(collective: str) -> list[Candidate]:
    """Return the roofs of a collective: the memory's, and the messages' if there are any."""
    found = [memory_roof(collective)]
    return [*found, message_roof(collective)] if hvd.size() > 1 else found


def memory_roof(collective: str) -> Candidate:
    """Return the least that a collective does to the memory, by all ranks at once."""

    def prepare(nbytes: int) -> Prepared:
        x = np.zeros(max(1, nbytes // 4), np.float32)
        if collective == "allreduce":
            return lambda: np.add(x, np.float32(1), out=x), _nothing
        if collective == "reducescatter":
            parts = x[: x.size // hvd.size() * hvd.size()].reshape(hvd.size(), -1)
            total = np.zeros(parts.shape[1], np.float32)
            return lambda: _add_up(parts, total), _nothing
        if collective == "broadcast" and hvd.rank() == 0 and hvd.size() > 1:
            return lambda: None, _nothing  # the root has its data already
        y = np.zeros_like(x)
        return lambda: np.copyto(y, x), _nothing

    return Candidate("memory roof", prepare, ROOF, smallest=SMALLEST_IN_MEMORY)


def _add_up(parts: np.ndarray, total: np.ndarray) -> None:
    """Sum up rows, each read once; the sum is written once."""
    for start in range(0, total.size, SLAB):
        slab = slice(start, start + SLAB)
        np.copyto(total[slab], parts[0, slab])
        for part in parts[1:]:
            np.add(total[slab], part[slab], out=total[slab])


def message_roof(collective: str) -> Candidate:
    """Return one message each way, of the bytes that a collective must send.  Collective."""
    nodes = hvd.size() > hvd.local_size()
    takes_part = not nodes or hvd.local_rank() == 0
    comm = MPI.COMM_WORLD.Split(0 if takes_part else MPI.UNDEFINED)
    hosts = MPI.COMM_WORLD.allgather(platform.node())
    node = MPI.COMM_WORLD.Split(hosts.index(platform.node())) if nodes else MPI.COMM_SELF

    def prepare(nbytes: int) -> Prepared:
        if not takes_part:
            return (lambda: _wait(node, nbytes)), (lambda: _wait(node, nbytes))
        rank, size = comm.Get_rank(), comm.Get_size()
        factor = bus_factor(collective, size)
        if factor is None:
            raise ValueError(f"{collective!r} is no collective")
        count = max(1, int(nbytes * factor))
        out, into = np.ones(count, np.uint8), np.zeros(count, np.uint8)
        right, left = (rank + 1) % size, (rank - 1) % size
        if collective == "broadcast":  # one way only, from the root on
            right = MPI.PROC_NULL if rank == size - 1 else right
            left = MPI.PROC_NULL if rank == 0 else left

        def call() -> None:
            comm.Sendrecv(out, right, 0, into, left, 0)
            if nodes and nbytes >= SLEEP_FROM:
                node.Ibarrier().Wait()

        def check() -> int:
            call()
            return 0 if left == MPI.PROC_NULL else int(np.count_nonzero(into != 1))

        return call, check, lambda: out.fill(1)

    return Candidate("message roof", prepare, ROOF)


def _wait(node: MPI.Comm, nbytes: int) -> int:
    """Leave the cores to the rank of this node that sends, until it has; nothing is wrong."""
    done = node.Ibarrier() if nbytes >= SLEEP_FROM else MPI.REQUEST_NULL
    while not done.Test():
        time.sleep(5e-5)
    return 0


def _nothing() -> int:
    """Return that nothing is wrong, as there is nothing to check."""
    return 0
