"""MPI through mpi4py: the only module that imports it.  Importing this module starts MPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hvdkit.dtypes import ReduceOp, bfloat16
from hvdkit.errors import UnsupportedError
from hvdkit.transport.base import Backoff, Bytes, Request, Topology

T = TypeVar("T")

#: The largest count that every MPI library takes.
LARGEST_COUNT = 2**31 - 1

_ARITHMETIC = {
    ReduceOp.SUM: MPI.SUM,
    ReduceOp.AVERAGE: MPI.SUM,
    ReduceOp.MIN: MPI.MIN,
    ReduceOp.MAX: MPI.MAX,
    ReduceOp.PRODUCT: MPI.PROD,
}
_LOGICAL = {
    ReduceOp.SUM: MPI.LOR,
    ReduceOp.MAX: MPI.LOR,
    ReduceOp.MIN: MPI.LAND,
    ReduceOp.PRODUCT: MPI.LAND,
}


def library_version() -> str:
    """Return the MPI library's name and version, one line."""
    return MPI.Get_library_version().splitlines()[0].split(",")[0].rstrip("\x00").strip()


def standard_version() -> tuple[int, int]:
    """Return the version of the MPI standard that the library implements."""
    return MPI.Get_version()


def threads_level() -> str:
    """Return what the library allows threads to do: single, funneled, serialized or multiple."""
    names = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    return names[MPI.Query_thread()]


def world_size() -> int:
    """Return the size of MPI_COMM_WORLD."""
    return MPI.COMM_WORLD.Get_size()


class MPITransport:
    """Messages on a duplicate of a communicator, so that they never meet the user's own."""

    TAG = 0

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.backoff = Backoff(0)

    @classmethod
    def over(cls, comm: Any) -> MPITransport:
        """Return a transport over a duplicate of `comm` (None: the world).  Collective.

        Raises:
            UnsupportedError: `comm` is not an intracommunicator of mpi4py.
        """
        if comm is None:
            comm = MPI.COMM_WORLD
        if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
            raise UnsupportedError(
                f"init(comm=...) takes an mpi4py intracommunicator, not {type(comm).__name__}"
            )
        return cls(comm.Dup())

    def split_by_node(self) -> tuple[MPITransport, Topology]:
        """Return a transport among the ranks of this node, and where this rank is.  Collective."""
        local = self.comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        local_rank, local_size = local.Get_rank(), local.Get_size()
        cross = self.comm.Split(color=local_rank, key=self.rank)
        topology = Topology(
            rank=self.rank,
            size=self.size,
            local_rank=local_rank,
            local_size=local_size,
            cross_rank=cross.Get_rank(),
            cross_size=cross.Get_size(),
        )
        cross.Free()
        return MPITransport(local), topology

    def isend(self, data: Bytes, destination: int) -> Request:
        return self.comm.Isend([data, MPI.BYTE], dest=destination, tag=self.TAG)

    def irecv(self, data: Bytes, source: int) -> Request:
        return self.comm.Irecv([data, MPI.BYTE], source=source, tag=self.TAG)

    def allgather_ints(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        gathered = np.empty((self.size, len(values)), np.int64)
        if self.backoff.spin:  # MPI may keep the core, and is quicker that way
            self.comm.Allgather(values, gathered)
        else:
            self.backoff.wait(self.comm.Iallgather(values, gathered))
        return gathered

    def allgather_object(self, value: T) -> list[T]:
        return cast(list[T], self.comm.allgather(value))

    def broadcast_object(self, value: Any, root: int) -> Any:
        return self.comm.bcast(value, root=root)

    @property
    def largest_count(self) -> int:
        """The largest count of the library's collectives: 32-bit before MPI 4."""
        return LARGEST_COUNT if standard_version() < (4, 0) else 2**63 - 1

    def abort(self, code: int) -> None:
        """End every process of the job at once."""
        MPI.COMM_WORLD.Abort(code)

    def close(self) -> None:
        """Free the communicator.  Collective; a no-op once MPI is finalised."""
        if not MPI.Is_finalized() and self.comm != MPI.COMM_NULL:
            self.comm.Free()

    # The library's own collectives, for algorithm="mpi" and as the peer in benchmarks.  They
    # reduce float16 and bfloat16, of which most libraries know nothing, as float32.

    def library_allreduce(self, data: NDArray[Any], op: ReduceOp) -> None:
        """Reduce 1-D `data` in place with MPI_Allreduce, at most a 32-bit count at a time."""
        wide = _widen(data)
        for start in range(0, wide.size, LARGEST_COUNT):
            piece = wide[start : start + LARGEST_COUNT]
            self.comm.Allreduce(MPI.IN_PLACE, piece, op=_mpi_op(wide, op))
        if wide is not data:
            data[:] = wide

    def library_reducescatter(
        self, data: NDArray[Any], out: NDArray[Any], counts: Sequence[int], op: ReduceOp
    ) -> None:
        """Reduce 1-D `data` and leave each rank its `counts` elements, with MPI_Reduce_scatter."""
        wide = _widen(data)
        result = out if wide is data else np.empty(out.shape, wide.dtype)
        self.comm.Reduce_scatter(wide, result, recvcounts=list(counts), op=_mpi_op(wide, op))
        if result is not out:
            out[:] = result

    def library_broadcast(self, data: Bytes, root: int) -> None:
        """Broadcast bytes with MPI_Bcast, at most a 32-bit count at a time."""
        for start in range(0, data.size, LARGEST_COUNT):
            self.comm.Bcast([data[start : start + LARGEST_COUNT], MPI.BYTE], root=root)

    def library_allgather(self, data: Bytes, out: Bytes, counts: Sequence[int]) -> None:
        """Concatenate bytes in rank order with MPI_Allgatherv."""
        self.comm.Allgatherv([data, MPI.BYTE], [out, list(counts), MPI.BYTE])

    def library_alltoall(
        self, data: Bytes, out: Bytes, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> None:
        """Exchange bytes with MPI_Alltoallv."""
        self.comm.Alltoallv(
            [data, list(send_counts), MPI.BYTE], [out, list(receive_counts), MPI.BYTE]
        )

    def library_barrier(self) -> None:
        """Wait for every rank with MPI_Barrier."""
        self.comm.Barrier()


def _widen(data: NDArray[Any]) -> NDArray[Any]:
    """Return `data` itself, or a float32 copy of 16-bit floats."""
    return data.astype(np.float32) if data.dtype in (np.float16, bfloat16) else data


def _mpi_op(data: NDArray[Any], op: ReduceOp) -> MPI.Op:
    return (_LOGICAL if data.dtype.kind == "b" else _ARITHMETIC)[op]
