"""How a call through the arena is made again: what the short way of `hvdkit.native` keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hvdkit.collectives.calls import Call


class Bound(Protocol):
    """A collective of the arena from a source to a target, with all else bound."""

    calls: int
    nanoseconds: int

    def __call__(self, source: NDArray[Any], target: NDArray[Any]) -> int:
        """Return nonzero if ranks' signatures differed."""
        ...


@dataclass(frozen=True)
class Repeat:
    """A call that can be made again with another array of the same shape and dtype."""

    call: Call
    dtype: np.dtype[Any]
    nbytes: int
    bound: Bound
    again: Callable[[NDArray[Any]], NDArray[Any] | None]
    """Called after signatures differed; returns the result, or None to try again."""
    shape: tuple[int, ...] | None = None
    """Of the result; None: the array itself."""

    @property
    def tally(self) -> tuple[str, str, str, int, int, float]:
        """What the arena counted of `bound`; see `Group.counts`."""
        calls, seconds = self.bound.calls, self.bound.nanoseconds * 1e-9
        return self.call.kind, self.dtype.name, "shm", calls, calls * self.nbytes, seconds


Remember: TypeAlias = Callable[[Repeat], None]
