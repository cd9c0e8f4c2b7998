"""hvdkit for Keras 3: ``import hvdkit.keras as hvd``, in place of ``horovod.keras``.

A `DistributedOptimizer` for every optimizer of Keras, callbacks for ``fit``, and collectives on
values; with Keras's TensorFlow backend or its torch backend, whichever is set.
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
from hvdkit.array_collectives import allgather_object, broadcast_object, join
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
from hvdkit.keras import callbacks
from hvdkit.keras.models import load_model
from hvdkit.keras.optimizer import (
    Compression,
    DistributedOptimizer,
    PartialDistributedOptimizer,
)
from hvdkit.keras.values import (
    allgather,
    allreduce,
    broadcast,
    broadcast_global_variables,
    broadcast_variables,
    reducescatter,
)
from hvdkit.launch.run import run
from hvdkit.missing import refuse_name
from hvdkit.process_sets import (
    ProcessSet,
    global_process_set,
)
from hvdkit.queries import (
    ccl_built,
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

if not TYPE_CHECKING:  # to a type checker any name would be known

    def __getattr__(name: str) -> NoReturn:
        """Say what to do without it, if it is something of Horovod's."""
        refuse_name(__name__, name)


__all__ = [
    "Adasum",
    "ArgumentError",
    "Average",
    "Compression",
    "ConfigError",
    "DistributedOptimizer",
    "HorovodInternalError",
    "HvdkitError",
    "InFlightError",
    "LauncherError",
    "Max",
    "Min",
    "MismatchError",
    "MissingError",
    "NotInitializedError",
    "PartialDistributedOptimizer",
    "PeerError",
    "ProcessSet",
    "Product",
    "ReduceOp",
    "StallError",
    "Sum",
    "UnsupportedError",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "broadcast",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "load_model",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rank",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "run",
    "shutdown",
    "size",
    "start_timeline",
    "stats",
    "stop_timeline",
]
