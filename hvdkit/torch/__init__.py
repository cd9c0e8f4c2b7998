"""hvdkit for PyTorch: ``import hvdkit.torch as hvd``.

The collectives on CPU tensors, without copying them, and a `DistributedOptimizer` that averages
gradients in buckets while backward still runs.
"""

from hvdkit.api import (
    barrier,
    broadcast_object,
    cross_rank,
    cross_size,
    init,
    is_initialized,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
)
from hvdkit.dtypes import Average, Max, Min, Product, ReduceOp, Sum
from hvdkit.errors import (
    ArgumentError,
    ConfigError,
    HvdkitError,
    LauncherError,
    MismatchError,
    NotInitializedError,
    PeerError,
    UnsupportedError,
)
from hvdkit.torch.collectives import (
    allgather,
    allreduce,
    allreduce_,
    alltoall,
    broadcast,
    broadcast_,
    reducescatter,
)
from hvdkit.torch.optimizer import DistributedOptimizer
from hvdkit.torch.state import broadcast_optimizer_state, broadcast_parameters

__all__ = [
    "ArgumentError",
    "Average",
    "ConfigError",
    "DistributedOptimizer",
    "HvdkitError",
    "LauncherError",
    "Max",
    "Min",
    "MismatchError",
    "NotInitializedError",
    "PeerError",
    "Product",
    "ReduceOp",
    "Sum",
    "UnsupportedError",
    "allgather",
    "allreduce",
    "allreduce_",
    "alltoall",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "cross_rank",
    "cross_size",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "reducescatter",
    "shutdown",
    "size",
]
