"""One rank's file of a sharded checkpoint, in safetensors' format: to disk and back."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.arrays import contiguous
from hvdkit.dtypes import exported
from hvdkit.errors import CheckpointError, HvdkitError
from hvdkit.parallel.checkpoint_index import Index, Tensor, partial_name


def library() -> ModuleType:
    """Return the library that reads and writes the shards.

    Raises:
        HvdkitError: it is not installed.
    """
    try:
        import safetensors.numpy
    except ImportError as exc:
        raise HvdkitError(
            "checkpoints need the safetensors library: pip install safetensors"
        ) from exc
    return safetensors


def write_shard(path: Path, tensors: Mapping[str, Any]) -> tuple[str, int, dict[str, Tensor]]:
    """Write this rank's shard to disk; return its name, its bytes, and what is in it."""
    # The library writes an array's memory as it lies, whatever its strides.
    arrays = {name: contiguous(tensor) for name, tensor in tensors.items()}
    # It also writes to a file of a random name at first, which a crash would leave: hence a folder
    # of its own; and it lets nobody else read it, whatever the umask says.
    partial = path.with_name(partial_name(path.name))
    partial.mkdir()
    inside = partial / path.name
    inside.touch()
    mode = inside.stat().st_mode
    library().numpy.save_file(arrays, inside)
    inside.chmod(mode)
    flush(inside)
    inside.replace(path)
    partial.rmdir()
    held = {
        name: Tensor(path.name, array.dtype.name, array.shape, _crc32(array))
        for name, array in arrays.items()
    }
    return path.name, path.stat().st_size, held


def read_shard(index: Index, shard: str, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read the tensors called `names` from a shard that has them according to the index.

    Raises:
        CheckpointError: it is not there, or not as it was written.
    """
    path = index.folder / shard
    _check_size(path, index.shards[shard])
    try:
        with library().safe_open(path, framework="np") as opened:
            arrays = {name: opened.get_tensor(name) for name in names}
    except (HvdkitError, MemoryError):
        raise
    except Exception as exc:  # the library has an error of its own, and raises others too
        raise CheckpointError(f"{path} is damaged: {exc}") from exc
    for name, array in arrays.items():
        tensor = index.tensors[name]
        if (array.dtype.name, array.shape, _crc32(array)) != tensor.content:
            raise CheckpointError(
                f"{path} is damaged: tensor {name!r} is not what was saved; "
                "load an older checkpoint"
            )
    return arrays


def _check_size(path: Path, wanted: int) -> None:
    try:
        nbytes = path.stat().st_size
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}") from exc
    if nbytes != wanted:
        how = "truncated" if nbytes < wanted else "damaged"
        raise CheckpointError(f"{path} is {how}: {nbytes} bytes, where the index says {wanted}")


def _crc32(array: NDArray[Any]) -> int:
    return zlib.crc32(exported(array).reshape(-1).view(np.uint8).data)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that goes: the next save tries again."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
