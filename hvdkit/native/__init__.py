"""Reduction kernels and the shared-memory arena: compiled where there is a C compiler.

`load` gives the kernels, compiled or in numpy.  The arena is `hvdkit.native._native.Arena`, where
that module exists and runs on Linux; see `_native.pyi` for its promises.
"""

from __future__ import annotations

from hvdkit.native.interface import Kernels
from hvdkit.native.numpy_kernels import NumpyKernels

__all__ = ["Kernels", "NumpyKernels", "load", "why_unavailable"]


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
