"""All-reduce of tensors; see `hvdkit.torch.collectives`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hvdkit.api import communicator
from hvdkit.dtypes import as_reduction
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.torch import direct
from hvdkit.torch.collectives import apply_function, differentiable, numbered
from hvdkit.torch.compression import Compression
from hvdkit.torch.convert import array_of, check_tensor, tensor_of
from hvdkit.torch.ports import Result, Source


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Return the combination of all ranks' `tensor` as a new tensor.  Collective, blocking.

    Args:
        tensor: equal shape and dtype on all ranks; any dtype but quantized and float8.
        average: deprecated, Horovod's older way to say `op`.
        name: named in errors; ranks must give the same one.
        compression: `Compression.none`, ``fp16`` or ``bf16``: as what the tensor travels.
        op: `Average` (the default), `Sum`, `Min`, `Max`, `Product` or `Adasum`.
        prescale_factor: multiplies each contribution first.
        postscale_factor: multiplies the result last.
        process_set: whose ranks take part.
        algorithm: as in `hvdkit.allreduce`.

    Raises:
        MismatchError: on every rank, showing what each had, if ranks disagree.
        ArgumentError, UnsupportedError: what cannot be; the other ranks get a MismatchError.
        PeerError: another rank died.
    """
    op = as_reduction(op, average)
    how = (op, name, prescale_factor, postscale_factor, algorithm)
    packed, form = compression.compress(tensor)
    if differentiable(packed):
        result = apply_function(_Allreduce, packed, how, process_set)
    else:
        result = _allreduce(packed, how, process_set)
    unpacked: torch.Tensor = compression.decompress(result, form)
    return unpacked


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Replace `tensor` by the combination of all ranks', and return it.  Collective, blocking."""
    how = (as_reduction(op, average), name, prescale_factor, postscale_factor, algorithm)
    return _allreduce(tensor, how, process_set, in_place=True)


def grouped_allreduce(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """Return the combinations of all ranks' `tensors`, in order.  Collective, blocking."""
    return [
        allreduce(
            tensor,
            average,
            numbered(name, number),
            compression,
            op,
            prescale_factor,
            postscale_factor,
            process_set,
        )
        for number, tensor in enumerate(tensors)
    ]


def grouped_allreduce_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """Replace `tensors` by the combinations of all ranks', and return them.  Blocking."""
    return [
        allreduce_(
            tensor,
            average,
            numbered(name, number),
            op,
            prescale_factor,
            postscale_factor,
            process_set,
        )
        for number, tensor in enumerate(tensors)
    ]


def _allreduce(
    tensor: torch.Tensor,
    how: tuple[Any, str | None, float, float, str],
    process_set: ProcessSet,
    *,
    in_place: bool = False,
) -> torch.Tensor:
    among = communicator(process_set)
    if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
        check_tensor(tensor, in_place=in_place)
        if direct.reduces(tensor, how[0], how[-1]):
            return direct.allreduce(among, tensor, how, in_place=in_place)
        source = Source(tensor)
        source.fetch()
        among.allreduce(source.array, *how, in_place=True)
        return Result(source.array, tensor.device, tensor if in_place else None).tensor()
    result = among.allreduce(array_of(tensor, in_place=in_place), *how, in_place=in_place)
    return tensor if in_place else tensor_of(result)


class _Allreduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, how: Any, process_set: ProcessSet) -> torch.Tensor:
        ctx.how, ctx.process_set = how, process_set
        return _allreduce(tensor, how, process_set)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        op, name, prescale, postscale, algorithm = ctx.how
        reduced = allreduce(
            gradients[0],
            name=None if name is None else f"{name}.gradient",
            op=op,
            prescale_factor=prescale,
            postscale_factor=postscale,
            process_set=ctx.process_set,
            algorithm=algorithm,
        )
        return reduced, None, None
