"""What the synchronous collectives on tensors share, and those without data.

Names, arguments and defaults are Horovod's, `algorithm` is added.  They are matched between ranks
by the order in which they are called, and run on the calling thread.

Gradients are Horovod's, made for parameters whose gradients are averaged over ranks afterwards:

    forward            backward, of all ranks' gradients of the outputs
    allreduce          their all-reduce, with the same op and factors
    allgather          this rank's rows of their average
    broadcast          their average on the root, zeros elsewhere
    alltoall           the rows go back to where they came from
    reducescatter      their all-gather, times the factors; times the number of ranks for a Sum

Only Average and Sum are derivatives; Min, Max, Product and Adasum of gradients are what Horovod
makes of these.  Backward is differentiable itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hvdkit.api import communicator, context
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.torch.convert import check_tensor
from hvdkit.torch.ports import Result, Source


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return when every rank of the set has called.  Collective, blocking.

    Raises:
        MismatchError, PeerError: as `allreduce`.
    """
    communicator(process_set).barrier()


def join(device: Any = -1) -> int:
    """Take part in the others' calls, having no more data, until every rank joins.  Collective.

    Until then the others can all-reduce, to which this rank adds nothing (averages are still over
    all ranks), and wait at barriers; for other collectives they get an error.

    Args:
        device: without effect, for nothing is allocated there; Horovod's scripts pass it.

    Returns:
        The rank that joined last.
    """
    del device
    return context().join()


def differentiable(tensor: Any) -> bool:
    """Return whether autograd wants to know.

    Raises:
        UnsupportedError: not a dense tensor on the CPU or a CUDA device.
    """
    check_tensor(tensor)
    return bool(tensor.requires_grad and torch.is_grad_enabled())


def apply_function(function: Any, *arguments: Any) -> Any:
    """Call an autograd function, of which torch gives no types."""
    return function.apply(*arguments)


def moved(
    tensor: torch.Tensor, process_set: ProcessSet, collective: Callable[..., Any], **how: Any
) -> torch.Tensor:
    """Return the result of a collective that makes a new array of `tensor`."""
    source = Source(tensor)
    source.fetch()
    result = collective(communicator(process_set), source.array, **how)
    return Result(result, tensor.device).tensor()


def numbered(name: str | None, number: int) -> str | None:
    return None if name is None else f"{name}.{number}"
