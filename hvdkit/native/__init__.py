"""Reduction kernels and the shared-memory arena: compiled where there is a C compiler.

`load` gives the kernels, compiled or in numpy.  The arena is `hvdkit.native._native.Arena`, where
that module exists and runs on Linux; see `_native.pyi` for its promises.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hvdkit.native.interface import Kernels, ShortWay
from hvdkit.native.numpy_kernels import NumpyKernels

__all__ = [
    "Kernels",
    "NumpyKernels",
    "ShortWay",
    "load",
    "persistent",
    "quick_gathered",
    "quick_schedule",
    "recurring",
    "short_way",
    "swap",
    "why_unavailable",
]


def why_unavailable() -> str | None:
    """Return why the compiled module cannot be imported, or None if it can."""
    try:
        import hvdkit.native._native  # noqa: F401
    except ImportError as exc:
        return str(exc)
    return None


def load(*, enabled: bool = True) -> Kernels:
    """Return the compiled kernels, or numpy's if they are missing or not `enabled`."""
    if not enabled or why_unavailable() is not None:
        return NumpyKernels()
    from hvdkit.native.native_kernels import NativeKernels

    return NativeKernels()


def short_way(lane: Any, group: Any) -> ShortWay:
    """Return the short way of one collective through `lane`; without the module, none."""
    if why_unavailable() is not None:
        return NoShortWay()
    from hvdkit.native import _native

    return _native.ShortWay(np.ndarray, np.empty, lane, group)


def recurring(otherwise: Any, signature: int) -> Any:
    """Return an all-reduce that asks `otherwise` when it must; None without the module."""
    if why_unavailable() is not None:
        return None
    from hvdkit.native import _native

    return _native.Recurring(otherwise, signature)


def quick_gathered(*parts: Any) -> Any:
    """Return an all-reduce in frames as one call; needs the module."""
    from hvdkit.native import _native

    return _native.Gathered(*parts)


def quick_schedule(*parts: Any) -> Any:
    """Return the steps of a short message as one call; None without the module."""
    if why_unavailable() is not None:
        return None
    from hvdkit.native import _native

    return _native.Schedule(*parts)


def persistent(*messages: Any) -> Any:
    """Return messages of an MPI library to start again and again; None without the module."""
    if why_unavailable() is not None:
        return None
    from hvdkit.native import _native

    return _native.Persistent(*messages)


def swap(handles: tuple[int, ...], *messages: Any) -> list[tuple[int, bytes, bytes]] | None:
    """Exchange messages over sockets as far as can be at once; needs the module."""
    from hvdkit.native import _native

    return _native.swap(handles, *messages)


class NoShortWay:
    """Remembers nothing, for nothing would be gained."""

    def __call__(self, *_call: Any) -> Any:
        return NotImplemented

    def remember(self, *_call: Any) -> None:
        pass

    def clear(self) -> None:
        pass
