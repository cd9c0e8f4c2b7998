"""What a call of torch.distributed must satisfy on each rank, and how the others learn if not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from hvdkit.collectives.group import Group
from hvdkit.errors import ArgumentError, HvdkitError
from hvdkit.torch.c10d.tensors import Target


@contextmanager
def refusing(group: Group, kind: str) -> Iterator[None]:
    """Tell the ranks that wait in the same call if this one cannot make it."""
    try:
        yield
    except HvdkitError as exc:
        group.refuse(kind, None, exc)


def check_dtypes(sources: Sequence[NDArray[Any]], targets: Sequence[Target]) -> None:
    dtypes = {array.dtype.name for array in [*sources, *(target.array for target in targets)]}
    if len(dtypes) > 1:
        raise ArgumentError(
            f"inputs and outputs have different dtypes: {', '.join(sorted(dtypes))}"
        )


def check_parts(what: str, lengths: Sequence[int], size: int) -> None:
    if len(lengths) != size:
        raise ArgumentError(f"{len(lengths)} {what} tensors were given, for {size} ranks")
