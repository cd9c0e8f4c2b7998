"""The collectives on CPU tensors: those of `hvdkit`, over the tensors' own memory.

Arguments, results and errors are those of the functions of the same name in `hvdkit`, with tensors
for arrays.  Results carry no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdkit.api import context
from hvdkit.dtypes import Average
from hvdkit.torch.convert import array_of, tensor_of


def allreduce(
    tensor: torch.Tensor,
    *,
    op: object = Average,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Return the combination of all ranks' `tensor` as a new tensor.  Collective, blocking."""
    return tensor_of(
        context().allreduce(
            array_of(tensor),
            op=op,
            name=name,
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            algorithm=algorithm,
        )
    )


def allreduce_(
    tensor: torch.Tensor,
    *,
    op: object = Average,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Replace `tensor` by the combination of all ranks', and return it.  Collective, blocking."""
    context().allreduce(
        array_of(tensor, in_place=True),
        op=op,
        name=name,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        algorithm=algorithm,
        in_place=True,
    )
    return tensor


def allgather(
    tensor: torch.Tensor, *, name: str | None = None, algorithm: str = "auto"
) -> torch.Tensor:
    """Return all ranks' `tensor` joined along the first dimension.  Collective, blocking."""
    return tensor_of(context().allgather(array_of(tensor), name=name, algorithm=algorithm))


def reducescatter(
    tensor: torch.Tensor,
    *,
    op: object = Average,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Return this rank's rows of the combination of all ranks' `tensor`.  Collective, blocking."""
    return tensor_of(
        context().reducescatter(
            array_of(tensor),
            op=op,
            name=name,
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            algorithm=algorithm,
        )
    )


def broadcast(
    tensor: torch.Tensor,
    root_rank: int = 0,
    *,
    name: str | None = None,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Return the root's `tensor` as a new tensor on every rank.  Collective, blocking."""
    return tensor_of(
        context().broadcast(array_of(tensor), root_rank, name=name, algorithm=algorithm)
    )


def broadcast_(
    tensor: torch.Tensor,
    root_rank: int = 0,
    *,
    name: str | None = None,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Replace `tensor` by the root's, and return it.  Collective, blocking."""
    context().broadcast(
        array_of(tensor, in_place=True), root_rank, name=name, algorithm=algorithm, in_place=True
    )
    return tensor


def alltoall(
    tensor: torch.Tensor,
    splits: Sequence[int] | torch.Tensor | None = None,
    *,
    name: str | None = None,
    algorithm: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Send rows of `tensor` to every rank; return the rows received.  Collective, blocking.

    With `splits`, also return how many rows came from each rank.
    """
    rows = splits.tolist() if isinstance(splits, torch.Tensor) else splits
    received, counts = context().alltoall(array_of(tensor), rows, name=name, algorithm=algorithm)
    if splits is None:
        return tensor_of(received)
    return tensor_of(received), tensor_of(counts)
