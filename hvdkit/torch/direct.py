"""CUDA tensors in the MPI library's own hands: ``algorithm="mpi"`` where the library can do that.

    current stream    ... computes x |                    | goes on with x
    thread                           waits | MPI's call ---+

MPI knows no streams: the thread waits for the current one first, and the call returns when the
library has done all.  Ranks that stage their tensors make the same MPI calls, and can take part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from hvdkit import collectives
from hvdkit.api import context
from hvdkit.collectives.allreduce import allreduce_on_device
from hvdkit.collectives.group import Group
from hvdkit.collectives.reduction import Reduction
from hvdkit.dtypes import Average, Max, Min, Product, Sum
from hvdkit.engine.communicator import Communicator
from hvdkit.torch.convert import numpy_dtype
from hvdkit.torch.ports import on_stream
from hvdkit.transport.device import DeviceArray
from hvdkit.transport.opening import load_mpi

T = TypeVar("T")

#: As what MPI reduces floats of which it does not know.
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def moves(tensor: torch.Tensor, algorithm: str) -> bool:
    """Return whether the MPI library moves `tensor` from and to the device's memory."""
    if algorithm != "mpi" or not tensor.is_cuda or context().kind != "mpi":
        return False
    told = context().config.cuda_aware
    return bool(load_mpi().cuda_aware() if told is None else told)


def reduces(tensor: torch.Tensor, op: Any, algorithm: str) -> bool:
    """Return whether the MPI library reduces `tensor` in the device's memory."""
    known = (Average, Sum, Min, Max, Product)
    return moves(tensor, algorithm) and tensor.is_floating_point() and op in known


def allreduce(
    among: Communicator, tensor: torch.Tensor, how: Any, *, in_place: bool
) -> torch.Tensor:
    """Return the combination of all ranks' `tensor`: itself if `in_place`, else a new tensor.

    Args:
        among: the ranks.
        tensor: floating-point, of any strides.
        how: op, name, prescale and postscale factors, algorithm.
        in_place: whether `tensor` is replaced.
    """
    op, name, prescale, postscale, algorithm = how
    plain = tensor.detach()
    dtype = _WIDE.get(tensor.dtype, tensor.dtype)
    data = plain

    def prepare(plan: Reduction) -> DeviceArray:
        nonlocal data
        if not (in_place and plain.is_contiguous() and plain.dtype == dtype):
            data = plain.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if plan.prescale != 1.0:
            data.mul_(plan.prescale)
        return _ready(data)

    plan = _run(
        among,
        tensor,
        lambda group: allreduce_on_device(
            group,
            DeviceArray(0, tuple(tensor.shape), numpy_dtype(tensor.dtype)),
            prepare,
            op=op,
            name=name,
            prescale=prescale,
            postscale=postscale,
            algorithm=algorithm,
        ),
    )
    if plan.divisor != 1:
        data.div_(plan.divisor)
    if plan.postscale != 1.0:
        data.mul_(plan.postscale)
    if not in_place:
        return data.to(tensor.dtype)
    if data is not plain:
        plain.copy_(data)
    return tensor


def broadcast_(
    among: Communicator, tensor: torch.Tensor, root_rank: int, name: str | None
) -> torch.Tensor:
    """Replace `tensor`, of any strides, by the root's, and return it."""
    plain = tensor.detach()
    data = plain.contiguous()
    how: dict[str, Any] = {"root": among.place_of(root_rank), "name": name, "algorithm": "mpi"}
    _run(among, tensor, lambda group: collectives.broadcast(group, _ready(data), **how))
    if data.data_ptr() != plain.data_ptr():
        plain.copy_(data)
    return tensor


def allgather(among: Communicator, tensor: torch.Tensor, name: str | None) -> torch.Tensor:
    """Return all ranks' `tensor`, of any strides, joined along the first dimension."""
    data = tensor.detach().resolve_conj().resolve_neg().contiguous()
    result = data

    def allocate(shape: tuple[int, ...], _: np.dtype[Any]) -> DeviceArray:
        nonlocal result
        result = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        return _ready(result)  # work that had the memory before is waited for as well

    _run(
        among,
        tensor,
        lambda group: collectives.allgather(
            group, _ready(data), name=name, algorithm="mpi", allocate=allocate
        ),
    )
    return result


def _run(among: Communicator, tensor: torch.Tensor, work: Callable[[Group], T]) -> T:
    """Return ``work(group)``, the next synchronous call, for which `tensor`'s device is chosen."""
    stream = torch.cuda.current_stream(tensor.device)

    def on_device(group: Group) -> T:
        with on_stream(stream):  # this may be another thread
            return work(group)

    return among.call(on_device)


def _ready(tensor: torch.Tensor) -> DeviceArray:
    """Return the memory of a contiguous tensor when the current stream has come so far."""
    torch.cuda.current_stream(tensor.device).synchronize()
    return DeviceArray(tensor.data_ptr(), tuple(tensor.shape), numpy_dtype(tensor.dtype))
