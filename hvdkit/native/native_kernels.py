"""The kernels of the compiled module."""

from __future__ import annotations

from hvdkit.dtypes import DTYPE_CODES, ReduceOp, exported
from hvdkit.native import _native
from hvdkit.native.interface import Array, Kernels


class NativeKernels(Kernels):
    """Vectorised loops in C; other Python threads run during the large ones."""

    @property
    def name(self) -> str:
        return f"native ({_native.cpu_features()})"

    def reduce(self, out: Array, incoming: Array, op: ReduceOp, *, incoming_first: bool) -> None:
        code = DTYPE_CODES[out.dtype]
        _native.reduce(exported(out), exported(incoming), code, op, incoming_first)

    def scale(self, array: Array, *, divisor: int = 1, factor: float = 1.0) -> None:
        _native.scale(exported(array), DTYPE_CODES[array.dtype], divisor, factor)
