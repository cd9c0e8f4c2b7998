"""Ranks that are threads of this process, or processes of their own, connected over TCP."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hvdkit.transport import tcp

from .worlds import SECONDS

SECRET = b"a secret of tests"


class MemoryStore:
    """A launcher's store, for threads."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()

    def put(self, key: str, value: bytes) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str, timeout: float) -> bytes:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout):
                raise TimeoutError(key)
            return self.values[key]


class FileStore:
    """A launcher's store, for processes: one file a key."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def put(self, key: str, value: bytes) -> None:
        draft = self.directory / f".{key}.{os.getpid()}"
        draft.write_bytes(value)
        draft.rename(self.directory / key)

    def get(self, key: str, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while not (self.directory / key).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(key)
            time.sleep(0.005)
        return (self.directory / key).read_bytes()


def connect(rank: int, size: int, store: Any, **options: Any) -> tcp.TCPTransport:
    """Connect one rank, on the loopback unless told otherwise."""
    secret = options.pop("secret", SECRET)
    defaults = {"interfaces": ("lo",), "start_timeout": SECONDS, "peer_timeout": SECONDS}
    return tcp.connect(tcp.Membership(rank, size, store, secret), **(defaults | options))


def on_tcp_ranks(
    size: int, body: Callable[[tcp.TCPTransport], Any], *, store: Any = None, **options: Any
) -> list[Any]:
    """Call `body` on each rank's thread, with the rank's transport; results in rank order.

    A rank whose body fails goes without a word: as if its process had died.
    """
    store = MemoryStore() if store is None else store
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def rank_body(rank: int) -> None:
        try:
            transport = connect(rank, size, store, **options)
            try:
                results[rank] = body(transport)
            except BaseException:
                vanish(transport)
                raise
            transport.close()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=rank_body, args=(r,), daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SECONDS)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "ranks hang"
    return results


def vanish(transport: tcp.TCPTransport) -> None:
    """Close the links of a rank without a word, as the end of its process does."""
    mesh = transport._mesh
    with mesh.lock:
        mesh._failure, mesh.closed = "this rank has failed", True
        mesh._drop()


@contextmanager
def processes(script: str, size: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Start `script` on ranks that are processes; it finds `t`, `rank` and `size`."""
    prelude = """
        import sys
        import numpy as np
        from core.tcp_worlds import FileStore, connect
        rank, size = int(sys.argv[1]), int(sys.argv[2])
        t = connect(rank, size, FileStore(sys.argv[3]))
    """
    source = textwrap.dedent(prelude) + textwrap.dedent(script)
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as directory:
        jobs = [
            subprocess.Popen(
                [sys.executable, "-c", source, str(rank), str(size), directory],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(size)
        ]
        try:
            yield jobs
        finally:
            for job in jobs:
                job.kill()
                job.wait()
                for pipe in (job.stdout, job.stderr):
                    if pipe is not None:
                        pipe.close()


def finish(job: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a rank; return its status and what it wrote."""
    out, err = job.communicate(timeout=2 * SECONDS)
    return job.returncode, out, err
