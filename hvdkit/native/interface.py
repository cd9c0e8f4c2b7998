"""What the reduction kernels promise, whoever does the work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np

from hvdkit.dtypes import ReduceOp

Array = np.ndarray[Any, np.dtype[Any]]


class Kernels(ABC):
    """Element-wise work on one-dimensional contiguous arrays of a dtype in `hvdkit.dtypes.DTYPES`.

    All implementations give the same bits (but for which NaN a sum of several NaNs is): integers
    wrap around; float16 and bfloat16 compute in float32 and round once, to nearest even; in Min and
    Max a NaN wins, and of +0 and -0 numpy's choice.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Who does the work: ``"native (avx2)"`` or ``"numpy"``."""

    @abstractmethod
    def reduce(self, out: Array, incoming: Array, op: ReduceOp, *, incoming_first: bool) -> None:
        """Set `out` to ``op(incoming, out)`` if `incoming_first`, else to ``op(out, incoming)``.

        Average sums; its division is `scale`'s.  The arrays have equal dtype and length, and do
        not overlap.

        Raises:
            TypeError: `op` is not defined for the dtype.
        """

    @abstractmethod
    def scale(self, array: Array, *, divisor: int = 1, factor: float = 1.0) -> None:
        """Divide by `divisor`, then multiply by `factor`, in place.

        Floats and complex numbers do so in their own precision (16-bit floats in float32, rounded
        once).  Integers are divided exactly, truncating toward zero; then multiplied as float64 and
        truncated toward zero, to the nearest that fits (NaN to 0).

        Raises:
            TypeError: `array` is bool and not both are one.
            ValueError: `divisor` is less than one.
        """

    @abstractmethod
    def convert(self, out: Array, source: Array) -> None:
        """Set `out` to `source` in the precision of `out`: floats, rounded to nearest even."""


class ShortWay(Protocol):
    """Calls of one collective that were made before, by dtype and shape and all other arguments."""

    def __call__(self, array: Any, /, *arguments: Any) -> Array:
        """Make the call again and return its result; NotImplemented if it is not known.

        So it is, too, where the lane is in use, or the array is not contiguous in C order.

        Raises:
            RuntimeError: of the arena, or of what is done after signatures differed.
        """

    def remember(
        self,
        array: Any,
        arguments: tuple[Any, ...],
        bound: Any,
        plan: Any,
        again: Any,
        result: tuple[Any, ...] | None,
        /,
    ) -> None:
        """Keep a call.

        Args:
            array: as in the call; only its dtype and shape matter.
            arguments: the call's others.
            bound: ``bound(array, target)`` makes it; a true result says that signatures differed.
            plan: what the group is said to be doing.
            again: then called with the array; returns the result, or None to try again.
            result: what the target is allocated with; None: it is the array itself.
        """

    def clear(self) -> None:
        """Forget all calls."""
