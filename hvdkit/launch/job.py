"""A job from its start to its end: its launcher, the ranks' notes, and an end to them all."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hvdkit.errors import HvdkitError, LauncherError, describe_by_rank

#: Between two looks at the job's directory.
_SECONDS_BETWEEN_LOOKS = 0.1
#: What the launcher may take to end the other ranks when one has failed.
_SECONDS_AFTER_FAILURE = 20.0
#: What the launcher may take to end the ranks when told to.
_SECONDS_TO_END = 10.0


class JobError(HvdkitError, RuntimeError):
    """A job that ``run`` started did not end well; `rank` is the first that failed, if known."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class Failure:
    """What a rank, or its guard, has noted."""

    rank: int
    what: str
    details: str
    secondary: bool
    time: float


class Job:
    """A running launcher with its ranks; leaving the context ends whatever is left of it.

    Args:
        command: mpirun, or hvdrun, and all its arguments.
        environment: the launcher's.
        directory: private to this job; the lifeline and the ranks' notes are in it.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], directory: Path
    ) -> None:
        self._directory = directory
        os.mkfifo(directory / "lifeline", 0o600)
        self._lifeline = os.open(directory / "lifeline", os.O_RDWR)
        try:
            # In a session of its own, so that a terminal's Ctrl-C reaches the launcher alone.
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as exc:
            os.close(self._lifeline)
            raise LauncherError(f"{command[0]} cannot be started: {exc}") from exc

    def wait(self, *, start_timeout: float, timeout: float | None) -> int:
        """Return the launcher's exit status.

        Returns in bounded time after the first rank has failed, too.

        Raises:
            LauncherError: not all ranks had started within `start_timeout` seconds.
            JobError: the job did not end within `timeout` seconds.
        """
        began = time.monotonic()
        failed: float | None = None
        while True:
            try:
                return self._process.wait(_SECONDS_BETWEEN_LOOKS)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            if failed is None and any(self._directory.glob("failure-*.json")):
                failed = now
            if failed is not None and now - failed > _SECONDS_AFTER_FAILURE:
                self._end()
                return self._process.wait()
            if timeout is not None and now - began > timeout:
                raise JobError(f"the job had not ended after timeout={timeout:g} s, and was ended")
            if now - began > start_timeout and not (self._directory / "started").exists():
                raise LauncherError(
                    f"not all ranks had started after {start_timeout:g} s; give more with "
                    "start_timeout= or HOROVOD_START_TIMEOUT. What the launcher said is on stderr"
                )

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        """Ask the launcher to end the ranks; then drop the lifeline, which no rank survives."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        finally:
            if self._lifeline >= 0:
                os.close(self._lifeline)
                self._lifeline = -1


def read_results(directory: Path, size: int, status: int, *, launcher: str) -> list[Any]:
    """Return the ranks' results in rank order, after `launcher` has ended with `status`.

    Raises:
        JobError: a rank has failed; shows the first one's traceback.
        LauncherError: the ranks have not started.
    """
    files = [directory / f"result-{rank}" for rank in range(size)]
    if not all(file.exists() for file in files):
        raise _explain(directory, size, status, launcher)
    if status != 0:
        warnings.warn(
            f"all ranks returned a result, but {launcher} ended with status {status}: a rank "
            "failed after its function had returned",
            stacklevel=3,
        )
    return [_load(file, rank) for rank, file in enumerate(files)]


def _load(file: Path, rank: int) -> Any:
    try:
        return pickle.loads(file.read_bytes())
    except Exception as exc:
        raise JobError(f"the result of rank {rank} cannot be loaded: {exc}", rank) from exc


@contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack before it ends this process, if that is what it would do."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Terminated(BaseException):
    """SIGTERM has arrived."""


def _raise_terminated(*_: object) -> None:
    raise _Terminated


def _explain(directory: Path, size: int, status: int, launcher: str) -> HvdkitError:
    """Return the error of a job without results."""
    notes = [Failure(**json.loads(file.read_text())) for file in directory.glob("failure-*.json")]
    if not notes:
        if (directory / "started").exists():
            return JobError(
                f"{launcher} ended with status {status} before all {size} ranks had returned. What "
                "it said is on stderr, and what ranks on other hosts said"
            )
        return LauncherError(
            f"{launcher} ended with status {status} before all {size} ranks had started. What it "
            "said is on stderr, and what ranks on other hosts said"
        )
    first, *others = sorted(notes, key=lambda note: (note.secondary, note.time))
    message = f"rank {first.rank} of {size} {first.what}\n"
    if first.details:
        message += f"\n{first.details}"
    if others:
        message += "\nAlso:\n" + describe_by_rank({note.rank: note.what for note in others})
    return JobError(message.rstrip(), first.rank)
