"""Buckets of gradients that are on a GPU: one flat tensor there for each buffer of the reducer.

    current stream   ... g3 g2 |                                         waits | optimizer
    to the host           waits | bucket -> buffer
    lane's thread                            waits | all-reduce
    to the device                                           buffer -> bucket |

Parameters' gradients are views of the flat tensors, so that a bucket goes over in one copy.  A
bucket is on its way to the host as soon as it is full, while the one before it is reduced.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from hvdkit.torch.convert import tensor_of
from hvdkit.torch.ports import SideStreams, on_stream, pinned, side_streams

if TYPE_CHECKING:
    from hvdkit.engine.reducer import GradientReducer


class DeviceBuckets:
    """Fulfils `hvdkit.engine.reducer.Staging` for one CUDA device, of a known index."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = side_streams(device)
        self._buffers: list[torch.Tensor] = []
        self._hosts: list[torch.Tensor] = []  # pinned: the buffers themselves, if they can be
        self._buckets: list[torch.Tensor] = []
        self._arrived: list[Any] = []
        self._writers: list[set[Any]] = []  # streams that have put gradients into the bucket
        self._release: Any = None

    def views(self, reducer: GradientReducer) -> list[torch.Tensor | None]:
        """Make the buckets for the reducer's buffers; return each gradient's place in them.

        Again, after `reducer.finish` and `wait`, when the reducer has other buffers.
        """
        for bucket in self._buckets:  # what is in it is yet to be read, by the current stream
            bucket.record_stream(self._current())
        if self._release is not None:
            self._release()
        self._buffers = [tensor_of(buffer) for buffer in reducer.buffers]
        self._hosts = [_pin(buffer, self._device) for buffer in self._buffers]
        self._buckets = [torch.zeros_like(buffer, device=self._device) for buffer in self._buffers]
        # A thread that waits sleeps: backward, which it waits for, needs the core.
        self._arrived = [torch.cuda.Event(blocking=True) for _ in self._hosts]
        self._writers = [set() for _ in self._hosts]
        registered = [
            host
            for host, buffer in zip(self._hosts, self._buffers, strict=True)
            if host is buffer and host.numel()
        ]
        self._release = weakref.finalize(self, _unpin, registered, self._side)
        self._release.atexit = False  # there may be no CUDA any more
        views: list[torch.Tensor | None] = [None] * len(reducer.gradients)
        for plan, flat in zip(reducer.buckets, self._buckets, strict=True):
            for index, offset in zip(plan.members, plan.offsets, strict=True):
                gradient = reducer.gradients[index]
                views[index] = flat[offset : offset + gradient.count].view(gradient.shape)
        return views

    def came(self, number: int) -> None:
        self._writers[number].add(self._current())

    def filled(self, number: int) -> None:
        stream = self._side.to_host
        for writer in {*self._writers[number], self._current()}:
            stream.wait_stream(writer)
        self._writers[number].clear()
        with on_stream(stream):
            self._hosts[number].copy_(self._buckets[number], non_blocking=True)
            self._arrived[number].record(stream)

    def fetch(self, number: int) -> None:
        with torch.cuda.device(self._device):
            self._arrived[number].synchronize()
        host, buffer = self._hosts[number], self._buffers[number]
        if host is not buffer:
            buffer.copy_(host)

    def store(self, number: int) -> None:
        host, buffer = self._hosts[number], self._buffers[number]
        if host is not buffer:
            host.copy_(buffer)
        with on_stream(self._side.to_device):
            self._buckets[number].copy_(host, non_blocking=True)

    def wait(self) -> None:
        """Let the current stream go on only with what `store` has started to bring back."""
        self._current().wait_stream(self._side.to_device)

    def _current(self) -> Any:
        return torch.cuda.current_stream(self._device)


def _pin(buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `buffer`, which is the GPU's to copy from and to now, or pinned memory in its place.

    Pageable memory would not do: a copy to it holds up the thread that asks for it.
    """
    nbytes = buffer.numel() * buffer.element_size()
    if not nbytes:
        return buffer
    with torch.cuda.device(device):
        error = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), nbytes, 0))
    if not error:
        return buffer
    with suppress(RuntimeError):  # CUDA keeps the error for the next kernel: let it be this one
        torch.zeros(1, device=device)
    warnings.warn(
        f"the GPU cannot copy from shared memory directly (cudaHostRegister: error {error}): "
        "gradients are copied to pinned memory first, which takes longer",
        stacklevel=2,
    )
    return pinned(tuple(buffer.shape), buffer.dtype)


def _unpin(registered: Sequence[torch.Tensor], side: SideStreams) -> None:
    """Take the memory back from the GPU, after its last copy."""
    for stream in side:
        stream.synchronize()
    with torch.cuda.device(side.to_host.device):
        for host in registered:
            torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
