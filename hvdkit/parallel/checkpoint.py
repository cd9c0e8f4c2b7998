"""Sharded checkpoints: each rank writes the tensors that it owns, rank 0 the index; no pickle.

A folder holds one checkpoint::

    index.json                             which file holds which tensor; metadata
    shard-9f1c02d7-00001-of-00004.safetensors
    ...

Names of tensors are global ("layers.3.weight"), so that a job with another mesh finds in the index
what it now owns.  Every save writes shards under new names and then replaces the index, in one
step: until then the older checkpoint is whole, and a crash leaves nothing but files that the next
save sweeps up.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from hvdkit.arrays import contiguous
from hvdkit.errors import (
    CheckpointError,
    HvdkitError,
    MismatchError,
    describe_by_rank,
    format_ranks,
)
from hvdkit.parallel.checkpoint_index import (
    INDEX,
    Index,
    Tensor,
    check_dtype,
    check_name,
    encode,
    leftovers,
    partial_name,
    read_index,
    shard_name,
)
from hvdkit.parallel.checkpoint_shards import flush, library, read_shard, remove, write_shard

__all__ = ["Index", "Ranks", "Tensor", "load", "read_index", "save"]

T = TypeVar("T")


class Ranks(Protocol):
    """What `save` asks of the ranks that write together; a `Communicator` has it."""

    rank: int
    size: int

    def allgather_object(self, value: T) -> list[T]:
        """Return every rank's `value`, in rank order: for small control data only."""
        ...


class _Alone:
    """One rank, with nobody to ask."""

    rank, size = 0, 1

    def allgather_object(self, value: T) -> list[T]:
        return [value]


def save(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    among: Ranks | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint of the tensors of all ranks.  Collective; returns when it is complete.

    It replaces the checkpoint that is in `folder`, at once and as a whole, or not at all.

    Args:
        folder: on a file system that all ranks share; made if it is not there.
        tensors: those that this rank owns, as arrays by global name.  Of replicas one rank alone
            must hand them over.  Any dtype but complex128, any shape; contiguous or not.
        among: the ranks that write; None: this one alone.
        metadata: whatever else, as JSON has it (tuples come back as lists): the step, the shape of
            the mesh.  Rank 0's is written; that of others is not looked at.

    Raises:
        ArgumentError: a name, a dtype or the metadata cannot be written; on the others too.
        MismatchError: several ranks handed over the same name; on every rank.
        CheckpointError: a rank could not write; on every rank, naming it.
    """
    folder = Path(folder)
    among = _Alone() if among is None else among
    tag = secrets.token_hex(4)  # rank 0's is taken

    def check() -> tuple[str, list[str]]:
        library()
        encode({}, {}, metadata if among.rank == 0 else None)
        for name, tensor in tensors.items():
            check_name(name)
            check_dtype(name, contiguous(tensor).dtype)
        return tag, list(tensors)

    checked = _on_every_rank(among, check, f"cannot save a checkpoint to {folder}")
    _refuse_doubles([names for _, names in checked])
    mine = folder / shard_name(checked[0][0], among.rank, among.size)

    def write() -> tuple[str, int, dict[str, Tensor]]:
        folder.mkdir(parents=True, exist_ok=True)
        return write_shard(mine, tensors)

    def drop() -> None:
        remove(mine)
        remove(folder / partial_name(mine.name))

    failure = f"the checkpoint in {folder} is as it was before"
    written = _on_every_rank(among, write, failure, undo=drop)

    def commit() -> None:
        if among.rank == 0:
            _write_index(folder, written, metadata)

    # No undo: whoever loses touch with rank 0 here cannot know whether its shard is in use.
    _on_every_rank(among, commit, f"cannot bring the new checkpoint in {folder} into force")


def load(
    folder: str | os.PathLike[str], names: Iterable[str] | Mapping[str, Any] | None = None
) -> dict[str, NDArray[Any]]:
    """Read tensors of a checkpoint, whichever files hold them; no other file is opened.  Local.

    Whoever saves meanwhile does no harm to one rank; the ranks of a job must load while none does,
    or they may find different checkpoints.

    Args:
        folder: of the checkpoint.
        names: those wanted, or a mapping from them to arrays (or anything with a shape and numpy's
            dtype) that they must be like; None: all.

    Returns:
        New, writable arrays by name, in the order of `names`.

    Raises:
        CheckpointError: a tensor is not there or not like that, or a file is missing or damaged.
    """
    if names is not None and not isinstance(names, Mapping):
        names = dict.fromkeys(names)
    while True:
        index = read_index(folder)
        try:
            return _load(index, dict.fromkeys(index.tensors) if names is None else names)
        except CheckpointError:
            # Another job may have saved meanwhile, and swept these shards away.
            if read_index(folder).shards.keys() == index.shards.keys():
                raise


def _load(index: Index, wanted: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    for name, like in wanted.items():
        index.check(name, like)
    by_shard: dict[str, list[str]] = {}
    for name in wanted:
        by_shard.setdefault(index.tensors[name].shard, []).append(name)
    arrays: dict[str, NDArray[Any]] = {}
    for shard, held in by_shard.items():
        arrays.update(read_shard(index, shard, held))
    return {name: arrays[name] for name in wanted}


def _refuse_doubles(names: list[list[str]]) -> None:
    owners: dict[str, list[int]] = {}
    for rank, owned in enumerate(names):
        for name in owned:
            owners.setdefault(name, []).append(rank)
    doubles = {name: ranks for name, ranks in owners.items() if len(ranks) > 1}
    if doubles:
        name, ranks = next(iter(doubles.items()))
        more = f" (and {len(doubles) - 1} more)" if len(doubles) > 1 else ""
        raise MismatchError(
            f"{format_ranks(ranks)} all handed over tensor {name!r}{more}: of the replicas of a "
            "tensor let one rank write it"
        )


def _on_every_rank(
    among: Ranks,
    act: Callable[[], T],
    failure: str,
    *,
    undo: Callable[[], None] | None = None,
) -> list[T]:
    """Let each rank `act`; return all results on all, or `undo` and raise on all if one failed.

    Raises:
        HvdkitError: this rank's own error, if it had one; else CheckpointError with the others'.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = act()
    except Exception as exc:
        error = exc
    text = None if error is None else f"{type(error).__name__}: {error}"
    outcomes = among.allgather_object((result, text))
    errors = {rank: text for rank, (_, text) in enumerate(outcomes) if text is not None}
    if not errors:
        return [value for value, _ in outcomes]  # type: ignore[misc]
    if undo is not None:
        undo()
    if isinstance(error, HvdkitError):
        raise error
    raise CheckpointError(f"{failure}\n{describe_by_rank(errors)}") from error


def _write_index(
    folder: Path,
    written: Sequence[tuple[str, int, dict[str, Tensor]]],
    metadata: Mapping[str, Any] | None,
) -> None:
    """Make the new checkpoint the one that `folder` holds, and sweep up after older ones.

    Raises:
        CheckpointError: a rank's shard cannot be seen from here.
    """
    shards: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for rank, (name, nbytes, held) in enumerate(written):
        path = folder / name
        if not path.is_file() or path.stat().st_size != nbytes:
            raise CheckpointError(
                f"rank 0 does not see {path}, which rank {rank} wrote: "
                "give a folder on a file system that all ranks share"
            )
        shards[name] = nbytes
        tensors.update(held)
    partial = folder / partial_name(INDEX)
    partial.write_text(encode(shards, tensors, metadata), encoding="utf-8")
    flush(partial)
    flush(folder)  # the names of the shards, before anything refers to them
    partial.replace(folder / INDEX)
    flush(folder)
    for leftover in leftovers(folder, shards):
        remove(leftover)
