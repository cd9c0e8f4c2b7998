"""Where a tensor's elements can be read and written by the core: in place, or staged from a GPU.

    CPU     the tensor's own memory
    CUDA    current stream   ... computes x |                                  waits | uses y
            to the host                waits | x -> pinned
            hvdkit's thread                              waits | collective
            to the device                                               pinned -> y |

A tensor on a GPU is copied to pinned memory and back on two side streams, one for each direction:
copies this way do not queue behind those that way, and the link carries both at once.  Streams wait
for each other on the GPU; a thread waits for its own copies alone, and never for a whole device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hvdkit.arrays import contiguous
from hvdkit.torch.convert import array_of, check_tensor, tensor_of


class SideStreams(NamedTuple):
    """The streams on which a device's memory is copied."""

    to_host: Any
    to_device: Any


_side_streams: dict[torch.device, SideStreams] = {}


def side_streams(device: torch.device) -> SideStreams:
    """Return the streams on which `device`, of a known index, copies to and from the host."""
    streams = _side_streams.get(device)
    if streams is None:
        made = SideStreams(torch.cuda.Stream(device), torch.cuda.Stream(device))
        streams = _side_streams.setdefault(device, made)
    return streams


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Let what this thread gives to `stream`'s device go to `stream`.

    The device is chosen first, for its context manager is the one that leaves without going back
    to a device that the thread has not used: on device 0 every rank would get a context so.
    """
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


class Source:
    """A tensor that a collective reads.

    Args:
        tensor: of any strides; what the current stream has been given to do comes first.  It must
            stay as it is until `fetch` has returned, but need not be kept.
    """

    __slots__ = ("_arrived", "_device", "array")

    def __init__(self, tensor: torch.Tensor) -> None:
        check_tensor(tensor)
        self._device = tensor.device
        self._arrived: Any = None
        if tensor.device.type == "cpu":
            self.array: NDArray[Any] = contiguous(array_of(tensor))
            return
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        host = pinned(tuple(tensor.shape), tensor.dtype)
        self.array = array_of(host)
        stream = side_streams(tensor.device).to_host
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with on_stream(stream):
            host.copy_(plain, non_blocking=True)
            self._arrived = stream.record_event()
        plain.record_stream(stream)

    def fetch(self) -> None:
        """Return when the elements are in `array`.  On any thread."""
        if self._arrived is not None:
            with torch.cuda.device(self._device):
                self._arrived.synchronize()


class Result:
    """What a collective leaves, on its way to where the user wants it.

    Args:
        array: the elements, in the host's memory: all of a `Source`'s array, or any other.
        device: where they are wanted.
        into: the tensor that is to have them; None: a new one.
    """

    __slots__ = ("_stored", "_tensor")

    def __init__(
        self, array: NDArray[Any], device: torch.device, into: torch.Tensor | None = None
    ) -> None:
        self._stored: Any = None
        host = tensor_of(array)
        if device.type == "cpu":
            if into is None:
                self._tensor = host
                return
            self._tensor = into
            if into.data_ptr() != host.data_ptr():
                into.detach().copy_(host)
            return
        stream = side_streams(device).to_device
        if not host.is_pinned():
            host = pinned(tuple(host.shape), host.dtype).copy_(host)
        with on_stream(stream):
            if into is None:
                into = torch.empty(host.shape, dtype=host.dtype, device=device)
            # Pinned memory that is let go of meanwhile is kept by torch until it has been copied.
            into.detach().copy_(host, non_blocking=True)
            self._stored = stream.record_event()
        into.record_stream(stream)
        self._tensor = into

    def tensor(self) -> torch.Tensor:
        """Return the tensor; what the current stream does from now on sees its elements."""
        if self._stored is not None:
            current = torch.cuda.current_stream(self._tensor.device)
            current.wait_event(self._stored)
            self._tensor.record_stream(current)
        return self._tensor


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return host memory that a GPU can copy from and to while the CPU goes on."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def new_array(like: NDArray[Any]) -> NDArray[Any]:
    """Return an array for a result."""
    return np.empty(like.shape, like.dtype)
