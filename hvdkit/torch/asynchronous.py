"""The collectives by name: each returns a handle, for `poll` and `synchronize`.

Names, arguments and defaults are Horovod's.  Ranks may start them in different orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray

from hvdkit import collectives
from hvdkit.api import communicator
from hvdkit.collectives.group import Group
from hvdkit.dtypes import Average, Sum, as_op, as_reduction
from hvdkit.engine.communicator import Communicator
from hvdkit.engine.handles import Handle
from hvdkit.errors import ArgumentError, UnsupportedError
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.torch.convert import check_tensor
from hvdkit.torch.ports import Result, Source, new_array


class TensorHandle:
    """An operation under way on tensors."""

    __slots__ = ("_finish", "_handle")

    def __init__(self, handle: Handle[Any], finish: Callable[[Any], Any]) -> None:
        self._handle = handle
        self._finish = finish

    def poll(self) -> bool:
        """Return whether the operation is complete; local, never blocks."""
        return self._handle.poll()

    def wait(self, timeout: float | None = None) -> Any:
        """Return the result, a tensor or several.  Blocking.

        Raises:
            TimeoutError: not complete after `timeout` seconds; the operation goes on.
            Whatever the operation raised.
        """
        return self._finish(self._handle.wait(timeout))


class SparseHandle(TensorHandle):
    """One of `sparse_allreduce_async`, which scripts for Horovod call to have the result."""

    __slots__ = ()

    def __call__(self) -> Any:
        """Return the result.  Blocking."""
        return self.wait()


def poll(handle: TensorHandle) -> bool:
    """Return whether an asynchronous operation is complete; local, never blocks."""
    return handle.poll()


def synchronize(handle: TensorHandle, timeout: float | None = None) -> Any:
    """Return the result of an asynchronous operation, when it is complete.  Blocking.

    Args:
        handle: what the operation's function returned.
        timeout: seconds; None: no limit.

    Raises:
        TimeoutError: not complete after `timeout` seconds; the operation goes on.
        MismatchError: on every rank, if ranks asked for different things under the name.
        StallError: a rank did not come; see ``HVDKIT_STALL_SHUTDOWN_TIME_SECONDS``.
        PeerError: another rank died.
    """
    return handle.wait(timeout)


# All-reduce


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start to combine all ranks' `tensor` into a new tensor; see `allreduce`."""
    return _allreduce(
        [tensor],
        None,
        name,
        as_reduction(op, average),
        (prescale_factor, postscale_factor),
        process_set,
    )


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start to replace `tensor` by the combination of all ranks'; see `allreduce`."""
    return _allreduce(
        [tensor],
        [tensor],
        name,
        as_reduction(op, average),
        (prescale_factor, postscale_factor),
        process_set,
    )


def grouped_allreduce_async(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start to combine all ranks' `tensors`, all together, into new ones; see `allreduce`."""
    return _allreduce(
        tensors,
        None,
        name,
        as_reduction(op, average),
        (prescale_factor, postscale_factor),
        process_set,
        grouped=True,
    )


def grouped_allreduce_async_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start to replace `tensors`, all together, by the combinations of all ranks'."""
    return _allreduce(
        tensors,
        tensors,
        name,
        as_reduction(op, average),
        (prescale_factor, postscale_factor),
        process_set,
        grouped=True,
    )


def _allreduce(
    tensors: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor] | None,
    name: str | None,
    op: Any,
    factors: tuple[float, float],
    process_set: ProcessSet,
    *,
    grouped: bool = False,
) -> TensorHandle:
    sources = [Source(tensor) for tensor in tensors]
    devices = [tensor.device for tensor in tensors]
    targets = [source.array for source in sources]
    if outputs is None:
        on_host = [device.type == "cpu" for device in devices]
        targets = [
            new_array(array) if here else array
            for array, here in zip(targets, on_host, strict=True)
        ]
    else:
        for tensor in outputs:
            check_tensor(tensor, in_place=True)
    into: Sequence[torch.Tensor | None] = outputs or [None] * len(sources)

    def store(_: Any) -> list[Result]:
        return [Result(*found) for found in zip(targets, devices, into, strict=True)]

    def in_place(_: Any) -> Any:
        assert outputs is not None
        return list(outputs) if grouped else outputs[0]

    # Nothing is to be stored where the core works on the tensors' own memory.
    direct = outputs is not None and all(
        tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in outputs
    )
    handle = communicator(process_set).allreduce_async(
        [(source.array, target) for source, target in zip(sources, targets, strict=True)],
        name=name,
        op=op,
        prescale_factor=factors[0],
        postscale_factor=factors[1],
        fetch=partial(_fetch, sources) if any(d.type != "cpu" for d in devices) else None,
        store=None if direct else store,
    )
    if direct:
        return TensorHandle(handle, in_place)
    return TensorHandle(handle, _several if grouped else _one)


def sparse_allreduce_async(
    tensor: torch.Tensor,
    name: str | None,
    op: Any,
    process_set: ProcessSet = global_process_set,
) -> SparseHandle:
    """Start to add up, or to average, all ranks' sparse COO `tensor`.

    Args:
        tensor: indices may repeat and differ between ranks; equal shape on all ranks.
        name: ranks must give the same one.
        op: `Average` or `Sum`.
        process_set: whose ranks take part.

    Returns:
        Completes with a sparse tensor in which indices may repeat.

    Raises:
        ArgumentError: another `op`.
        UnsupportedError: `tensor` is not a sparse one, of the COO layout.
    """
    how = as_op(op)
    if how not in (Sum, Average):
        raise ArgumentError(f"sparse tensors can be summed or averaged, not combined by {how}")
    if not isinstance(tensor, torch.Tensor) or not tensor.is_sparse:
        raise UnsupportedError("sparse_allreduce_async takes a sparse COO tensor: see .to_sparse()")
    size, device = tensor.size(), tensor.device
    indices, values = tensor._indices().transpose(0, 1).contiguous(), tensor._values()
    among = communicator(process_set)

    def total(gathered: Sequence[Result]) -> torch.Tensor:
        everywhere, summands = _several(gathered)
        # Copies, in memory of torch's own: what is added in place to a sparse tensor resizes it.
        summands = summands / among.size if how is Average else summands.clone()
        everywhere = everywhere.transpose(0, 1).clone()
        return torch.sparse_coo_tensor(
            everywhere, summands, size, device=device, check_invariants=False
        )

    handle = _allgather(
        [indices, values],
        None if name is None else f"{name}.sparse",
        process_set,
        finish=total,
        parts=(("op", str(how)), ("size", str(tuple(size)))),
    )
    return SparseHandle(handle._handle, total)


# All-gather


def allgather_async(
    tensor: torch.Tensor,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start to join all ranks' `tensor` along the first dimension; see `allgather`."""
    return _allgather([tensor], name, process_set, finish=_one)


def grouped_allgather_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start to join all ranks' `tensors`, each with its like, all together."""
    return _allgather(tensors, name, process_set, finish=_several)


def _allgather(
    tensors: Sequence[torch.Tensor],
    name: str | None,
    process_set: ProcessSet,
    *,
    finish: Callable[[Any], Any],
    parts: Sequence[tuple[str, str]] = (),
) -> TensorHandle:
    def work(group: Group, array: NDArray[Any], label: str | None) -> NDArray[Any]:
        return collectives.allgather(group, array, name=label, algorithm="auto")

    return _start(
        "allgather", tensors, work, name, process_set, finish=finish, parts=parts, ragged=True
    )


# Broadcast


def broadcast_async(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start to fetch the root's `tensor` into a new one; see `broadcast`."""
    return _broadcast(tensor, None, root_rank, name, process_set)


def broadcast_async_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start to replace `tensor` by the root's; see `broadcast`."""
    return _broadcast(tensor, tensor, root_rank, name, process_set)


def _broadcast(
    tensor: torch.Tensor,
    into: torch.Tensor | None,
    root_rank: int,
    name: str | None,
    process_set: ProcessSet,
) -> TensorHandle:
    among = communicator(process_set)

    def work(group: Group, array: NDArray[Any], label: str | None) -> NDArray[Any]:
        if root_rank not in among.ranks:  # so it is on every rank: they agree on the root
            raise ArgumentError(
                f"root_rank {root_rank!r} is not a rank of the process set: {among.ranks}"
            )
        data = array if into is not None else array.copy()
        root = among.ranks.index(root_rank)
        collectives.broadcast(group, data, root=root, name=label, algorithm="auto")
        return data

    if into is not None:
        check_tensor(into, in_place=True)
    parts = (("root_rank", str(root_rank)),)
    return _start(
        "broadcast", [tensor], work, name, process_set, finish=_one, parts=parts, into=into
    )


# All-to-all, reduce-scatter


def alltoall_async(
    tensor: torch.Tensor,
    splits: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start to send rows to every rank; completes with the rows and splits received."""
    rows = splits.tolist() if isinstance(splits, torch.Tensor) else splits
    like = splits.dtype if isinstance(splits, torch.Tensor) else torch.int32

    def work(group: Group, array: NDArray[Any], label: str | None) -> Any:
        return collectives.alltoall(group, array, rows, name=label, algorithm="auto")

    def finish(found: Any) -> tuple[torch.Tensor, torch.Tensor]:
        result, counts = found
        return result.tensor(), torch.from_numpy(counts).to(like)

    return _start("alltoall", [tensor], work, name, process_set, finish=finish, ragged=True)


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> TensorHandle:
    """Start to combine all ranks' `tensor`, and to keep this rank's rows; see `reducescatter`."""
    factors = (prescale_factor, postscale_factor)
    return _reducescatter([tensor], name, op, process_set, factors, finish=_one)


def grouped_reducescatter_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> TensorHandle:
    """Start to combine all ranks' `tensors`, all together, and to keep this rank's rows."""
    factors = (prescale_factor, postscale_factor)
    return _reducescatter(tensors, name, op, process_set, factors, finish=_several)


def _reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None,
    op: Any,
    process_set: ProcessSet,
    factors: tuple[float, float],
    *,
    finish: Callable[[Any], Any],
) -> TensorHandle:
    prescale, postscale = factors

    def work(group: Group, array: NDArray[Any], label: str | None) -> NDArray[Any]:
        return collectives.reducescatter(
            group,
            array,
            op=op,
            name=label,
            prescale=prescale,
            postscale=postscale,
            algorithm="auto",
        )

    parts = (
        ("op", str(op)),
        ("prescale_factor", repr(prescale)),
        ("postscale_factor", repr(postscale)),
    )
    return _start("reducescatter", tensors, work, name, process_set, finish=finish, parts=parts)


# What they share


def _start(
    kind: str,
    tensors: Sequence[torch.Tensor],
    work: Callable[[Group, NDArray[Any], str | None], Any],
    name: str | None,
    process_set: ProcessSet,
    *,
    finish: Callable[[Any], Any],
    parts: Sequence[tuple[str, str]] = (),
    ragged: bool = False,
    into: torch.Tensor | None = None,
) -> TensorHandle:
    """Start an operation on each of `tensors` in turn, as one; `work` does it for one."""
    sources = [Source(tensor) for tensor in tensors]
    devices = [tensor.device for tensor in tensors]
    arrays = [
        source.array.reshape(1) if ragged and source.array.ndim == 0 else source.array
        for source in sources
    ]
    among: Communicator = communicator(process_set)

    def everything(group: Group) -> list[Any]:
        if len(arrays) == 1 or name is None:
            return [work(group, array, name) for array in arrays]
        return [work(group, array, f"{name}.{i}") for i, array in enumerate(arrays)]

    def store(found: list[Any]) -> Any:
        if kind == "alltoall":
            ((rows, counts),) = found
            return Result(rows, devices[0]), counts
        return [Result(array, device, into) for array, device in zip(found, devices, strict=True)]

    handle = among.start(
        kind,
        arrays,
        everything,
        name=name,
        parts=parts,
        ragged=ragged,
        fetch=partial(_fetch, sources),
        store=store,
    )
    return TensorHandle(handle, finish)


def _fetch(sources: Sequence[Source]) -> None:
    for source in sources:
        source.fetch()


def _one(results: Sequence[Result]) -> torch.Tensor:
    return results[0].tensor()


def _several(results: Sequence[Result]) -> list[torch.Tensor]:
    return [result.tensor() for result in results]
