"""MPI through mpi4py: the only module that imports it.  Importing this module starts MPI."""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hvdkit.config import DIRECT_RANKS
from hvdkit.dtypes import ReduceOp, bfloat16
from hvdkit.errors import UnsupportedError
from hvdkit.native import persistent
from hvdkit.transport.base import (
    Backoff,
    Bytes,
    GeneralAllgather,
    Part,
    Prepared,
    Request,
    Topology,
    exchanged_rows,
)
from hvdkit.transport.device import DeviceArray, Memory

T = TypeVar("T")

#: Bytes of such a message, at most: what libraries send at once, without asking whether the
#: receiver is ready.
EAGER = 32 * 1024

#: The tag of those messages: the largest that every library has, so that they meet no others.
PREPARED_TAG = 32767

#: Where the kernel lists devices over which messages need no sockets.
RDMA_DEVICES = (Path("/sys/class/infiniband"), Path("/sys/class/cxi"))

#: The largest count that every MPI library takes.
LARGEST_COUNT = 2**31 - 1

_MPIX_GPU_SUPPORT_CUDA = 0

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


def cuda_aware() -> bool:
    """Return whether the library takes addresses of a GPU's memory, as far as it tells.

    Open MPI and MPICH from 4.0 on have ``MPIX_Query_cuda_support``, MPICH 3.4 and what was made of
    it the other; neither is in the standard, so mpi4py does not have them.
    """
    library = ctypes.CDLL(MPI.__file__)  # in which the symbols of libmpi are found, too
    query = getattr(library, "MPIX_Query_cuda_support", None)
    if query is not None:
        return bool(query())
    query = getattr(library, "MPIX_GPU_query_support", None)
    answer = ctypes.c_int(0)
    if query is not None:
        query(_MPIX_GPU_SUPPORT_CUDA, ctypes.byref(answer))
    return bool(answer.value)


def world_size() -> int:
    """Return the size of MPI_COMM_WORLD."""
    return MPI.COMM_WORLD.Get_size()


class _PersistentExchange:
    """Messages that were set up once.

    The library's own nonblocking collectives are scheduled anew each time, which takes them longer
    than a small message; its blocking ones could not be interrupted.

    Args:
        comm: the communicator.
        memory, sends, receives, backoff: as `Transport.prepare_exchange` has them.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        memory: Bytes,
        sends: Sequence[Part],
        receives: Sequence[Part],
        *,
        backoff: Backoff,
    ) -> None:
        self._backoff = backoff
        self._requests: list[MPI.Prequest] = []
        for part in receives:
            for theirs in _pieces(memory, part):
                self._requests.append(comm.Recv_init(theirs, source=part.rank, tag=PREPARED_TAG))
        for part in sends:
            for ours in _pieces(memory, part):
                self._requests.append(comm.Send_init(ours, dest=part.rank, tag=PREPARED_TAG))
        self.run = self._natively() or self._start_and_wait

    def _natively(self) -> Callable[[], None] | None:
        """Return what the native module makes of it: Python takes as long as a small message."""
        addresses = _addresses("MPI_Startall", "MPI_Testall")
        if not self._requests or None in addresses:
            return None
        size = MPI._sizeof(MPI.Request)
        handles = b"".join(ctypes.string_at(MPI._addressof(r), size) for r in self._requests)
        count = len(self._requests)
        statuses = bytearray(count * MPI._sizeof(MPI.Status))
        memory = bytearray(handles), statuses, count
        made = persistent(*addresses, *memory, self._backoff.spin, self._wait)
        return cast("Callable[[], None] | None", made)

    def Test(self) -> bool:  # noqa: N802  (as a request has it)
        return MPI.Request.Testall(self._requests)

    def _start_and_wait(self) -> None:
        if self._requests:
            MPI.Prequest.Startall(self._requests)
            self._wait()

    def _wait(self) -> None:
        self._backoff.wait(self)

    def free(self) -> None:
        """Let go of the messages; those that were given up may yet come, and keep their memory."""
        if MPI.Is_finalized():
            return
        if not MPI.Request.Testall(self._requests):
            _given_up.append(self)
            return
        for request in self._requests:
            request.Free()
        self._requests.clear()


#: Exchanges whose messages may come after whoever made them is gone.
_given_up: list[_PersistentExchange] = []


@cache
def _addresses(*names: str) -> tuple[int | None, ...]:
    """Return where functions of the MPI library are; None where one is not found."""
    library = ctypes.CDLL(MPI.__file__)  # in which the symbols of libmpi are found, too
    functions = [getattr(library, name, None) for name in names]
    return tuple(
        None if found is None else ctypes.cast(cast(Any, found), ctypes.c_void_p).value
        for found in functions
    )


def _pieces(memory: Bytes, part: Part) -> Iterator[tuple[Bytes, MPI.Datatype]]:
    """Return the messages in which a part travels."""
    for start in range(part.start, part.stop, EAGER):
        yield memory[start : min(start + EAGER, part.stop)], MPI.BYTE


class MPITransport:
    """Messages on a duplicate of a communicator, so that they never meet the user's own."""

    TAG = 0

    def __init__(self, comm: MPI.Intracomm, spin: int = 0) -> None:
        self.comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.backoff = Backoff(spin)

    @classmethod
    def over(cls, comm: Any) -> MPITransport:
        """Return a transport over a duplicate of `comm` (None: the world).  Collective.

        Args:
            comm: an intracommunicator, or a list of ranks of the world, this one among them.

        Raises:
            UnsupportedError: `comm` is neither.
        """
        if comm is None:
            comm = MPI.COMM_WORLD
        if isinstance(comm, list | tuple | range) and MPI.COMM_WORLD.Get_rank() in comm:
            return cls(MPI.COMM_WORLD).subset(comm)
        if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
            raise UnsupportedError(
                "init(comm=...) takes an mpi4py intracommunicator, or a list of ranks with this "
                f"one in it, not {comm!r}"
            )
        return cls(comm.Dup())

    @property
    def asks_first(self) -> bool:
        """Whether there is no network but sockets, as far as the kernel tells."""
        return not any(folder.is_dir() and any(folder.iterdir()) for folder in RDMA_DEVICES)

    def duplicate(self) -> MPITransport:
        """Return a transport among the same ranks, for messages apart from these.  Collective."""
        return MPITransport(self.comm.Dup(), self.backoff.spin)

    def subset(self, ranks: Sequence[int]) -> MPITransport:
        """Return a transport among `ranks` of this one, in ascending order.

        Collective among those ranks alone; this rank is one of them.
        """
        group = self.comm.Get_group()
        chosen = group.Incl(sorted(ranks))
        comm = self.comm.Create_group(chosen, tag=self.TAG)
        chosen.Free()
        group.Free()
        return MPITransport(comm, self.backoff.spin)

    def tagged(self, tag: int) -> MPITransport:
        """Return a view of this transport whose messages have `tag`, and meet no others.  Local."""
        view = copy(self)
        view.TAG = tag
        return view

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
        return MPITransport(cast(MPI.Intracomm, local)), topology

    def isend(self, data: Bytes, destination: int) -> Request:
        return self.comm.Isend([data, MPI.BYTE], dest=destination, tag=self.TAG)

    def irecv(self, data: Bytes, source: int) -> Request:
        return self.comm.Irecv([data, MPI.BYTE], source=source, tag=self.TAG)

    def incoming(self) -> tuple[int, int] | None:
        """Return ``(source, bytes)`` of a message that can be received now, or None."""
        status = MPI.Status()
        if not self.comm.Iprobe(source=MPI.ANY_SOURCE, tag=self.TAG, status=status):
            return None
        return status.Get_source(), status.Get_count(MPI.BYTE)

    def allgather_ints(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        # Nonblocking, although a blocking call is quicker: that could not be interrupted.
        gathered = np.empty((self.size, len(values)), np.int64)
        self.backoff.wait(self.comm.Iallgather(values, gathered))
        return gathered

    def prepare_allgather(self, rows: NDArray[np.int64]) -> Prepared:
        if self.size > DIRECT_RANKS:
            return GeneralAllgather(self, rows)
        return self.prepare_exchange(*exchanged_rows(rows, self.rank), self.backoff)

    def prepare_exchange(
        self, memory: Bytes, sends: Sequence[Part], receives: Sequence[Part], backoff: Backoff
    ) -> Prepared:
        return _PersistentExchange(self.comm, memory, sends, receives, backoff=backoff)

    def allgather_object(self, value: T) -> list[T]:
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = self.allgather_ints(np.array([mine.size], np.int64))[:, 0].tolist()
        everything = np.empty(sum(lengths), np.uint8)
        self.backoff.wait(self.comm.Iallgatherv([mine, MPI.BYTE], [everything, lengths, MPI.BYTE]))
        ends = accumulate(lengths)
        return [
            pickle.loads(everything[end - length : end].tobytes())
            for length, end in zip(lengths, ends, strict=True)
        ]

    def new_backoff(self, spin: int) -> Backoff:
        return Backoff(spin)

    def interrupt(self, error: Exception) -> None:
        self.backoff.stop = error

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
        """Free the communicator.  Collective; a no-op once MPI is finalised.

        One in which an operation was given up stays: its messages may yet come, and another
        communicator that had taken its place would take them for its own.
        """
        if MPI.Is_finalized() or self.comm == MPI.COMM_NULL or self.backoff.abandoned:
            return
        self.comm.Free()

    # The library's own collectives, for algorithm="mpi" and as the peer in benchmarks.  They
    # reduce float16 and bfloat16, of which most libraries know nothing, as float32; what is in the
    # memory of a device, the caller widens.

    def library_allreduce(self, data: Memory, op: ReduceOp) -> None:
        """Reduce 1-D `data` in place with MPI_Allreduce, at most a 32-bit count at a time."""
        wide = data if isinstance(data, DeviceArray) else _widen(data)
        for start in range(0, wide.size, LARGEST_COUNT):
            piece = wide[start : start + LARGEST_COUNT]
            self.comm.Allreduce(MPI.IN_PLACE, piece, op=_mpi_op(wide, op))
        if isinstance(data, np.ndarray) and wide is not data:
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

    def library_broadcast(self, data: Memory, root: int) -> None:
        """Broadcast bytes with MPI_Bcast, at most a 32-bit count at a time."""
        for start in range(0, data.size, LARGEST_COUNT):
            self.comm.Bcast([data[start : start + LARGEST_COUNT], MPI.BYTE], root=root)

    def library_allgather(self, data: Memory, out: Memory, counts: Sequence[int]) -> None:
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


def _mpi_op(data: Memory, op: ReduceOp) -> MPI.Op:
    return (_LOGICAL if data.dtype.kind == "b" else _ARITHMETIC)[op]
