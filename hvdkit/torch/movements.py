"""All-gather, broadcast, all-to-all and reduce-scatter of tensors.

They are each other's gradients; see `hvdkit.torch.collectives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hvdkit.api import communicator
from hvdkit.api import rank as global_rank
from hvdkit.dtypes import Average, ReduceOp, as_op
from hvdkit.engine.communicator import Communicator
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.torch import direct
from hvdkit.torch.all_reduce import allreduce
from hvdkit.torch.collectives import apply_function, differentiable, moved, numbered
from hvdkit.torch.compression import Compression
from hvdkit.torch.convert import array_of, check_tensor
from hvdkit.torch.ports import Result, Source

# All-gather


def allgather(
    tensor: torch.Tensor,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Return all ranks' `tensor` joined along the first dimension.  Collective, blocking.

    Args:
        tensor: its first dimension may differ between ranks.  A scalar counts as one row.
        name, process_set, algorithm: as in `allreduce`.

    Raises:
        MismatchError, ArgumentError, UnsupportedError, PeerError: as `allreduce`.
    """
    if differentiable(tensor):
        result: torch.Tensor = apply_function(_Allgather, tensor, name, process_set, algorithm)
        return result
    return _allgather(tensor, name, process_set, algorithm)


def grouped_allgather(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """Return all ranks' `tensors`, each joined with its like.  Collective, blocking."""
    return [
        allgather(tensor, numbered(name, number), process_set)
        for number, tensor in enumerate(tensors)
    ]


def _allgather(
    tensor: torch.Tensor, name: str | None, process_set: ProcessSet, algorithm: str
) -> torch.Tensor:
    if direct.moves(tensor, algorithm):
        return direct.allgather(communicator(process_set), tensor, name)
    return moved(tensor, process_set, Communicator.allgather, name=name, algorithm=algorithm)


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, name: str | None, process_set: ProcessSet, algorithm: str
    ) -> torch.Tensor:
        ctx.shape, ctx.process_set = tensor.shape, process_set
        return _allgather(tensor, name, process_set, algorithm)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        among = communicator(ctx.process_set)
        rows = ctx.shape[0] if ctx.shape else 1
        everyone = among.allgather(np.array([rows], np.int64), name="allgather.gradient.rows")
        begin = int(everyone[: among.rank].sum())
        mean = _mean(gradients[0], "allgather.gradient", ctx.process_set)
        return mean[begin : begin + rows].reshape(ctx.shape), None, None, None


# Broadcast


def broadcast(
    tensor: torch.Tensor,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Return the root's `tensor` as a new tensor on every rank.  Collective, blocking.

    Args:
        tensor: equal shape and dtype on all ranks.
        root_rank: the rank whose `tensor` it is, counted among all ranks.
        name, process_set, algorithm: as in `allreduce`.

    Raises:
        MismatchError, ArgumentError, UnsupportedError, PeerError: as `allreduce`.
    """
    if differentiable(tensor):
        result: torch.Tensor = apply_function(
            _Broadcast, tensor, root_rank, name, process_set, algorithm
        )
        return result
    return _broadcast(tensor, root_rank, name, process_set, algorithm)


def broadcast_(
    tensor: torch.Tensor,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Replace `tensor` by the root's, and return it.  Collective, blocking."""
    check_tensor(tensor, in_place=True)
    if direct.moves(tensor, algorithm):
        return direct.broadcast_(communicator(process_set), tensor, root_rank, name)
    if not tensor.is_cuda:
        communicator(process_set).broadcast(
            array_of(tensor), root_rank, name=name, algorithm=algorithm, in_place=True
        )
        return tensor
    source = Source(tensor)
    source.fetch()
    communicator(process_set).broadcast(
        source.array, root_rank, name=name, algorithm=algorithm, in_place=True
    )
    return Result(source.array, tensor.device, tensor).tensor()


def _broadcast(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None,
    process_set: ProcessSet,
    algorithm: str,
) -> torch.Tensor:
    if direct.moves(tensor, algorithm):
        copy = tensor.detach().resolve_conj().resolve_neg().clone()
        return direct.broadcast_(communicator(process_set), copy, root_rank, name)
    return moved(
        tensor,
        process_set,
        Communicator.broadcast,
        root_rank=root_rank,
        name=name,
        algorithm=algorithm,
    )


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, root_rank: int, *rest: Any) -> torch.Tensor:
        ctx.root_rank, ctx.process_set = root_rank, rest[1]
        return _broadcast(tensor, root_rank, *rest)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        mean = _mean(gradients[0], "broadcast.gradient", ctx.process_set)
        if global_rank() != ctx.root_rank:
            # What is differentiated again must visit all ranks again.
            mean = mean * 0 if mean.requires_grad else torch.zeros_like(mean)
        return mean, None, None, None, None


# All-to-all


def alltoall(
    tensor: torch.Tensor,
    splits: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    algorithm: str = "auto",
) -> Any:
    """Send rows of `tensor` to every rank, and return the rows received.  Collective, blocking.

    Args:
        tensor: the rows for rank 0 come first, then those for rank 1, and so on.
        splits: how many rows go to each rank, a tensor or a list; None: equally many.
        name, process_set, algorithm: as in `allreduce`.

    Returns:
        The rows received, in rank order; with `splits` also a tensor of how many came from each.

    Raises:
        MismatchError, ArgumentError, UnsupportedError, PeerError: as `allreduce`.
    """
    if differentiable(tensor):
        found = apply_function(_Alltoall, tensor, splits, name, process_set, algorithm)
    else:
        found = _alltoall(tensor, splits, name, process_set, algorithm)
    return found[0] if splits is None else found


def _alltoall(
    tensor: torch.Tensor, splits: Any, name: str | None, process_set: ProcessSet, algorithm: str
) -> tuple[torch.Tensor, torch.Tensor]:
    as_given = isinstance(splits, torch.Tensor)
    source = Source(tensor)
    source.fetch()
    rows, counts = communicator(process_set).alltoall(
        source.array, splits.tolist() if as_given else splits, name=name, algorithm=algorithm
    )
    received = torch.from_numpy(counts).to(splits.dtype if as_given else torch.int32)
    return Result(rows, tensor.device).tensor(), received


class _Alltoall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, *rest: Any) -> Any:
        ctx.process_set = rest[2]
        rows, received = _alltoall(tensor, *rest)
        ctx.received = received
        ctx.mark_non_differentiable(received)
        return rows, received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        back, _ = alltoall(gradients[0], ctx.received, "alltoall.gradient", ctx.process_set)
        return back, None, None, None, None


# Reduce-scatter


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Return this rank's rows of the combination of all ranks' `tensor`.  Collective, blocking.

    Args:
        tensor: of at least one dimension; equal shape and dtype on all ranks.  Its rows are shared
            out in order; the first ranks get one more where they do not divide.
        op: `Average`, `Sum`, `Min`, `Max` or `Product`.
        name, compression, process_set, prescale_factor, postscale_factor: as in `allreduce`.
        algorithm: as in `hvdkit.reducescatter`.

    Raises:
        MismatchError, ArgumentError, UnsupportedError, PeerError: as `allreduce`.
    """
    how = (op, name, prescale_factor, postscale_factor, algorithm)
    packed, form = compression.compress(tensor)
    if differentiable(packed):
        result = apply_function(_Reducescatter, packed, how, process_set)
    else:
        result = _reducescatter(packed, how, process_set)
    unpacked: torch.Tensor = compression.decompress(result, form)
    return unpacked


def grouped_reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """Return this rank's rows of the combinations of all ranks' `tensors`.  Blocking."""
    return [
        reducescatter(
            tensor,
            numbered(name, number),
            compression,
            op,
            process_set,
            prescale_factor,
            postscale_factor,
        )
        for number, tensor in enumerate(tensors)
    ]


def _reducescatter(
    tensor: torch.Tensor, how: tuple[Any, str | None, float, float, str], process_set: ProcessSet
) -> torch.Tensor:
    op, name, prescale, postscale, algorithm = how
    return moved(
        tensor,
        process_set,
        Communicator.reducescatter,
        op=op,
        name=name,
        prescale_factor=prescale,
        postscale_factor=postscale,
        algorithm=algorithm,
    )


class _Reducescatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, how: Any, process_set: ProcessSet) -> torch.Tensor:
        ctx.how, ctx.process_set = how, process_set
        return _reducescatter(tensor, how, process_set)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        op, _, prescale, postscale, _ = ctx.how
        among = communicator(ctx.process_set)
        factor = prescale * postscale * (among.size if as_op(op) is ReduceOp.SUM else 1)
        whole = allgather(gradients[0] * factor, "reducescatter.gradient", ctx.process_set)
        return whole, None, None


# What they share


def _mean(tensor: torch.Tensor, name: str, process_set: ProcessSet) -> torch.Tensor:
    return allreduce(tensor, name=name, op=Average, process_set=process_set)
