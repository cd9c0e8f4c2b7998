"""Hosts on one machine: namespaces with addresses, names and shared memory of their own.

    with Testbed(["alpha", "beta"], Link(rate=1e9)) as hosts:
        hosts.run("alpha", ["mpirun", "-n", "2", "--host", "alpha,beta", "hostname"])

         alpha               beta
    10.77.0.1  eth0     10.77.0.2  eth0
                 |                   |
        alpha0 --+--- br0 (switch) --+-- beta0

The switch is a host as well, the first, in whose namespaces the others are, so that none of this
touches the machine's own network.  The file system is the machine's, but /dev/shm, /proc and
/etc/hosts are each host's own.  Nothing is left when the process that made them ends, however it
does: the hosts' first processes then end, everything on them with these, and the namespaces with
the last process in them.  Only a directory may be left, which the next testbed removes.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .agent import connect
from .links import MTU, NAMESPACES, RELAY, Link, first_namespaces, has_netem, shaping, why_not

__all__ = ["Ended", "Link", "Testbed", "why_not"]

_HERE = Path(__file__).parent
_PREFIX = "hvdkit-hosts-"
_SWITCH = "switch"

#: Seconds until a host is there.
_START = 30.0


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str
    seconds: float


class Testbed:
    """Several hosts and the links between them.

    Args:
        names: of the hosts.
        link: what each link is like at first.
    """

    __test__ = False  # it is no test class

    def __init__(self, names: Sequence[str], link: Link | None = None) -> None:
        self.names = tuple(names)
        self._first_link = link or Link()
        self._stack = ExitStack()
        self._relays: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Testbed:
        _remove_what_others_left()
        with self._stack:
            prefix = f"{_PREFIX}{os.getpid()}-"
            self._stack.callback(shutil.rmtree, made := tempfile.mkdtemp(prefix=prefix), True)
            self.directory = Path(made)
            self._write_files()
            self._start(_SWITCH, [*first_namespaces(), *self._init(_SWITCH)], self._login())
            bridge = f"ip link add br0 mtu {MTU} type bridge forward_delay 0"
            self._on(_SWITCH, bridge, "ip link set br0 up")
            for name in self.names:
                command = shlex.join([*NAMESPACES, *self._init(name)])
                start = [*self._agent("start"), _SWITCH, command]
                self._start(name, start, self._login(name))
                self._connect(name, self._first_link)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def ssh(self) -> str:
        """Path of the program that takes ssh's place."""
        return str(self.directory / "agent")

    def address(self, name: str, version: int = 4) -> str:
        """Return a host's IPv4 or IPv6 address."""
        number = self.names.index(name) + 1
        return f"10.77.0.{number}" if version == 4 else f"fd77::{number}"

    def start(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        """Start a command on a host, in this process's environment and directory; pipes are open.

        SIGINT and SIGTERM to what is returned reach the command.
        """
        return subprocess.Popen(
            [*self._agent("start"), name, shlex.join(command)],
            env=os.environ | {"TMPDIR": self._temporary(name)} | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        timeout: float = 60.0,
        environment: Mapping[str, str] | None = None,
    ) -> Ended:
        """Run a command on a host to its end.

        Raises:
            AssertionError: not within `timeout` seconds; with all that was written until then.
        """
        began = time.monotonic()
        job = self.start(name, command, environment=environment)
        return self.finish(job, timeout=timeout, began=began)

    def finish(self, job: subprocess.Popen, *, timeout: float, began: float = 0.0) -> Ended:
        """Wait for a command's end; kill everything that runs if that takes too long.

        Args:
            job: the command.
            timeout: in seconds.
            began: when it did, on the monotonic clock; 0: now.

        Raises:
            AssertionError: not within `timeout` seconds; with all that was written until then.
        """
        began = began or time.monotonic()
        try:
            stdout, stderr = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as exc:
            running = self.sweep()
            stdout, stderr = job.communicate()
            message = [f"not finished within {timeout:.0f} s; there ran", *running, stdout, stderr]
            raise AssertionError("\n".join(message)) from exc
        finally:
            job.kill()
        return Ended(job.returncode, stdout, stderr, time.monotonic() - began)

    def sweep(self) -> list[str]:
        """Kill all that runs on the hosts; return the command lines that there were."""
        found = []
        for name in self.names:
            with connect(self.directory, name) as connection:
                connection.send(b"sweep")
                found += [f"{name}: {line}" for line in json.loads(connection.recv(2**20))]
        return found

    def shape(self, link: Link) -> None:
        """Make all links anew, for jobs that are yet to start."""
        for name in self.names:
            self._disconnect(name)
            self._connect(name, link)

    def cut(self, name: str) -> None:
        """Take a host from the network."""
        self._on(_SWITCH, f"ip link set {name}0 down")

    def mend(self, name: str) -> None:
        """Undo `cut`."""
        self._on(_SWITCH, f"ip link set {name}0 up")

    def _connect(self, name: str, link: Link) -> None:
        pid = (self.directory / f"{name}.pid").read_text()
        if link.is_long and not has_netem():
            self._start_relay(name, link)
            cable = f"ip link set {name}1 netns {pid} name eth0"
        else:
            cable = f"ip link add {name}0 type veth peer name eth0 netns {pid}"
        self._on(
            _SWITCH,
            cable,
            f"ip link set {name}0 mtu {MTU} master br0",
            *map(shlex.join, shaping(f"{name}0", Link(rate=link.rate))),
            f"ip link set {name}0 up",
        )
        self._on(
            name,
            f"ip address add {self.address(name)}/24 dev eth0",
            f"ip address add {self.address(name, 6)}/64 dev eth0 nodad",
            f"ip link set eth0 mtu {MTU}",
            *map(shlex.join, shaping("eth0", link)),
            "ip link set eth0 up",
        )

    def _disconnect(self, name: str) -> None:
        relay = self._relays.pop(name, None)
        if relay is None:
            self._on(_SWITCH, f"ip link delete {name}0")
        else:
            relay.kill()
            relay.communicate()
            self._gone(name)

    def _gone(self, name: str) -> None:
        """Wait until a relay's device is no more."""
        deadline = time.monotonic() + _START
        while self.run(_SWITCH, ["ip", "link", "show", f"{name}0"]).status == 0:
            assert time.monotonic() < deadline, f"the cable of {name} does not end"

    def _start_relay(self, name: str, link: Link) -> None:
        devices = [f"{name}1", f"{name}0", str(link.delay), str(link.loss)]
        relay = self.start(_SWITCH, [sys.executable, "-I", str(RELAY), *devices])
        self._stack.callback(relay.kill)
        self._relays[name] = relay
        assert relay.stdout
        if relay.stdout.readline() != "ready\n":
            raise RuntimeError(f"there is no cable to {name}: {relay.communicate()[1]}")

    def _on(self, name: str, *commands: str) -> None:
        """Run short commands, all of which must succeed."""
        ended = self.run(name, ["sh", "-e", "-c", "\n".join(commands)], timeout=30)
        if ended.status:
            raise RuntimeError(f"on {name}: {'; '.join(commands)}: {ended.stderr.strip()}")

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        """Start a host, and wait until it is there."""
        host = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._stack.callback(_end, host)
        deadline = time.monotonic() + _START
        while not (self.directory / name).exists():
            if host.poll() is not None or time.monotonic() > deadline:
                host.kill()
                raise RuntimeError(f"{name} does not start: {host.communicate()[1].strip()}")
            time.sleep(0.005)

    def _write_files(self) -> None:
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        for name in self.names:
            Path(self._temporary(name)).mkdir()
            lines.append(f"{self.address(name)} {name}")
            lines.append(f"{self.address(name, 6)} {name}-v6")
        Path(self._temporary(_SWITCH)).mkdir()
        (self.directory / "hosts").write_text("\n".join(lines) + "\n")
        agent = Path(self.ssh)
        agent.write_text(f'#!/bin/sh\nexec {shlex.join(self._agent("ssh"))} "$@"\n')
        agent.chmod(0o755)

    def _agent(self, kind: str) -> list[str]:
        return [sys.executable, "-I", str(_HERE / "agent.py"), kind, str(self.directory)]

    def _init(self, name: str) -> list[str]:
        return [sys.executable, "-I", str(_HERE / "init.py"), str(self.directory), name]

    def _login(self, name: str = _SWITCH) -> dict[str, str]:
        """Return the environment of somebody who logs in."""
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        return kept | {"TMPDIR": self._temporary(name)}

    def _temporary(self, name: str) -> str:
        """Return a host's own directory for temporary files: Open MPI has its sessions there."""
        return str(self.directory / f"{name}.tmp")


def _end(host: subprocess.Popen[Any]) -> None:
    """Close a host's lifeline; kill it should that not do."""
    host.stdin.close()
    try:
        host.wait(5)
    except subprocess.TimeoutExpired:
        host.kill()
        host.wait()
    host.stderr.close()


def _remove_what_others_left() -> None:
    """Remove directories of testbeds whose owner was killed."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = directory.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(directory, ignore_errors=True)
