"""All-gather, broadcast, all-to-all and reduce-scatter of tensors, started and awaited apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from hvdkit import collectives
from hvdkit.api import communicator
from hvdkit.collectives.group import Group
from hvdkit.dtypes import Average
from hvdkit.engine.handles import Handle
from hvdkit.errors import ArgumentError
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.torch.asynchronous.handles import TensorHandle
from hvdkit.torch.asynchronous.starting import one, several, start
from hvdkit.torch.convert import check_tensor

# All-gather


def allgather_async(
    tensor: torch.Tensor,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start to join all ranks' `tensor` along the first dimension; see `allgather`."""
    return TensorHandle(start_allgather([tensor], name, process_set), one)


def grouped_allgather_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start to join all ranks' `tensors`, each with its like, all together."""
    return TensorHandle(start_allgather(tensors, name, process_set), several)


def start_allgather(
    tensors: Sequence[torch.Tensor],
    name: str | None,
    process_set: ProcessSet,
    *,
    parts: Sequence[tuple[str, str]] = (),
) -> Handle[Any]:
    """Start to join all ranks' `tensors`; ranks must have `parts` equal as well."""

    def work(group: Group, array: NDArray[Any], label: str | None) -> NDArray[Any]:
        return collectives.allgather(group, array, name=label, algorithm="auto")

    return start("allgather", tensors, work, name, process_set, parts=parts, ragged=True)


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
    handle = start("broadcast", [tensor], work, name, process_set, parts=parts, into=into)
    return TensorHandle(handle, one)


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

    handle = start("alltoall", [tensor], work, name, process_set, ragged=True)
    return TensorHandle(handle, finish)


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
    return TensorHandle(_start_reducescatter([tensor], name, op, process_set, factors), one)


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
    return TensorHandle(_start_reducescatter(tensors, name, op, process_set, factors), several)


def _start_reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None,
    op: Any,
    process_set: ProcessSet,
    factors: tuple[float, float],
) -> Handle[Any]:
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
    return start("reducescatter", tensors, work, name, process_set, parts=parts)
