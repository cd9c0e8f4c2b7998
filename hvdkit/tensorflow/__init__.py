"""hvdkit for TensorFlow 2: ``import hvdkit.tensorflow as hvd``, in place of Horovod's.

The collectives on tensors and variables, eager and inside tf.function; and tapes and optimizers
that combine all ranks' gradients in buckets, while backward still runs.
"""

import importlib
from typing import Any

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
from hvdkit.tensorflow.all_reduce import allreduce, grouped_allreduce
from hvdkit.tensorflow.collectives import barrier, join
from hvdkit.tensorflow.compression import Compression
from hvdkit.tensorflow.movements import (
    allgather,
    alltoall,
    broadcast,
    grouped_allgather,
    grouped_reducescatter,
    reducescatter,
)
from hvdkit.tensorflow.numbers import (
    local_rank_op,
    local_size_op,
    process_set_included_op,
    rank_op,
    size_op,
)
from hvdkit.tensorflow.optimizer import DistributedOptimizer
from hvdkit.tensorflow.state import (
    allgather_object,
    broadcast_,
    broadcast_global_variables,
    broadcast_object,
    broadcast_object_fn,
    broadcast_variables,
)
from hvdkit.tensorflow.tape import DistributedGradientTape, PartialDistributedGradientTape

#: What needs Keras, with whatever backend that has: imported when it is asked for.
_WITH_KERAS = {
    "PipelineModel": "hvdkit.tensorflow.pipeline",
    "Pop": "hvdkit.tensorflow.pipeline",
    "Stash": "hvdkit.tensorflow.pipeline",
    "SyncBatchNormalization": "hvdkit.tensorflow.sync_batch_norm",
}


def __getattr__(name: str) -> Any:
    """Import what was not imported at first."""
    if name not in _WITH_KERAS:
        refuse_name(__name__, name)
    return getattr(importlib.import_module(_WITH_KERAS[name]), name)


__all__ = [
    "Adasum",
    "ArgumentError",
    "Average",
    "CheckpointError",
    "Compression",
    "ConfigError",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "HorovodInternalError",
    "HvdkitError",
    "LauncherError",
    "Max",
    "Mesh",
    "Min",
    "MismatchError",
    "MissingError",
    "NotInitializedError",
    "PartialDistributedGradientTape",
    "PeerError",
    "PipelineModel",
    "Pop",
    "ProcessSet",
    "Product",
    "ReduceOp",
    "StallError",
    "Stash",
    "Sum",
    "SyncBatchNormalization",
    "UnsupportedError",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_object_fn",
    "broadcast_variables",
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
    "grouped_allreduce",
    "grouped_reducescatter",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_rank_op",
    "local_size",
    "local_size_op",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "process_set_included_op",
    "rank",
    "rank_op",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "run",
    "shutdown",
    "size",
    "size_op",
    "start_timeline",
    "stats",
    "stop_timeline",
]
