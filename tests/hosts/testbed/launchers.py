"""Commands that start a program's ranks on the hosts of a testbed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from . import Ended, Testbed

_REPOSITORY = Path(__file__).resolve().parents[3]

#: Ranks wait for one another on fewer cores than there are ranks, and hosts' cores are the same.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}

#: What ranks need to be told; a login on a host knows nothing of it.
_PASSED_ON = ("PYTHONPATH", "OMP_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle")

Slots = Mapping[str, int]
Started = tuple[list[str], dict[str, str]]


class Launcher(Protocol):
    """Returns the command and the environment for it, to be run on the first of the hosts."""

    def __call__(
        self, ssh: str, slots: Slots, program: Sequence[str], variables: Mapping[str, str]
    ) -> Started: ...


@cache
def mpirun() -> tuple[str, bool]:
    """Return the mpirun of this environment, and whether it is Open MPI's."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise FileNotFoundError("there is no mpirun")
    said = subprocess.run(
        [found, "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    return found, "Open MPI" in said.stdout + said.stderr


def places(slots: Slots) -> str:
    """Return ``"alpha:2,beta:1"``."""
    return ",".join(f"{host}:{count}" for host, count in slots.items())


def over_mpi(
    ssh: str, slots: Slots, program: Sequence[str], variables: Mapping[str, str]
) -> Started:
    """Start ranks with mpirun, Open MPI's or MPICH's."""
    path, open_mpi = mpirun()
    command = [path, "-n", str(sum(slots.values()))]
    if not open_mpi:
        command += ["-hosts", places(slots), "-launcher", "ssh", "-launcher-exec", ssh]
        return [*command, *program], dict(variables)
    command += ["--host", places(slots), "--prtemca", "plm_ssh_agent", ssh]
    command += ["--map-by", "slot:oversubscribe", "--bind-to", "none"]
    told = _OPEN_MPI | dict(variables)
    names = {*variables, *(name for name in _PASSED_ON if name in told or name in os.environ)}
    return [*command, *(w for name in sorted(names) for w in ("-x", name)), *program], told


def over_tcp(
    ssh: str, slots: Slots, program: Sequence[str], variables: Mapping[str, str]
) -> Started:
    """Start ranks with hvdrun, without MPI."""
    return _hvdrun("--tcp", slots, program), {"HVDKIT_RSH": ssh, **variables}


def over_mpi_by_hvdrun(
    ssh: str, slots: Slots, program: Sequence[str], variables: Mapping[str, str]
) -> Started:
    """Start ranks with hvdrun, which calls mpirun."""
    return _hvdrun("--mpi", slots, program), {"HVDKIT_RSH": ssh, **variables}


def _hvdrun(kind: str, slots: Slots, program: Sequence[str]) -> list[str]:
    count = str(sum(slots.values()))
    hvdrun = [sys.executable, "-m", "hvdkit", "run", "--no-labels", kind, "-np", count]
    return [*hvdrun, "-H", places(slots), *program]


def slots_of(text: str) -> dict[str, int]:
    """Return hosts and their slots from ``"alpha:2,beta:1"``."""
    pairs = (item.split(":") for item in text.split(","))
    return {host: int(count) for host, count in pairs}


def start_ranks(
    hosts: Testbed,
    launcher: Launcher,
    layout: str,
    program: Sequence[str],
    *,
    variables: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> subprocess.Popen:
    """Start a program's ranks on hosts, from the first of them; pipes are open.

    Args:
        layout: such as ``"alpha:2,beta:1"``.
        variables: of the ranks' environment, besides what they need to find hvdkit.
        options: more, of the launcher.
    """
    told = {"PYTHONPATH": str(_REPOSITORY), "OMP_NUM_THREADS": "1"} | dict(variables or {})
    slots = slots_of(layout)
    command, environment = launcher(hosts.ssh, slots, program, told)
    command[1:1] = options
    return hosts.start(next(iter(slots)), command, environment=environment)


def run_ranks(
    hosts: Testbed,
    launcher: Launcher,
    layout: str,
    program: Sequence[str],
    *,
    timeout: float = 60.0,
    **more: Any,
) -> Ended:
    """Run a program's ranks to their end; the arguments are those of `start_ranks`.

    Raises:
        AssertionError: not within `timeout` seconds; with all that was written until then.
    """
    began = time.monotonic()
    job = start_ranks(hosts, launcher, layout, program, **more)
    return hosts.finish(job, timeout=timeout, began=began)
