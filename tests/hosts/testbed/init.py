"""The first process of a host: it makes the host, then runs what it is asked to, as an sshd does.

    init.py DIRECTORY NAME     in new network, mount, process, IPC and host name namespaces

It is asked over a socket in the file system, DIRECTORY/NAME: a datagram of JSON with the three
standard streams gives an exit status back.  That somebody listens on port 22 tells clients that
the network leads here.  When this process ends, so does everything that runs on the host, and every
host that was started from it; it ends when its stdin is closed.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

#: The longest request, which carries an environment.
REQUEST = 2**20

SSH_PORT = 22


@dataclass(frozen=True)
class Command:
    """What runs for a client."""

    client: socket.socket
    ends_with_client: bool


class Init:
    """Runs commands, collects all processes that end, and tells clients how theirs ended."""

    def __init__(self, path: Path) -> None:
        self._selector = selectors.DefaultSelector()
        self._running: dict[int, Command] = {}
        requests = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        requests.bind(str(path.with_suffix(".new")))
        requests.listen(64)
        visitors = socket.create_server(("", SSH_PORT), backlog=64)
        ended, self._end = socket.socketpair()
        for each in (ended, self._end):
            each.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._end.fileno(), warn_on_full_buffer=False)
        for heard, answer in (
            (requests, self._begin),
            (visitors, self._welcome),
            (ended, self._collect),
        ):
            self._selector.register(heard, selectors.EVENT_READ, partial(answer, heard))
        path.with_suffix(".new").rename(path)

    def serve(self) -> None:
        """Serve until stdin, a pipe that nobody writes to, is closed."""
        self._selector.register(0, selectors.EVENT_READ, lambda: sys.exit(0))
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _begin(self, requests: socket.socket) -> None:
        client, _ = requests.accept()
        message, streams, _, _ = socket.recv_fds(client, REQUEST, 3)
        if len(streams) != 3:
            if message == b"sweep":
                client.send(json.dumps(self._sweep()).encode())
            client.close()
            return
        for fd in streams:
            os.set_inheritable(fd, False)
        request = json.loads(message)
        pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", request["command"]],
            request["environment"] or os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, n) for n, fd in enumerate(streams)],
            setsid=True,
            setsigdef=[signal.SIGPIPE, signal.SIGCHLD],
        )
        for fd in streams:
            os.close(fd)
        self._running[pid] = Command(client, request["ends_with_client"])
        self._selector.register(client, selectors.EVENT_READ, partial(self._hear, pid))

    def _welcome(self, visitors: socket.socket) -> None:
        visitors.accept()[0].close()

    def _hear(self, pid: int) -> None:
        """Pass a signal on to a command, or notice that its client is gone."""
        command = self._running.get(pid)
        if command is None:  # it has just ended
            return
        with suppress(ConnectionError):
            said = command.client.recv(16)
            if said:
                with suppress(ProcessLookupError):
                    os.killpg(pid, int(said))
                return
        self._selector.unregister(command.client)
        if command.ends_with_client:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _collect(self, ended: socket.socket) -> None:
        with suppress(BlockingIOError):
            ended.recv(4096)
        with suppress(ChildProcessError):
            while pid := (waited := os.waitpid(-1, os.WNOHANG))[0]:
                command = self._running.pop(pid, None)
                if command is None:
                    continue
                with suppress(KeyError):
                    self._selector.unregister(command.client)
                with suppress(ConnectionError):
                    command.client.send(str(os.waitstatus_to_exitcode(waited[1])).encode())
                command.client.close()

    def _sweep(self) -> list[str]:
        """Kill every process on the host but this one; return their command lines."""
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and process.name != "1":
                with suppress(OSError):
                    line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    found += [line] if line else []  # without one it has ended
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        return found


def make_host(directory: Path, name: str) -> None:
    """Give this process's namespaces a name, shared memory and an /etc/hosts of their own."""
    # As long as /proc is that of the host this was started from, so is the number in it.
    (directory / f"{name}.pid").write_text(str(Path("/proc/self").readlink()))
    socket.sethostname(name)
    for command in (
        ["mount", "-t", "proc", "proc", "/proc"],
        ["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm"],
        ["mount", "--bind", str(directory / "hosts"), "/etc/hosts"],
        ["ip", "link", "set", "lo", "up"],
    ):
        subprocess.run(command, check=True)


def main() -> None:
    directory, name = Path(sys.argv[1]), sys.argv[2]
    make_host(directory, name)
    Init(directory / name).serve()


if __name__ == "__main__":
    main()
