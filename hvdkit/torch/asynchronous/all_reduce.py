"""All-reduce of tensors, started and awaited apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from hvdkit.api import communicator
from hvdkit.dtypes import as_reduction
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.torch.asynchronous.handles import TensorHandle
from hvdkit.torch.asynchronous.starting import fetch, one, several
from hvdkit.torch.convert import check_tensor
from hvdkit.torch.ports import Result, Source, new_array


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
        fetch=partial(fetch, sources) if any(d.type != "cpu" for d in devices) else None,
        store=None if direct else store,
    )
    if direct:
        return TensorHandle(handle, in_place)
    return TensorHandle(handle, several if grouped else one)
