"""The compiled module.  dtype: position in `hvdkit.dtypes.DTYPES`; op: value of a `ReduceOp`.

Buffers may be anything C-contiguous with the buffer protocol, at any alignment.  What is wrong with
an argument is a TypeError or ValueError on this rank, before anything is published to the others.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, final

import numpy as np

# Anything with the buffer protocol, which numpy's stubs declare from Python 3.12 on.
_Buffer: TypeAlias = Any

def reduce(
    out: _Buffer, incoming: _Buffer, dtype: int, op: int, incoming_first: bool, /
) -> None: ...
def scale(buffer: _Buffer, dtype: int, divisor: int, factor: float, /) -> None: ...
def convert(dst: _Buffer, dst_dtype: int, src: _Buffer, src_dtype: int, /) -> None: ...
def copy(dst: _Buffer, src: _Buffer, /) -> None: ...
def cpu_features() -> str: ...
def variants() -> list[str]: ...
def select_variant(name: str, /) -> None: ...
def arena_bytes(size: int, slot_bytes: int, /) -> int: ...
def swap(
    handles: tuple[int, ...],
    here: tuple[bool, ...],
    headers: _Buffer,
    places: _Buffer,
    memory: _Buffer,
    looks: int,
    /,
) -> list[tuple[int, bytes, bytes]] | None:
    """Send and receive at most a message each over sockets.

    Looks `looks` times, then yields the core for a while; ends when something else comes.

    Args:
        handles: of the sockets.
        here: whether what would be received has been.
        headers: of each, 16 bytes to send and 16 that are expected.
        places: of each, four int64: offset in the memory and length of what is sent, and of what is
            received; a length of -1 stands for no message.
        memory: of the messages without their headers.

    Returns:
        None if all is done; else for each socket how many bytes have gone, and of what has come the
        first 16 and the others, which may not be what is expected.
    """

class ArenaError(RuntimeError):
    """A local rank died, gave up or closed while others waited for it; or this one is closed."""

@final
class Arena:
    """Collectives between the ranks of one node over a shared mapping, zeroed once.

    Every rank calls the same operations in the same order.  Each gives all ranks a `signature` to
    agree on, a digest of what must be equal among them; where it is not, every rank's call returns
    1 (None in `exchange`) without touching a destination, and the arena stays usable.  All calls
    block, without the GIL; signals are handled while they wait, and an exception raised by a
    handler aborts the arena for all ranks.  One thread at a time may use an arena.

    Raises:
        ArenaError: from any operation, once a rank that others wait for is dead, closed or aborted.
    """

    spin_iterations: int
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def aborted(self) -> bool: ...
    @property
    def small_limit(self) -> int: ...
    def __init__(
        self, memory: _Buffer, rank: int, size: int, slot_bytes: int, spin_iterations: int
    ) -> None: ...
    def barrier(self, signature: int, /) -> int: ...
    def exchange(self, payload: _Buffer, signature: int, /) -> list[bytes] | None: ...
    def allreduce(
        self,
        src: _Buffer,
        dst: _Buffer,
        dtype: int,
        op: int,
        prescale: float,
        divisor: int,
        postscale: float,
        signature: int,
        /,
    ) -> int: ...
    def bind_allreduce(
        self,
        dtype: int,
        op: int,
        prescale: float,
        divisor: int,
        postscale: float,
        signature: int,
        /,
    ) -> Callable[[_Buffer, _Buffer], int]: ...
    def bind(self, name: str, /, *arguments: Any) -> Callable[[_Buffer, _Buffer], int]: ...
    def reducescatter(
        self,
        src: _Buffer,
        dst: _Buffer,
        counts: tuple[int, ...],
        dtype: int,
        op: int,
        prescale: float,
        divisor: int,
        postscale: float,
        signature: int,
        /,
    ) -> int: ...
    def broadcast(self, buffer: _Buffer, root: int, signature: int, /) -> int: ...
    def allgather(
        self, src: _Buffer, dst: _Buffer, counts: tuple[int, ...], signature: int, /
    ) -> int: ...
    def alltoall(
        self,
        src: _Buffer,
        dst: _Buffer,
        send_counts: tuple[int, ...],
        recv_counts: tuple[int, ...],
        largest_pair: int,
        signature: int,
        /,
    ) -> int: ...
    def register(self, memory: _Buffer, stride: int, /) -> int: ...
    def unregister(self, region: int, /) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...

@final
class ShortWay:
    """Makes calls like earlier ones; see `hvdkit.native.interface.ShortWay`."""

    def __init__(self, array_type: type, allocate: Any, lane: Any, group: Any) -> None: ...
    def __call__(self, array: Any, /, *arguments: Any) -> np.ndarray[Any, np.dtype[Any]]: ...
    def remember(
        self,
        array: Any,
        arguments: tuple[Any, ...],
        bound: Any,
        plan: Any,
        again: Any,
        result: tuple[Any, ...] | None,
        /,
    ) -> None: ...
    def clear(self) -> None: ...

@final
class Recurring:
    """An all-reduce by messages, as long as it comes as it did before; see `collectives.frames`.

    Args:
        otherwise: ``(source, target)`` does it whenever it does not; it calls `prepare`.
        signature: of the call, signed.
    """

    def __init__(self, otherwise: Callable[[Any, Any], int], signature: int, /) -> None: ...
    @property
    def calls(self) -> int: ...
    @property
    def nanoseconds(self) -> int: ...
    def __call__(self, source: Any, target: Any, /) -> int: ...
    def prepare(
        self,
        state: _Buffer,
        last: int,
        counts: int,
        expected: bool,
        run: Callable[[Any, Any], bool],
        differs: Callable[[Any, Any], int],
        /,
    ) -> None:
        """Take the next calls after `last`: ``run(source, target)``.

        Up to eight such are known at a time, of one state.  Each call resets the counts at
        ``state[counts]``, or is one more where this was `expected`; 0: there are none.

        Args:
            state: of the frames.
            run: says whether all ranks have made this call.
            differs: where they have not; returns the status.
        """

@final
class Gathered:
    """A small all-reduce in frames; see `collectives.gathered`.

    Args:
        recipe: dtype, op, prescale, divisor, postscale, signature.
        rows: everybody's frame, one behind the other.
        rank, size: of this rank, of all.
        exchange: exchanges the frames.
    """

    def __init__(
        self,
        recipe: tuple[Any, ...],
        rows: _Buffer,
        rank: int,
        size: int,
        exchange: Callable[[], object],
        /,
    ) -> None: ...
    def __call__(self, source: _Buffer, target: _Buffer, /) -> bool:
        """Return whether all signatures are alike; otherwise `target` is as it was."""

@final
class Schedule:
    """The steps of a schedule on messages of one length; see `collectives.prepared`.

    Args:
        memory: of the chunks, each with a mark of 8 bytes behind it, and of what arrives to be
            combined with them, which has marks as well.
        dtype: of the elements.
        chunks: of each, where it is in the memory, a multiple of 8, and how many bytes it has.
        flights: of each, what exchanges its messages, and what is combined then: with which chunk,
            where it arrives, a multiple of 8 as well, and whether it is the first operand.
    """

    def __init__(
        self,
        memory: _Buffer,
        dtype: int,
        chunks: tuple[tuple[int, int], ...],
        flights: tuple[tuple[Callable[[], object], tuple[tuple[int, int, bool], ...]], ...],
        /,
    ) -> None: ...
    def __call__(
        self, recipe: tuple[Any, ...], mark: int, source: _Buffer, target: _Buffer, /
    ) -> bool:
        """Reduce `source` into `target`, if all ranks' marks are this one; return whether so."""

@final
class Persistent:
    """Persistent messages of an MPI library, by the addresses of its own functions and requests.

    Args:
        start, test: addresses of MPI_Startall and MPI_Testall.
        requests, statuses: memory of `count` of each, the former with their handles.
        looks: how often to look for the end of the messages before yielding the core.
        wait: called if they have not ended soon.

    Raises:
        RuntimeError: the library reports an error.
    """

    def __init__(
        self,
        start: int,
        test: int,
        requests: _Buffer,
        statuses: _Buffer,
        count: int,
        looks: int,
        wait: Callable[[], None],
        /,
    ) -> None: ...
    def __call__(self) -> None: ...
