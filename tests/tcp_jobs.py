"""Start jobs over TCP, without MPI, as `hvdrun --tcp` does; or any tests in such a job:

    python tests/tcp_jobs.py [--ranks 3] [--hosts 2] tests/mpi/test_collectives.py [...]

Every rank runs the same tests; one rank's failure ends the others at once.  With more than one
host, ranks have host names of their own, in turn, and so share no memory with those of others.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's own folder is there
from launching import end_group

from hvdkit.transport.stores import RendezvousServer

REPOSITORY = Path(__file__).parents[1]

#: What other launchers may have told this process.
_LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "SLURM_", "HYDRA_", "MPI_", "TORCHELASTIC_")
_TORCH = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}

#: What the other ranks may take to end when one has failed.
_SECONDS_TO_END = 20.0


@dataclass
class RankOutcome:
    """How a rank ended."""

    status: int
    stdout: str
    stderr: str


def plain(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without a trace of any launcher, in which this source is imported."""
    kept = {
        name: value
        for name, value in environment.items()
        if not name.startswith(_LAUNCHERS) and name not in _TORCH
    }
    return kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def hvdrun_variables(server: RendezvousServer, ranks: int, secret: bytes) -> list[dict[str, str]]:
    """Return what `hvdrun --tcp` tells each of `ranks` on this host."""
    return [
        {
            "HVDKIT_RANK": str(rank),
            "HVDKIT_SIZE": str(ranks),
            "HVDKIT_LOCAL_RANK": str(rank),
            "HVDKIT_LOCAL_SIZE": str(ranks),
            "HVDKIT_CROSS_RANK": "0",
            "HVDKIT_CROSS_SIZE": "1",
            "HVDKIT_RENDEZVOUS_ADDR": "127.0.0.1",
            "HVDKIT_RENDEZVOUS_PORT": str(server.port),
            "HVDKIT_SECRET": secret.hex(),
        }
        for rank in range(ranks)
    ]


def horovodrun_variables(server: RendezvousServer, ranks: int) -> list[dict[str, str]]:
    """Return what `horovodrun --gloo` (0.28, gloo_run.py) tells each of `ranks` on this host."""
    return [
        {
            "HOROVOD_HOSTNAME": "localhost",
            "HOROVOD_RANK": str(rank),
            "HOROVOD_SIZE": str(ranks),
            "HOROVOD_LOCAL_RANK": str(rank),
            "HOROVOD_LOCAL_SIZE": str(ranks),
            "HOROVOD_CROSS_RANK": "0",
            "HOROVOD_CROSS_SIZE": "1",
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server.port),
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_IFACE": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "PYTHONUNBUFFERED": "1",
        }
        for rank in range(ranks)
    ]


def can_name_hosts() -> bool:
    """Return whether this process may give others a host name of their own."""
    tried = subprocess.run(_on_host("x", ["true"]), capture_output=True, check=False)
    return tried.returncode == 0


def _on_host(name: str, command: Sequence[str]) -> list[str]:
    """Return `command` as it is run on a host of that name; its network is this one's."""
    shell = ["sh", "-c", 'hostname "$0" && exec "$@"', name, *command]
    return [shutil.which("unshare") or "/bin/false", "--uts", *shell]


@contextmanager
def started(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    *,
    hosts: int = 1,
    outputs: Sequence[tuple[IO[bytes], IO[bytes]]] | None = None,
) -> Iterator[list[subprocess.Popen]]:
    """Start a process for each environment; kill whatever is left of them in the end.

    Args:
        command: the program and its arguments.
        environments: one a process, without a launcher's variables besides.
        hosts: on how many they believe to be, in turn.
        outputs: files for each process's stdout and stderr; None: this process's.
    """
    jobs: list[subprocess.Popen] = []
    try:
        for rank, environment in enumerate(environments):
            stdout, stderr = outputs[rank] if outputs else (None, None)
            jobs.append(
                subprocess.Popen(
                    command if hosts == 1 else _on_host(f"host{rank % hosts}", command),
                    env=plain(os.environ) | dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
            )
        yield jobs
    finally:
        for job in jobs:
            end_group(job)


def wait_for_all(jobs: Sequence[subprocess.Popen], timeout: float) -> list[int]:
    """Return the statuses of processes, the signal's number less than 0.

    Processes that are still there `timeout` seconds after the start, or long after the first has
    failed, are killed: -9.
    """
    deadline = time.monotonic() + timeout
    failed = False
    while any(job.poll() is None for job in jobs) and time.monotonic() < deadline:
        if not failed and any(job.poll() for job in jobs):
            failed, deadline = True, min(deadline, time.monotonic() + _SECONDS_TO_END)
        time.sleep(0.02)
    for job in jobs:
        if job.poll() is None:
            end_group(job)
    return [job.wait() for job in jobs]


def run_ranks(
    script: str,
    environments: Sequence[Mapping[str, str]],
    *,
    hosts: int = 1,
    timeout: float = 60.0,
) -> list[RankOutcome]:
    """Run `script` (Python source) in each of the environments; return how each rank ended."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with ExitStack() as stack:
        outputs = [
            (
                stack.enter_context(tempfile.TemporaryFile()),
                stack.enter_context(tempfile.TemporaryFile()),
            )
            for _ in environments
        ]
        jobs = stack.enter_context(started(command, environments, hosts=hosts, outputs=outputs))
        statuses = wait_for_all(jobs, timeout)
        outcomes = []
        for status, files in zip(statuses, outputs, strict=True):
            for file in files:
                file.seek(0)
            outcomes.append(RankOutcome(status, *(file.read().decode() for file in files)))
    return outcomes


def run(
    script: str,
    ranks: int,
    *,
    hosts: int = 1,
    timeout: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> list[RankOutcome]:
    """Run `script` on `ranks` as hvdrun --tcp would; return how each rank ended."""
    secret = secrets.token_bytes(32)
    with RendezvousServer(secret, "127.0.0.1") as server:
        told = hvdrun_variables(server, ranks, secret)
        environments = [{**(environment or {}), **one} for one in told]
        return run_ranks(script, environments, hosts=hosts, timeout=timeout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600.0)
    args, arguments = parser.parse_known_args()
    secret = secrets.token_bytes(32)
    command = [sys.executable, "-m", "pytest", *arguments]
    with (
        RendezvousServer(secret, "127.0.0.1") as server,
        started(command, hvdrun_variables(server, args.ranks, secret), hosts=args.hosts) as jobs,
    ):
        statuses = wait_for_all(jobs, args.timeout)
    if any(statuses):
        print(f"exit statuses by rank: {statuses}", file=sys.stderr)
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main())
