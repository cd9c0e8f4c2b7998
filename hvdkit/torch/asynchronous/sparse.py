"""All-reduce of sparse tensors: all ranks' indices and values, gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hvdkit.api import communicator
from hvdkit.dtypes import Average, Sum, as_op
from hvdkit.errors import ArgumentError, UnsupportedError
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.torch.asynchronous.handles import TensorHandle
from hvdkit.torch.asynchronous.movements import start_allgather
from hvdkit.torch.asynchronous.starting import several
from hvdkit.torch.ports import Result


class SparseHandle(TensorHandle):
    """One of `sparse_allreduce_async`, which scripts for Horovod call to have the result."""

    __slots__ = ()

    def __call__(self) -> Any:
        """Return the result.  Blocking."""
        return self.wait()


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
        everywhere, summands = several(gathered)
        # Copies, in memory of torch's own: what is added in place to a sparse tensor resizes it.
        summands = summands / among.size if how is Average else summands.clone()
        everywhere = everywhere.transpose(0, 1).clone()
        return torch.sparse_coo_tensor(
            everywhere, summands, size, device=device, check_invariants=False
        )

    handle = start_allgather(
        [indices, values],
        None if name is None else f"{name}.sparse",
        process_set,
        parts=(("op", str(how)), ("size", str(tuple(size)))),
    )
    return SparseHandle(handle, total)
