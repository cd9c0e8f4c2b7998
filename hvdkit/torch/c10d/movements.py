"""torch.distributed's other collectives on tensors: each converts, and calls the core's.

As in `hvdkit.torch.c10d.reductions`, but for any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvdkit import collectives
from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.errors import ArgumentError, MismatchError
from hvdkit.torch.c10d.checks import check_dtypes, check_parts, refusing
from hvdkit.torch.c10d.tensors import Target, source

Tensors = Sequence[torch.Tensor]


def broadcast(group: Group, tensors: Tensors, root: int) -> None:
    """Overwrite each tensor with the root's."""
    with refusing(group, "broadcast"):
        targets = [Target(tensor, moved=True) for tensor in tensors]
    for target in targets:
        collectives.broadcast(group, target.array, root=root, name=None, algorithm="auto")
        target.store()


def all_gather(group: Group, outputs: Tensors, inputs: Tensors) -> None:
    """Put all ranks' input, of one length, into the output one after the other."""
    with refusing(group, "allgather"):
        sources = [source(tensor, moved=True).reshape(-1) for tensor in inputs]
        targets = [Target(tensor, moved=True) for tensor in outputs]
        check_dtypes(sources, targets)
        for given, target in zip(sources, targets, strict=True):
            if given.size * group.size != target.array.size:
                raise ArgumentError(
                    f"{group.size} inputs of {given.size} elements do not fill the output, which "
                    f"has {target.array.size}"
                )
    for given, target in zip(sources, targets, strict=True):
        _allgather(group, given.reshape(1, -1), into=target.flat)
        target.store()


def all_gather_lists(group: Group, outputs: Sequence[Tensors], inputs: Tensors) -> None:
    """Put each rank's tensor into the output of its number; lengths may differ."""
    for several, given in zip(outputs, inputs, strict=True):
        _all_gather_list(group, several, given)


def _all_gather_list(group: Group, outputs: Tensors, given: torch.Tensor) -> None:
    with refusing(group, "allgather"):
        mine = source(given, moved=True).reshape(-1)
        targets = [Target(output, moved=True) for output in outputs]
        lengths = [target.array.size for target in targets]
        check_dtypes([mine], targets)
        check_parts("output", lengths, group.size)
        if lengths[group.rank] != mine.size:
            raise ArgumentError(
                f"the input has {mine.size} elements, and output {group.rank} {lengths[group.rank]}"
            )
    if len(set(lengths)) == 1:
        rows = list(_allgather(group, mine.reshape(1, -1)))
    else:
        group.agree(Call("allgather", None, (("lengths", str(lengths)),)))
        rows = _cut(_allgather(group, mine), lengths)
    _fill(targets, rows)


def gather(group: Group, outputs: Tensors, given: torch.Tensor, root: int) -> None:
    """Put each rank's tensor into the root's output of its number; others have no outputs."""
    with refusing(group, "alltoall"):
        mine = source(given, moved=True).reshape(-1)
        targets = [Target(output, moved=True) for output in outputs]
        check_dtypes([mine], targets)
        if group.rank == root:
            check_parts("output", [target.array.size for target in targets], group.size)
    splits = [mine.size if rank == root else 0 for rank in range(group.size)]
    received, lengths = _alltoall(group, mine, splits, name=f"gather to rank {root}")
    if group.rank == root:
        _check_lengths(targets, lengths)
        _fill(targets, _cut(received, lengths))


def scatter(group: Group, output: torch.Tensor, parts: Tensors, root: int) -> None:
    """Put the root's part of this rank's number into the output; others have no parts."""
    with refusing(group, "alltoall"):
        target = Target(output, moved=True)
        sources = [source(part, moved=True).reshape(-1) for part in parts]
        check_dtypes(sources, [target])
        if group.rank == root:
            check_parts("input", [part.size for part in sources], group.size)
    splits = [part.size for part in sources] or [0] * group.size
    given = np.concatenate(sources) if sources else np.empty(0, target.array.dtype)
    received, _ = _alltoall(group, given, splits, name=f"scatter from rank {root}")
    _check_lengths([target], [received.size])
    _fill([target], [received])


def all_to_all(
    group: Group,
    output: torch.Tensor,
    given: torch.Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
) -> None:
    """Send rows of the input to every rank, and receive into the output's; no splits: evenly."""
    with refusing(group, "alltoall"):
        target = Target(output, moved=True)
        rows = source(given, moved=True)
        check_dtypes([rows], [target])
    received, lengths = collectives.alltoall(
        group, rows, list(input_splits) or None, name=None, algorithm="auto"
    )
    expected = list(output_splits) or [len(target.array) // group.size] * group.size
    if lengths.tolist() != expected or received.size != target.array.size:
        raise MismatchError(
            f"alltoall: rows {lengths.tolist()} came from the ranks, and the output takes "
            f"{expected} of {tuple(output.shape)}\n"
            "output_split_sizes must be what the other ranks' input_split_sizes say."
        )
    _fill([target], [received])


def all_to_all_list(group: Group, outputs: Tensors, inputs: Tensors) -> None:
    """Send a tensor to every rank, and receive one from each; lengths may differ."""
    with refusing(group, "alltoall"):
        sources = [source(tensor, moved=True).reshape(-1) for tensor in inputs]
        targets = [Target(output, moved=True) for output in outputs]
        lengths = [part.size for part in sources]
        check_dtypes(sources, targets)
        check_parts("input", lengths, group.size)
        check_parts("output", [target.array.size for target in targets], group.size)
    received, came = _alltoall(group, np.concatenate(sources), lengths, name=None)
    _check_lengths(targets, came)
    _fill(targets, _cut(received, came))


def barrier(group: Group) -> None:
    """Wait for every rank."""
    collectives.barrier(group, name=None, algorithm="auto")


def _allgather(
    group: Group, given: NDArray[Any], *, into: NDArray[Any] | None = None
) -> NDArray[Any]:
    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.empty(shape, dtype) if into is None else into.reshape(shape)

    gathered: NDArray[Any] = collectives.allgather(
        group, given, name=None, algorithm="auto", allocate=allocate
    )
    return gathered


def _alltoall(
    group: Group, given: NDArray[Any], splits: Sequence[int], *, name: str | None
) -> tuple[NDArray[Any], list[int]]:
    received, lengths = collectives.alltoall(group, given, splits, name=name, algorithm="auto")
    return received, lengths.tolist()


def _cut(data: NDArray[Any], lengths: Sequence[int]) -> list[NDArray[Any]]:
    return np.split(data, list(accumulate(lengths))[:-1])


def _fill(targets: Sequence[Target], parts: Sequence[NDArray[Any]]) -> None:
    for target, part in zip(targets, parts, strict=True):
        target.flat[:] = part.reshape(-1)
        target.store()


def _check_lengths(targets: Sequence[Target], lengths: Sequence[int]) -> None:
    """Refuse what has come if it does not fit; every rank has done its part by now."""
    sizes = [target.array.size for target in targets]
    if sizes != list(lengths):
        raise MismatchError(
            f"the ranks sent {list(lengths)} elements, and the outputs have {sizes}\n"
            "Give the outputs the shapes of what the other ranks send."
        )
