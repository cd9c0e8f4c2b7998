"""What stands in ssh's place between the hosts of a testbed, in two ways.

agent.py ssh DIRECTORY [ssh's options] HOST WORD...
    The words, with spaces between them, go to a shell on the host, in the environment of a
    login there.  It must be reachable over the network.
agent.py start DIRECTORY HOST COMMAND
    The same from outside, in this environment and directory; SIGINT and SIGTERM are passed
    on, and the command ends when this process does.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

#: What ssh ends with when it is to blame itself.
SSH_FAILED = 255

#: ssh's options that a word follows.
WITH_VALUE = frozenset("BbcDEeFIiJLlmOopQRSWw")

CONNECT_SECONDS = 5.0


def read_options(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the host, and what follows it."""
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if len(option) == 2 and option[1] in WITH_VALUE:
            rest.pop(0)
    host = rest.pop(0)
    return host.rpartition("@")[2], rest


def connect(directory: Path, host: str) -> socket.socket:
    """Return a connection to a host's first process."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
    connection.connect(str(directory / host))
    return connection


def ask(connection: socket.socket, command: str, streams: Sequence[int], *, login: bool) -> None:
    """Ask for a command, in the environment of a login or in this process's."""
    request = {
        "command": command,
        "environment": None if login else dict(os.environ),
        "ends_with_client": not login,
    }
    socket.send_fds(connection, [json.dumps(request).encode()], streams)


def status_of(connection: socket.socket) -> int:
    """Wait for the command; return its exit status, as a shell would."""
    said = connection.recv(16)
    status = int(said) if said else SSH_FAILED
    return status if status >= 0 else 128 - status


def as_ssh(directory: Path, arguments: Sequence[str]) -> int:
    """Run a command on another host."""
    host, words = read_options(arguments)
    try:
        socket.create_connection((host, 22), CONNECT_SECONDS).close()
        connection = connect(directory, host)
    except socket.gaierror:
        sys.stderr.write(f"ssh: Could not resolve hostname {host}: Name or service not known\n")
        return SSH_FAILED
    except OSError as exc:
        sys.stderr.write(f"ssh: connect to host {host} port 22: {exc.strerror or exc}\n")
        return SSH_FAILED
    there, here = os.pipe()
    ask(connection, " ".join(words), [there, 1, 2], login=True)
    os.close(there)
    # A pipe of its own, so that the command's stdin is closed when this process is killed.
    threading.Thread(target=copy, args=(0, here), daemon=True).start()
    return status_of(connection)


def copy(source: int, target: int) -> None:
    """Copy until there is no more, or nobody reads it."""
    try:
        while data := os.read(source, 2**16):
            os.write(target, data)
    except OSError:
        pass
    os.close(target)


def from_outside(directory: Path, host: str, command: str) -> int:
    """Run a command on a host as if it had been typed there."""
    connection = connect(directory, host)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: connection.send(str(int(number)).encode()))
    within = f"cd {shlex.quote(str(Path.cwd()))} && exec {command}"
    ask(connection, within, [0, 1, 2], login=False)
    return status_of(connection)


def main() -> None:
    kind, directory, *rest = sys.argv[1:]
    if kind == "ssh":
        status = as_ssh(Path(directory), rest)
    else:
        status = from_outside(Path(directory), *rest)
    os._exit(status)  # the thread that reads stdin may never end


if __name__ == "__main__":
    main()
