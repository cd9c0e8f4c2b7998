"""Notice a launcher that started N processes which MPI believes to be N worlds of one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hvdkit.errors import LauncherError

#: What each launcher sets, the ones that start MPI processes first: where one of those says 1,
#: one process is what was asked for, whatever an outer batch job's variables say.
_MPI_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "MPICH's or Intel MPI's mpiexec, or srun --mpi=pmi2",
}
_OTHER_SIZES = {
    "HOROVOD_SIZE": "horovodrun in Gloo mode",
    "SLURM_STEP_NUM_TASKS": "srun",
    "SLURM_NTASKS": "Slurm",
    "WORLD_SIZE": "torchrun",
}


def check_world(environ: Mapping[str, str], world_size: int, library: str) -> None:
    """Refuse to be one of N copies that do not know of each other.

    Args:
        environ: the process's environment.
        world_size: the size of MPI_COMM_WORLD.
        library: the MPI library's own version string, for the message.

    Raises:
        LauncherError: MPI sees a world of one where the launcher's environment says more.
    """
    if world_size > 1:
        return
    announced = {
        name: int(environ[name])
        for name in (*_MPI_SIZES, *_OTHER_SIZES)
        if environ.get(name, "").isdigit()
    }
    if any(announced.get(name) == 1 for name in _MPI_SIZES):
        return
    name = next((name for name, size in announced.items() if size > 1), None)
    if name is None:
        return
    who = (_MPI_SIZES | _OTHER_SIZES)[name]
    raise LauncherError(
        f"{name}={announced[name]} says that {who} started {announced[name]} processes, but MPI "
        f"({library.splitlines()[0].strip()}) sees a world of one in each: they would train "
        f"{announced[name]} unsynchronised copies.\n"
        "Start the script with the mpirun that belongs to that MPI library (python -m hvdkit "
        "doctor names it), or set HVDKIT_ALLOW_SINGLETON=1 to run this process alone."
    )


#: In the environment of a rank's children: its process id.
RANK_PROCESS = "_HVDKIT_RANK_PROCESS"


def check_not_a_worker(environ: Mapping[str, str]) -> None:
    """Refuse to start MPI in a process that a rank has started as its helper.

    Such a one, as of a DataLoader with ``spawn``, has the launcher's variables of its parent, and
    would be taken for it.

    Raises:
        LauncherError: a rank is this process's parent, with nothing but Python between them.
    """
    rank_process = environ.get(RANK_PROCESS, "")
    parent = os.getppid()
    while parent > 1 and str(parent) != rank_process:
        name, parent = _name_and_parent(parent)
        if not name.startswith("python"):
            return
    if str(parent) == rank_process:
        raise LauncherError(
            f"process {os.getpid()} was started by process {rank_process}, which is a rank "
            "already: a worker process, as of a DataLoader, cannot join the job. Put the "
            'script\'s main part under if __name__ == "__main__":'
        )


def _name_and_parent(pid: int) -> tuple[str, int]:
    """Return a process's name and its parent; nothing and 0 if there is no telling."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        return status["Name"].strip(), int(status["PPid"])
    except (OSError, KeyError, ValueError):
        return "", 0
