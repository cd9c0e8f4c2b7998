"""The index of a sharded checkpoint: what is in it, as JSON, and what may be."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvdkit.dtypes import DTYPES
from hvdkit.errors import ArgumentError, CheckpointError

#: The format written here, and the latest that is read.
VERSION = 1

INDEX = "index.json"

#: ``shard-<save>-<number>-of-<count>.safetensors``; the save is a random tag.
SHARD = re.compile(r"shard-([0-9a-f]{8})-[0-9]{5,}-of-[0-9]{5,}\.safetensors")

_PARTIAL = ".partial"

#: dtypes that a safetensors file holds.
_HELD = tuple(dtype for dtype in DTYPES if dtype != np.complex128)


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies, and what it is.

    Args:
        shard: the name of its file.
        dtype: its name, as numpy has it.
        shape: of the array.
        crc32: checksum of the bytes of the array, in C order.
    """

    shard: str
    dtype: str
    shape: tuple[int, ...]
    crc32: int

    @property
    def content(self) -> tuple[str, tuple[int, ...], int]:
        return self.dtype, self.shape, self.crc32


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds.

    Args:
        folder: where it is.
        shards: its files and their sizes in bytes, one for each rank that wrote.
        tensors: by global name.
        metadata: whatever else was saved with them.
    """

    folder: Path
    shards: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    metadata: dict[str, Any]

    def check(self, name: str, like: Any = None) -> None:
        """Refuse a tensor that is not there, or not `like` what it is to become.

        Raises:
            CheckpointError: with the nearest names that are there, or with both shapes.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            near = difflib.get_close_matches(name, self.tensors, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise CheckpointError(
                f"the checkpoint in {self.folder} has no tensor {name!r} "
                f"among its {len(self.tensors)}{hint}"
            )
        if like is None:
            return
        dtype, shape = np.dtype(like.dtype).name, tuple(like.shape)
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise CheckpointError(
                f"tensor {name!r} of the checkpoint in {self.folder} is "
                f"{tensor.dtype} {tensor.shape}, but {dtype} {shape} is wanted: "
                "build the model that was saved"
            )


def check_name(name: Any) -> None:
    """Refuse what cannot be the name of a tensor.  It never becomes a path, so ``"../x"`` can.

    Raises:
        ArgumentError: it is no text, empty, not printable, or the library's own.
    """
    if not isinstance(name, str) or not name or not name.isprintable() or name == "__metadata__":
        raise ArgumentError(
            f"a tensor cannot be called {name!r}: give printable text, not empty, "
            "and not '__metadata__'"
        )


def check_dtype(name: str, dtype: np.dtype[Any]) -> None:
    """Refuse a dtype that a shard does not hold.

    Raises:
        ArgumentError: with those that it does.
    """
    if dtype not in _HELD:
        known = ", ".join(held.name for held in _HELD)
        raise ArgumentError(f"tensor {name!r} is {dtype}; a checkpoint holds {known}")


def shard_name(tag: str, rank: int, ranks: int) -> str:
    """Return the name of a rank's file; `tag` is that of the save."""
    return f"shard-{tag}-{rank + 1:05}-of-{ranks:05}.safetensors"


def partial_name(name: str) -> str:
    """Return what a file, or the folder that it is written in, is called until it is complete."""
    return f"{name}{_PARTIAL}"


def leftovers(folder: Path, shards: Collection[str]) -> list[Path]:
    """Return whatever other saves than that of `shards` have left in `folder`."""
    return [
        path
        for path in folder.iterdir()
        if SHARD.fullmatch(path.name.removesuffix(_PARTIAL)) and path.name not in shards
    ]


def encode(
    shards: Mapping[str, int],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None,
) -> str:
    """Return the index as JSON.

    Raises:
        ArgumentError: JSON has no such metadata.
    """
    entries = {
        name: {"shard": t.shard, "dtype": t.dtype, "shape": t.shape, "crc32": t.crc32}
        for name, t in sorted(tensors.items())
    }
    try:
        content = {
            "version": VERSION,
            "metadata": dict(metadata or {}),
            "shards": dict(shards),
            "tensors": entries,
        }
        return json.dumps(content, allow_nan=False, indent=1) + "\n"
    except (TypeError, ValueError, RecursionError) as exc:
        raise ArgumentError(
            f"the metadata of a checkpoint cannot be written as JSON: {exc}; "
            "give dicts, lists, text, finite numbers, True, False and None"
        ) from exc


def read_index(folder: str | os.PathLike[str]) -> Index:
    """Read what a checkpoint holds, but no tensor.  Local.

    Raises:
        CheckpointError: there is none, it is damaged, or of a newer format.
    """
    folder = Path(folder)
    path = folder / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointError(
            f"there is no checkpoint in {folder}: cannot read {INDEX}: {exc.strerror}"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is damaged: {exc}") from exc
    try:
        return _decode(folder, content)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise CheckpointError(f"{path} is damaged: {type(exc).__name__}: {exc}") from exc


def _decode(folder: Path, content: Any) -> Index:
    """Return the index that is in `content`; any error but CheckpointError means damage."""
    version = content["version"]
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"version {version!r}")
    if version > VERSION:
        raise CheckpointError(
            f"the checkpoint in {folder} has format version {version}, and this hvdkit reads "
            f"{VERSION} at most: upgrade hvdkit"
        )
    shards = {name: _whole(nbytes) for name, nbytes in content["shards"].items()}
    _check_shards(shards)
    tensors = {
        name: Tensor(
            shard=entry["shard"],
            dtype=np.dtype(_known(entry["dtype"])).name,
            shape=tuple(_whole(length) for length in entry["shape"]),
            crc32=_whole(entry["crc32"]),
        )
        for name, entry in content["tensors"].items()
    }
    for name, tensor in tensors.items():
        if tensor.shard not in shards:
            raise ValueError(f"tensor {name!r} is in {tensor.shard!r}, which is no shard")
    return Index(folder, shards, tensors, dict(content["metadata"]))


def _check_shards(shards: Mapping[str, int]) -> None:
    """Refuse names that are no shards', such as paths, or that are not those of one save."""
    matches = {name: SHARD.fullmatch(name) for name in shards}
    tags = set()
    for name, match in matches.items():
        if match is None:
            raise ValueError(f"{name!r} is not the name of a shard")
        tags.add(match[1])
    if len(tags) > 1 or set(shards) != {
        shard_name(tag, rank, len(shards)) for tag in tags for rank in range(len(shards))
    }:
        raise ValueError(f"the shards are not those of one save: {', '.join(shards)}")


def _known(dtype: str) -> np.dtype[Any]:
    for held in _HELD:
        if held.name == dtype:
            return held
    raise ValueError(f"dtype {dtype!r}")


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a whole number")
    return value
