"""hvdkit: collective communication for training, over MPI and shared memory.

    import hvdkit as hvd
    hvd.init()
    mean = hvd.allreduce(x)

Importing it starts nothing; ``init()`` does.
"""

from typing import TYPE_CHECKING, NoReturn

from hvdkit.api import (
    add_process_set,
    cross_rank,
    cross_size,
    explain,
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
from hvdkit.array_collectives import (
    allgather,
    allgather_object,
    allreduce,
    allreduce_,
    alltoall,
    barrier,
    broadcast,
    broadcast_,
    broadcast_object,
    empty,
    join,
    reducescatter,
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
    InFlightError,
    LauncherError,
    MismatchError,
    MissingError,
    NotInitializedError,
    PeerError,
    ScheduleError,
    StallError,
    UnsupportedError,
)
from hvdkit.launch.job import JobError
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
from hvdkit.version import __version__

if not TYPE_CHECKING:  # to a type checker any name would be known

    def __getattr__(name: str) -> NoReturn:
        """Say what to do without it, if it is something of Horovod's."""
        refuse_name(__name__, name)


__all__ = [
    "Adasum",
    "ArgumentError",
    "Average",
    "CheckpointError",
    "ConfigError",
    "HorovodInternalError",
    "HvdkitError",
    "InFlightError",
    "JobError",
    "LauncherError",
    "Max",
    "Mesh",
    "Min",
    "MismatchError",
    "MissingError",
    "NotInitializedError",
    "PeerError",
    "ProcessSet",
    "Product",
    "ReduceOp",
    "ScheduleError",
    "StallError",
    "Sum",
    "UnsupportedError",
    "__version__",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "alltoall",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "ccl_built",
    "check_extension",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "empty",
    "explain",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
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
