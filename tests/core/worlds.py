"""Ranks that are threads of this process, for tests that never start MPI."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives import frames
from hvdkit.collectives.group import Group
from hvdkit.native import Kernels, NumpyKernels, load, why_unavailable
from hvdkit.transport.threads import ThreadTransport, ThreadWorld

#: Long enough for a busy machine, short enough for a hang to be noticed.
SECONDS = 30.0


def every_kernels() -> list[Kernels]:
    """The kernels that can be had here: numpy's, and the compiled ones where they are built."""
    return [NumpyKernels()] if why_unavailable() else [NumpyKernels(), load()]


def on_ranks(size: int, body: Callable[[ThreadTransport], Any]) -> list[Any]:
    """Call `body` on the ranks of a new world; its results in rank order."""
    return ThreadWorld(size).run(body, timeout=SECONDS)


def in_group(
    size: int,
    body: Callable[[Group], Any],
    *,
    segment_bytes: int = 64,
    kernels: Kernels | None = None,
) -> list[Any]:
    """Call `body` on each rank of a group without shared memory; its results in rank order."""

    def rank(transport: ThreadTransport) -> Any:
        return body(
            Group(
                transport,
                kernels or NumpyKernels(),
                "threads share none",
                segment_bytes=segment_bytes,
                spin=0,
            )
        )

    return on_ranks(size, rank)


def outcomes(size: int, body: Callable[[Group], Any]) -> list[Exception | None]:
    """Return the exception, or None, with which `body` ends on each rank of a group."""

    def catching(group: Group) -> Exception | None:
        try:
            body(group)
        except Exception as exc:
            return exc
        return None

    return in_group(size, catching)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when something has come true."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def changes_of(state: NDArray[np.int64]) -> list[int]:
    """Return the numbers that change with what is expected, of the state of frames."""
    each = state[frames.COUNTS :].reshape(frames.MOST_EXPECTED, -1)
    return [state.item(frames.CHANGES), *each[:, frames.VERSION].tolist()]
