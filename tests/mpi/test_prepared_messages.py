"""Messages of the MPI library that were set up once."""

import gc
import threading

import numpy as np
import pytest
from mpi4py import MPI

from hvdkit.errors import HorovodInternalError
from hvdkit.transport import mpi
from hvdkit.transport.base import Part
from hvdkit.transport.mpi import MPITransport

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.Get_size() < 2, reason="needs two ranks")


def pair():
    """Return a transport of ranks 0 and 1, None on the others."""
    rank = MPI.COMM_WORLD.Get_rank()
    return MPITransport.over([0, 1]) if rank < 2 else None


@pytest.mark.parametrize("length", [0, 1, 1000, 100_000])
def test_parts_of_a_memory_are_exchanged_again_and_again(length):
    t = pair()
    if t is None:
        return
    memory = np.zeros(2 * length, np.uint8)
    here, there = Part(1 - t.rank, 0, length), Part(1 - t.rank, length, 2 * length)
    made = t.prepare_exchange(memory, [here], [there], t.backoff)
    for turn in range(20):
        memory[:length] = 10 * t.rank + turn
        made.run()
        assert (memory[length:] == 10 * (1 - t.rank) + turn).all()
    made.free()
    t.close()


def test_messages_that_were_given_up_keep_their_memory_until_they_have_come():
    t = pair()
    if t is None:
        return
    memory = np.full(2 * 5000, t.rank, np.uint8)
    parts = [Part(1 - t.rank, 0, 5000)], [Part(1 - t.rank, 5000, 10000)]
    backoff = t.new_backoff(0)
    made = t.prepare_exchange(memory, *parts, backoff)
    given_up = len(mpi._given_up)
    if t.rank == 0:
        timer = threading.Timer(0.1, setattr, [backoff, "stop", HorovodInternalError("given up")])
        timer.start()
        with pytest.raises(HorovodInternalError, match="given up"):
            made.run()
        timer.join()
        made.free()
        assert mpi._given_up[given_up:] == [made]
        gc.collect()
        t.comm.barrier()
        t.backoff.wait(made)
        assert (memory[5000:] == 1).all()
        made.free()
        mpi._given_up.remove(made)
    else:
        t.comm.barrier()
        made.run()
        assert (memory[5000:] == 0).all()
        made.free()
        assert len(mpi._given_up) == given_up
    t.close()
