"""A Slurm of the tests' own: munged, slurmctld and slurmd on 127.0.0.1, and an end to them."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launching import Outcome, end_group

#: Where distributions put daemons, which a user's PATH need not have.
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "scancel")

_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=512
PartitionName=tests Nodes=ALL Default=YES State=UP
"""


def missing_programs() -> list[str]:
    """Return those programs of Slurm and munge that are not installed."""
    return [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]


class OwnSlurm:
    """One node with `cpus` CPUs, of which it believes that they are there; a context manager."""

    def __init__(self, cpus: int = 4) -> None:
        # Not pytest's directory: the path of a Unix socket must be short.
        self.directory = Path(tempfile.mkdtemp(prefix="hvdkit-slurm-"))
        self.configuration = self.directory / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool"):
            (self.directory / name).mkdir()
        controller, daemon = _free_ports(2)
        self.configuration.write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().split(".")[0],
                user=_user(),
                directory=self.directory,
                controller=controller,
                daemon=daemon,
                cpus=cpus,
            )
        )
        # Without this file, slurmd looks for control groups, which a container may not have.
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def __enter__(self) -> OwnSlurm:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(
        self, *command: str, timeout: float = 60.0, environment: Mapping[str, str] | None = None
    ) -> Outcome:
        """Run one of Slurm's commands to its end; `TimeoutExpired` fails the test."""
        job = subprocess.Popen(
            command,
            env=self.environment(environment or os.environ),
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            stdout, stderr = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._cancel_all()
            raise
        finally:
            end_group(job)
        return Outcome(job.returncode, stdout, stderr)

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return `inherited` as it is outside of any job, with this Slurm's configuration."""
        kept = {name: text for name, text in inherited.items() if not name.startswith("SLURM")}
        return kept | {"PATH": _PATH, "SLURM_CONF": str(self.configuration)}

    def stop(self) -> None:
        """End all jobs and daemons, and remove what they wrote."""
        try:
            if len(self._daemons) == 3:
                self._cancel_all()
            for daemon in reversed(self._daemons):
                daemon.terminate()
                with suppress(subprocess.TimeoutExpired):
                    daemon.wait(10)
        finally:
            self._kill_what_is_left()
            shutil.rmtree(self.directory, ignore_errors=True)

    def said(self) -> str:
        """Return what the daemons have written."""
        return "\n".join(file.read_text() for file in sorted(self.directory.glob("*.log")))

    def _cancel_all(self) -> None:
        """End all jobs: they outlive the commands that started them."""
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(
                ["scancel", "--full", f"--user={_user()}"],
                env=self.environment(os.environ),
                capture_output=True,
                timeout=10,
                check=False,
            )

    def _start(self) -> None:
        key = self.directory / "munge.key"
        subprocess.run(
            ["mungekey", "--create", f"--keyfile={key}"],
            env=os.environ | {"PATH": _PATH},
            check=True,
            capture_output=True,
        )
        places = [
            f"--{option}={self.directory}/munge.{end}"
            for option, end in (
                ("key-file", "key"),
                ("socket", "socket"),
                ("pid-file", "pid"),
                ("seed-file", "seed"),
                ("log-file", "munged"),
            )
        ]
        # Forced: as root it would want the key's directory, and those above, to be its own.
        self._spawn("munged", "--foreground", "--force", *places)
        self._wait_for("munged", (self.directory / "munge.socket").exists)
        self._spawn("slurmctld", "-D", "-f", str(self.configuration))
        self._spawn("slurmd", "-D", "-f", str(self.configuration))
        self._wait_for("Slurm", self._is_idle, seconds=60)

    def _is_idle(self) -> bool:
        """Return whether the node takes jobs."""
        asked = self.run("sinfo", "--noheader", "--format=%T", timeout=30)
        return asked.stdout.strip() == "idle"

    def _spawn(self, *command: str) -> None:
        ending_with_us = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        with (self.directory / f"{command[0]}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    [*ending_with_us, *command],
                    env=self.environment(os.environ),
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _wait_for(self, what: str, condition, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"{what} does not start; ended: {ended}\n{self.said()}")
            time.sleep(0.1)

    def _kill_what_is_left(self) -> None:
        """Kill daemons that would not end, and processes of jobs: all have this configuration."""
        mark = f"SLURM_CONF={self.configuration}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()


def _free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody uses now."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name
