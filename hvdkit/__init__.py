"""hvdkit: collective communication for training, over MPI and shared memory.

    import hvdkit as hvd
    hvd.init()
    mean = hvd.allreduce(x)

Importing it starts nothing; ``init()`` does.
"""

from hvdkit.api import (
    allgather,
    allreduce,
    allreduce_,
    alltoall,
    barrier,
    broadcast,
    broadcast_,
    broadcast_object,
    cross_rank,
    cross_size,
    empty,
    init,
    is_initialized,
    local_rank,
    local_size,
    rank,
    reducescatter,
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
    ScheduleError,
    UnsupportedError,
)
from hvdkit.launch.job import JobError
from hvdkit.launch.run import run

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Average",
    "ConfigError",
    "HvdkitError",
    "JobError",
    "LauncherError",
    "Max",
    "Min",
    "MismatchError",
    "NotInitializedError",
    "PeerError",
    "Product",
    "ReduceOp",
    "ScheduleError",
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
    "cross_rank",
    "cross_size",
    "empty",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "reducescatter",
    "run",
    "shutdown",
    "size",
]
