"""hvdkit for PyTorch: ``import hvdkit.torch as hvd``, in place of ``horovod.torch``.

The collectives on CPU tensors without copying them, and on CUDA tensors; by name and by order; and
a `DistributedOptimizer` that averages gradients in buckets while backward still runs.
"""

from typing import TYPE_CHECKING, NoReturn

from hvdkit.api import (
    add_process_set,
    cross_rank,
    cross_size,
    init,
    is_initialized,
    local_rank,
    local_size,
    rank,
    remove_process_set,
    shutdown,
    size,
    start_timeline,
    stats,
    stop_timeline,
)
from hvdkit.array_collectives import allgather_object, broadcast_object
from hvdkit.dtypes import (
    Adasum,
    Average,
    Max,
    Min,
    Product,
    ReduceOp,
    Sum,
)
from hvdkit.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    HorovodInternalError,
    HvdkitError,
    InFlightError,
    LauncherError,
    MismatchError,
    MissingError,
    NotInitializedError,
    PeerError,
    StallError,
    UnsupportedError,
)
from hvdkit.launch.run import run
from hvdkit.missing import refuse_name
from hvdkit.parallel.mesh import Mesh
from hvdkit.process_sets import (
    ProcessSet,
    global_process_set,
)
from hvdkit.queries import (
    ccl_built,
    check_extension,
    cuda_built,
    ddl_built,
    gloo_built,
    gloo_enabled,
    is_homogeneous,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rocm_built,
)
from hvdkit.torch.all_reduce import allreduce, allreduce_, grouped_allreduce, grouped_allreduce_
from hvdkit.torch.asynchronous.all_reduce import (
    allreduce_async,
    allreduce_async_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
)
from hvdkit.torch.asynchronous.handles import poll, synchronize
from hvdkit.torch.asynchronous.movements import (
    allgather_async,
    alltoall_async,
    broadcast_async,
    broadcast_async_,
    grouped_allgather_async,
    grouped_reducescatter_async,
    reducescatter_async,
)
from hvdkit.torch.asynchronous.sparse import sparse_allreduce_async
from hvdkit.torch.collectives import barrier, join
from hvdkit.torch.compression import Compression
from hvdkit.torch.movements import (
    allgather,
    alltoall,
    broadcast,
    broadcast_,
    grouped_allgather,
    grouped_reducescatter,
    reducescatter,
)
from hvdkit.torch.optimizer import DistributedOptimizer
from hvdkit.torch.pipeline import PipelineModule, Pop, Stash
from hvdkit.torch.state import broadcast_optimizer_state, broadcast_parameters
from hvdkit.torch.sync_batch_norm import SyncBatchNorm

if not TYPE_CHECKING:  # to a type checker any name would be known

    def __getattr__(name: str) -> NoReturn:
        """Say what to do without it, if it is something of Horovod's."""
        refuse_name(__name__, name)


__all__ = [
    "Adasum",
    "ArgumentError",
    "Average",
    "CheckpointError",
    "Compression",
    "ConfigError",
    "DistributedOptimizer",
    "HorovodInternalError",
    "HvdkitError",
    "InFlightError",
    "LauncherError",
    "Max",
    "Mesh",
    "Min",
    "MismatchError",
    "MissingError",
    "NotInitializedError",
    "PeerError",
    "PipelineModule",
    "Pop",
    "ProcessSet",
    "Product",
    "ReduceOp",
    "StallError",
    "Stash",
    "Sum",
    "SyncBatchNorm",
    "UnsupportedError",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "check_extension",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "poll",
    "rank",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "rocm_built",
    "run",
    "shutdown",
    "size",
    "sparse_allreduce_async",
    "start_timeline",
    "stats",
    "stop_timeline",
    "synchronize",
]
