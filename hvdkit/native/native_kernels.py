"""The kernels of the compiled module."""

from __future__ import annotations

import numpy as np

from hvdkit.dtypes import DTYPE_CODES, ReduceOp, bfloat16, exported
from hvdkit.native import _native
from hvdkit.native.interface import Array, Kernels

#: What the module converts to and from float32; anything else is numpy's.
_CONVERTED = (np.dtype(np.float16), bfloat16, np.dtype(np.float64))


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

    def convert(self, out: Array, source: Array) -> None:
        dtypes = (out.dtype, source.dtype)
        if np.float32 in dtypes and any(dtype in _CONVERTED for dtype in dtypes):
            codes = [DTYPE_CODES[dtype] for dtype in dtypes]
            _native.convert(exported(out), codes[0], exported(source), codes[1])
        else:
            with np.errstate(all="ignore"):
                np.copyto(out, source, casting="unsafe")
