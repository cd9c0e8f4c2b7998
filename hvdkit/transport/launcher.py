"""Who started this process, as far as the environment tells; and what must not be.

Launchers that start MPI processes leave it to MPI where the ranks meet.  The others tell each
process its rank and a place to meet at, and the ranks connect by themselves.

Launchers are started in one another, and what the outer one has set is still there: torchrun in a
shell that srun has started, mpirun in a batch job.  Who started this process is the one whose
variables the fewest of its ancestors have.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdkit.errors import LauncherError
from hvdkit.transport.meetings import TORCH_VARIABLES, Meeting

#: What launchers of MPI processes set, each with its rank where it tells one.
_MPI_MARKS = (
    "OMPI_COMM_WORLD_RANK",
    "PMIX_RANK",
    "PMI_RANK",
    "PMI_FD",
    "PMI_CONTROL_PORT",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_RANK",
    "PALS_RANKID",
    "ALPS_APP_PE",
    "JSM_NAMESPACE_RANK",
)

#: What each launcher sets, the ones that start MPI processes first: where one of those says 1,
#: one process is what was asked for, whatever an outer batch job's variables say.
_MPI_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "MPICH's or Intel MPI's mpiexec, or srun --mpi=pmi2",
}
_OTHER_SIZES = {
    "HVDKIT_SIZE": "hvdrun --tcp",
    "HOROVOD_SIZE": "horovodrun in Gloo mode",
    "SLURM_STEP_NUM_TASKS": "srun",
    "SLURM_NTASKS": "Slurm",
    "WORLD_SIZE": "torchrun",
}


@dataclass(frozen=True)
class MPIStart:
    """The sign that this process was started as one of MPI's."""

    launcher: str
    mark: str
    size: int | None
    """None: the launcher does not say."""


def mpi_start(environ: Mapping[str, str]) -> MPIStart | None:
    """Return the sign that a launcher of MPI processes has left, if there is one."""
    mark = next((name for name in _MPI_MARKS if environ.get(name)), None)
    if mark is None:
        return None
    size = next((environ[name] for name in _MPI_SIZES if environ.get(name, "").isdigit()), None)
    return MPIStart(_mpi_launcher(mark, environ), mark, None if size is None else int(size))


def _mpi_launcher(mark: str, environ: Mapping[str, str]) -> str:
    if mark.startswith("OMPI_"):
        return "Open MPI's mpirun"
    if any(name.startswith(("I_MPI_HYDRA_", "I_MPI_MPIRUN")) for name in environ):
        return "Intel MPI's mpiexec"
    if "MPI_LOCALRANKID" in environ:
        return "MPICH's or Intel MPI's mpiexec"
    if "SLURM_STEP_ID" in environ:
        return f"srun --mpi={'pmix' if mark.startswith('PMIX') else 'pmi2'}"
    return f"a launcher of MPI processes (it has set {mark})"


def innermost(
    found: list[Meeting | MPIStart],
    environ: Mapping[str, str],
    ancestors: Callable[[], Iterator[Mapping[str, str]]] | None = None,
) -> Meeting | MPIStart | None:
    """Return which of the launchers started this process itself; the first, if there is no telling.

    Args:
        found: what launchers have left.
        environ: this process's environment.
        ancestors: gives those with which its ancestors began, the parent's first.
    """
    if len(found) < 2:
        return found[0] if found else None
    inherited = dict.fromkeys((launch.mark for launch in found), 0)
    for theirs in (ancestors or _ancestors)():
        passed_on = {mark for mark in inherited if theirs.get(mark) == environ.get(mark)}
        if not passed_on:
            break
        for mark in passed_on:
            inherited[mark] += 1
    return min(found, key=lambda launch: inherited[launch.mark])


def _ancestors() -> Iterator[Mapping[str, str]]:
    """Yield the environments with which this process's ancestors began, as far as may be seen."""
    pid = os.getppid()
    while pid > 1:
        try:
            text = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes())
        except OSError:
            return
        yield dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)
        _, pid = _name_and_parent(pid)


def check_world(environ: Mapping[str, str], world_size: int, library: str) -> None:
    """Refuse to be one of N copies that do not know of each other.

    Args:
        environ: the process's environment.
        world_size: the size of MPI_COMM_WORLD; 1 without MPI.
        library: the MPI library's own version string, for the message; "": there is none.

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
    sees = f"MPI ({library.splitlines()[0].strip()}) sees" if library else "without MPI there is"
    raise LauncherError(
        f"{name}={announced[name]} says that {who} started {announced[name]} processes, but "
        f"{sees} a world of one in each: they would train "
        f"{announced[name]} unsynchronised copies.\n{_advice(name, environ, library)}"
    )


def _advice(name: str, environ: Mapping[str, str], library: str) -> str:
    """Return what to do about singletons."""
    alone = "or set HVDKIT_ALLOW_SINGLETON=1 to run this process alone."
    own = (
        "Start the script with the mpirun that belongs to that MPI library (python -m hvdkit "
        "doctor names it)"
        if library
        else "Install MPI (python -m hvdkit doctor says how), or start the script with hvdrun --tcp"
    )
    if name == "WORLD_SIZE":
        missing = [name for name in TORCH_VARIABLES if not environ.get(name)]
        return f"{own}, or set {' and '.join(missing) or 'HVDKIT_TRANSPORT=tcp'} as well, {alone}"
    if not environ.get("SLURM_PROCID") or name == "OMPI_COMM_WORLD_SIZE":
        return f"{own}, {alone}"
    if "open mpi" in library.lower():
        wants, flag = "PMIx", "--mpi=pmix"
    elif library:
        wants, flag = "PMI-2 (or PMIx, if it was built so)", "--mpi=pmi2"
    else:
        wants, flag = "", "--mpi=pmix or pmi2"
    given = "PMIx" if environ.get("PMIX_RANK") else "PMI-2" if environ.get("PMI_RANK") else "no PMI"
    mismatch = f"Slurm gave the process {given}; this MPI library asks for {wants}. " * bool(wants)
    return (
        f"{mismatch}Start it with srun {flag} (srun --mpi=list says what this Slurm has), or in "
        f"the allocation with mpirun. {own}, or set HVDKIT_TRANSPORT=tcp: the tasks of srun then "
        f"connect by themselves, without MPI; {alone}"
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
