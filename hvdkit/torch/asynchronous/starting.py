"""What the asynchronous collectives share: tensors on their way into the core, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray

from hvdkit.api import communicator
from hvdkit.collectives.group import Group
from hvdkit.engine.communicator import Communicator
from hvdkit.engine.handles import Handle
from hvdkit.process_sets import ProcessSet
from hvdkit.torch.ports import Result, Source


def start(
    kind: str,
    tensors: Sequence[torch.Tensor],
    work: Callable[[Group, NDArray[Any], str | None], Any],
    name: str | None,
    process_set: ProcessSet,
    *,
    parts: Sequence[tuple[str, str]] = (),
    ragged: bool = False,
    into: torch.Tensor | None = None,
) -> Handle[Any]:
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

    return among.start(
        kind,
        arrays,
        everything,
        name=name,
        parts=parts,
        ragged=ragged,
        fetch=partial(fetch, sources),
        store=store,
    )


def fetch(sources: Sequence[Source]) -> None:
    """Bring the tensors to where the core reads them."""
    for source in sources:
        source.fetch()


def one(results: Sequence[Result]) -> torch.Tensor:
    """Return the tensor of an operation on one."""
    return results[0].tensor()


def several(results: Sequence[Result]) -> list[torch.Tensor]:
    """Return the tensors of an operation on several."""
    return [result.tensor() for result in results]
