"""A GPU without a GPU: streams are queues, and their work is done as late as possible, or at once.

    slow stream     does its work when a thread of the host waits for it, not before
    fast stream     does its work at once, up to the first wait for an event that has not come

Whatever is not waited for is therefore seen: what a slow stream is to write is not there yet, what
a fast one frees is in other hands.  Tensors on the GPU are `OnDevice`, in the CPU's memory.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

#: Threads begin at device 0, so that one which forgets to choose is seen.
DEVICE = torch.device("cuda", 1)

_GARBAGE = 77


class GpuError(AssertionError):
    """What a real GPU punishes some day: a race, a hidden wait, a context on another device."""


class Block:
    """Memory, which is in other hands once its owner is gone and `streams` have come so far."""

    def __init__(self, name):
        self.name, self.streams, self.reused = name, set(), False
        self.memory = None


class Stream:
    def __init__(self, gpu, name, *, fast):
        self.gpu, self.name, self.fast, self.device = gpu, name, fast, DEVICE
        self.queue, self.given, self.done = deque(), 0, 0

    def give(self, work, blocks=()):
        """Queue `work`, on memory in `blocks`; an event stands for the wait for it."""
        self.queue.append((work, blocks))
        self.given += 1
        self.gpu.pump()

    def blocked(self):
        work = self.queue[0][0]
        return isinstance(work, Event) and not work.query()

    def run_next(self):
        work, blocks = self.queue.popleft()
        for block in blocks:
            if block.reused:
                raise GpuError(f"{self.name} uses {block.name} that is in other hands by now")
        if not isinstance(work, Event):
            work()
        self.done += 1

    def advance(self, position):
        """Do what was given before `position`, and what that waits for."""
        while self.done < position:
            if self.blocked():
                event = self.queue[0][0]
                event.stream.advance(event.position)  # at which this one, if fast, goes on
            else:
                self.run_next()
        self.gpu.pump()

    def wait_event(self, event):
        if event.stream is not None:
            self.give(Event(self.gpu, event.stream, event.position))

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def record_event(self):
        return Event(self.gpu, self, self.given)

    def synchronize(self):
        self.advance(self.given)


class Event:
    def __init__(self, gpu, stream=None, position=0):
        self.gpu, self.stream, self.position = gpu, stream, position

    def record(self, stream):
        self.stream, self.position = stream, stream.given

    def query(self):
        return self.stream.done >= self.position

    def synchronize(self):
        self.gpu.check_device("an event is waited for")
        if self.stream is not None:
            self.stream.advance(self.position)


class Gpu:
    """`DEVICE`, in place of what torch has for CUDA.

    Args:
        monkeypatch: pytest's.
        fast: names of fast streams: "current", "other", and "side 0" and on in order of creation.
    """

    def __init__(self, monkeypatch, fast=()):
        self.fast = fast
        self.streams = []
        self.default, self.other = self._stream("current"), self._stream("other")
        self.here = threading.local()
        self.pinned = {}
        """Blocks by address."""
        self.registered = {}
        """Numbers of bytes by address."""
        self.refuses = self.error = 0
        """What `cudaHostRegister` returns, and what it has returned to nobody's notice."""
        self._patch(monkeypatch)

    def _stream(self, name):
        self.streams.append(Stream(self, name, fast=name in self.fast))
        return self.streams[-1]

    def pump(self):
        """Let fast streams do what they can."""
        if getattr(self.here, "pumping", False):
            return
        self.here.pumping = True
        try:
            while ready := [s for s in self.streams if s.fast and s.queue and not s.blocked()]:
                ready[0].run_next()
        finally:
            self.here.pumping = False

    def finish(self):
        """Do all that is left."""
        for stream in self.streams:
            stream.synchronize()

    def value(self, tensor):
        """Return what `tensor` is to the current stream now."""
        self.current.synchronize()
        return tensor.raw.clone()

    @property
    def device(self):
        return getattr(self.here, "device", 0)

    @property
    def current(self):
        return getattr(self.here, "stream", self.default)

    def check_device(self, what):
        if self.device != DEVICE.index:
            raise GpuError(f"{what} by a thread on device {self.device}, which gets a context so")

    # Memory

    def tensor(self, data):
        """Return a tensor on the device with the elements of `data`, which has them at once."""
        raw = data.clone() if data.is_contiguous() else data
        return OnDevice.of(raw, Lease(self, self.current))

    def copy(self, target, source, *, non_blocking):
        """Copy between the host and the device, or on it, on the current stream."""
        if any(_raw(tensor).is_conj() for tensor in (target, source)):
            raise GpuError("the CPU conjugates what has not arrived")
        sides, blocks = [], []
        for tensor in (target, source):
            if isinstance(tensor, OnDevice):
                sides.append(tensor.raw)
                blocks.append(tensor.lease.block)
                continue
            block = self._host_block(tensor)
            if tensor.numel() and (block is None or not non_blocking):
                raise GpuError("the thread waits for a copy")
            sides.append(tensor)
            if block is not None and block.memory is not None:  # pinned, and not kept by the copy
                block.streams.add(self.current)
                nbytes = tensor.numel() * tensor.element_size()
                plain = torch.from_numpy(block.memory)[:nbytes]
                sides[-1] = plain.view(tensor.dtype).view(tensor.shape)
            blocks += [block] if block is not None else []
        to, what = sides
        self.current.give(lambda: to.copy_(what), blocks)

    def _host_block(self, tensor):
        """Return the block of pinned or registered memory that begins where `tensor` does."""
        address = tensor.data_ptr()
        if address in self.registered:
            return Block(address)
        return self.pinned.get(address)

    def _pin(self, shape, dtype):
        """Return memory that the host gives out again when no copy of it is known of."""
        nbytes = torch.zeros((), dtype=dtype).element_size() * int(np.prod(shape))
        memory = np.empty(max(nbytes, 1), np.uint8).view(_Owner)
        block = self.pinned[memory.ctypes.data] = Block("pinned memory")
        block.memory = memory.base
        weakref.finalize(memory, self._unpin, memory.ctypes.data).atexit = False
        return torch.from_numpy(memory)[:nbytes].view(dtype).view(shape)

    def _unpin(self, address):
        block = self.pinned.pop(address)
        busy = [stream for stream in block.streams if stream.queue]
        if not busy:
            block.reused = True
        for stream in busy:
            stream.give(lambda: setattr(block, "reused", True))

    def _register(self, address, nbytes, flags):
        self.check_device("memory is registered")
        self.error = self.refuses
        if not self.refuses:
            assert (nbytes > 0, flags, address in self.registered) == (True, 0, False)
            self.registered[address] = nbytes
        return self.refuses

    def _unregister(self, address):
        self.check_device("memory is given back")
        del self.registered[address]
        for stream in self.streams:
            if any(block.name == address for _, blocks in stream.queue for block in blocks):
                raise GpuError(f"{stream.name} is yet to copy memory that is given back")

    # In place of torch

    @contextmanager
    def _on_device(self, device):
        before, self.here.device = self.device, torch.device(device).index
        try:
            yield
        finally:
            self.here.device = before

    @contextmanager
    def _on_stream(self, stream):
        self.check_device("a stream is chosen and left")
        before, self.here.stream = self.current, stream
        try:
            yield
        finally:
            self.here.stream = before

    def _whole_device(self, *_):
        raise GpuError("the thread waits for the whole device")

    def _patch(self, monkeypatch):
        runtime = SimpleNamespace(
            cudaHostRegister=self._register, cudaHostUnregister=self._unregister
        )
        for name, fake in {
            "Stream": lambda _: self._stream(f"side {len(self.streams) - 2}"),
            "Event": lambda **_: Event(self),
            "stream": self._on_stream,
            "device": self._on_device,
            "current_stream": lambda _: self.current,
            "synchronize": self._whole_device,
            "cudart": lambda: runtime,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        empty, zeros, zeros_like = torch.empty, torch.zeros, torch.zeros_like

        def any_empty(shape, *, device=None, dtype=None, pin_memory=False):
            made = self._pin(shape, dtype) if pin_memory else empty(shape, dtype=dtype)
            return self.tensor(made.fill_(_GARBAGE)) if device == DEVICE else made

        def any_zeros(*shape, device=None, **how):
            if device == DEVICE and self.error:
                self.error = 0
                raise RuntimeError("CUDA error: that of an earlier call")
            return zeros(*shape, **how)

        def any_zeros_like(tensor, *, device=None):
            if device != DEVICE:
                return zeros_like(tensor)
            return self.tensor(torch.full_like(tensor, _GARBAGE)).zero_()

        monkeypatch.setattr(torch, "empty", any_empty)
        monkeypatch.setattr(torch, "zeros", any_zeros)
        monkeypatch.setattr(torch, "zeros_like", any_zeros_like)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda t: self._host_block(t) is not None)


class _Owner(np.ndarray):
    """Memory whose end can be noticed."""


class Lease:
    """What the tensors of a block share: when it goes, work of `stream` may have the block.

    That is after what `Block.streams` were given before.  Work under way does not hold a lease.
    """

    def __init__(self, gpu, stream):
        self.gpu, self.block, self._stream = gpu, Block("device memory"), stream

    def __del__(self):
        block, stream = self.block, self._stream
        for user in block.streams - {stream}:
            stream.wait_stream(user)
        stream.give(lambda: setattr(block, "reused", True))


#: What looks at a tensor, or makes a view of it, without touching the elements.
_LOOKS = ("data_ptr", "numel", "element_size", "is_conj", "is_neg", "is_contiguous", "__get__")
_VIEWS = ("detach", "view", "reshape", "__getitem__", "t")


class OnDevice(torch.Tensor):
    """A tensor on the fake device: what touches elements is given to the current stream."""

    device = DEVICE
    is_cuda = True

    @classmethod
    def of(cls, raw, lease):
        tensor = raw.as_subclass(cls)
        tensor.raw, tensor.lease = raw, lease
        return tensor

    def record_stream(self, stream):
        self.lease.block.streams.add(stream)

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        keywords, name = keywords or {}, function.__name__
        here = [argument for argument in arguments if isinstance(argument, OnDevice)]
        gpu, raw = here[0].lease.gpu, [_raw(argument) for argument in arguments]
        same = (name == "contiguous" and raw[0].is_contiguous()) or (
            name in ("resolve_conj", "resolve_neg") and not (raw[0].is_conj() or raw[0].is_neg())
        )
        if name in _LOOKS:
            return function(*raw, **keywords)
        if name in _VIEWS or same:
            return cls.of(function(*raw, **keywords), here[0].lease)
        if name == "copy_":
            gpu.copy(*arguments, non_blocking=keywords.get("non_blocking", bool(len(here) - 1)))
            return arguments[0]
        blocks = [tensor.lease.block for tensor in here]
        if name.endswith("_"):
            gpu.current.give(lambda: function(*raw, **keywords), blocks)
            return arguments[0]
        made = gpu.tensor(torch.full_like(function(*raw, **keywords), _GARBAGE))
        to = made.raw
        gpu.current.give(lambda: to.copy_(function(*raw, **keywords)), [*blocks, made.lease.block])
        return made


def _raw(tensor):
    return tensor.raw if isinstance(tensor, OnDevice) else tensor
