"""Memory that the ranks of one node share: staging slots, and buffers that live in it.

The memory is an unnamed file in a tmpfs (``O_TMPFILE``): there is nothing to leave behind, however
a process ends.  Its blocks are allocated before it is mapped, so that too small a ``/dev/shm`` is
an error here instead of a SIGBUS later.
"""

from __future__ import annotations

import mmap
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.transport.base import Transport

_ALIGNMENT = 4096


def share_memory(local: Transport, nbytes: int, directory: Path) -> mmap.mmap | str:
    """Map `nbytes` of zeroed memory that all ranks of `local` share.  Collective.

    Returns:
        The mapping, or why there is none: then the same text, and no mapping, on every rank.
    """
    handle, trouble = -1, ""
    if local.rank == 0:
        try:
            handle = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(handle, 0, nbytes)
        except OSError as exc:
            trouble = f"{nbytes / 2**20:.1f} MiB cannot be had in {directory} ({exc.strerror})"
        except AttributeError:
            trouble = "this system has no O_TMPFILE"
    pid, number, trouble = local.broadcast_object((os.getpid(), handle, trouble), 0)
    memory = None
    if not trouble:
        try:
            if local.rank != 0:
                handle = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
            memory = mmap.mmap(handle, nbytes)
        except OSError as exc:
            trouble = f"rank {local.rank} of this node cannot map the memory of rank 0 ({exc})"
    troubles = [text for text in local.allgather_object(trouble) if text]
    if handle >= 0:
        os.close(handle)
    if troubles or memory is None:
        return troubles[0]
    return memory


class Arena:
    """The shared memory of one node's ranks, with the native module's collectives on it."""

    def __init__(self, local: Transport, memory: mmap.mmap, native: Any, directory: Path) -> None:
        self.native = native
        self._local = local
        self._memory = memory
        self._directory = directory
        self._gone: list[int] = []  # regions whose arrays are no more

    @classmethod
    def create(
        cls, local: Transport, *, slot_bytes: int, spin: int, directory: Path
    ) -> Arena | str:
        """Create the arena of the ranks in `local`.  Collective.

        Returns:
            The arena, or why there is none, the same on every rank.
        """
        from hvdkit.native import _native  # there is none where no C compiler was

        size = _native.arena_bytes(local.size, slot_bytes)
        memory = share_memory(local, size, directory)
        if isinstance(memory, str):
            return memory
        native = _native.Arena(memory, local.rank, local.size, slot_bytes, spin)
        local.allgather_object(None)  # nobody looks at a peer that has not yet signed in
        return cls(local, memory, native, directory)

    def empty(self, count: int, dtype: np.dtype[Any]) -> NDArray[Any] | None:
        """Return `count` zeroed elements in the arena, at the same place on all ranks.  Collective.

        Such a buffer is reduced in place, without staging.  None, with a warning, where the shared
        memory has no room for it.  The memory lives as long as an array over it, at least.
        """
        while self._gone:
            self.native.unregister(self._gone.pop())
        stride = -(-max(1, count * dtype.itemsize) // _ALIGNMENT) * _ALIGNMENT
        memory = share_memory(self._local, stride * self._local.size, self._directory)
        if isinstance(memory, str):
            if self._local.rank == 0:
                warnings.warn(
                    f"{memory}: a buffer is in private memory instead, which costs a copy",
                    stacklevel=3,
                )
            return None
        region = self.native.register(memory, stride)
        nbytes, offset = count * dtype.itemsize, self._local.rank * stride
        owner = np.frombuffer(memory, np.uint8, nbytes, offset)  # the base of all views of it
        weakref.finalize(owner, self._gone.append, region).atexit = False
        return owner.view(dtype)

    def close(self) -> None:
        """Leave the arena; its memory goes when the last buffer in it does."""
        self.native.close()
        self._local.close()
