"""Horovod's questions about the build and the job, answered for hvdkit.

Scripts ask these to choose a path.  hvdkit has nothing that is compiled in or left out: its ranks
exchange messages over MPI, or over TCP where no MPI has started them, and use shared memory inside
a node.
"""

from __future__ import annotations

import importlib.util

from hvdkit import api

_FRAMEWORKS = ("torch", "tensorflow", "keras")


def mpi_built() -> bool:
    """Return whether ranks can speak MPI: whether mpi4py is installed.  Local; starts no MPI."""
    return importlib.util.find_spec("mpi4py") is not None


def mpi_enabled() -> bool:
    """Return whether this process takes part in a job over MPI.  Local; starts no MPI."""
    return api.is_initialized() and api.context().kind == "mpi"


def mpi_threads_supported() -> bool:
    """Return whether several threads may communicate at once.  Local; starts no MPI.

    Over MPI, whether it has ``MPI_THREAD_MULTIPLE``; over TCP they always may.  Where they may not,
    asynchronous operations complete before they return.

    Raises:
        NotInitializedError: ``init()`` was not called.
    """
    return api.context().threaded


def gloo_built() -> bool:
    """Return False: hvdkit has no Gloo."""
    return False


def gloo_enabled() -> bool:
    """Return False: hvdkit has no Gloo."""
    return False


def nccl_built() -> int:
    """Return 0, where Horovod returns NCCL's version: hvdkit has no NCCL."""
    return 0


def ddl_built() -> bool:
    """Return False: hvdkit has no IBM DDL."""
    return False


def ccl_built() -> bool:
    """Return False: hvdkit has no oneCCL."""
    return False


def cuda_built() -> bool:
    """Return False: no kernel of hvdkit runs on a GPU."""
    return False


def rocm_built() -> bool:
    """Return False: no kernel of hvdkit runs on a GPU."""
    return False


def check_extension(ext_name: str, *_: str) -> None:
    """Return if the framework of Horovod's extension `ext_name` is installed.  Local; loads none.

    Nothing of hvdkit is compiled against a framework, so that there is no more to check.

    Args:
        ext_name: such as ``"horovod.torch"``.
        _: how Horovod's is built, and where it would lie.

    Raises:
        ImportError: it is not, or hvdkit does not support it.
    """
    framework = ext_name.rpartition(".")[2]
    if framework not in _FRAMEWORKS:
        raise ImportError(f"hvdkit has nothing for {ext_name}; for {', '.join(_FRAMEWORKS)} it has")
    if importlib.util.find_spec(framework) is None:
        raise ImportError(f"{framework} is not installed, which {ext_name} needs")


def is_homogeneous() -> bool:
    """Return whether every node has the same number of ranks.  Local.

    Raises:
        NotInitializedError: ``init()`` was not called.
    """
    return len(set(api.context().local_sizes)) == 1
