"""`Mesh`: the ranks as a grid whose axes have names.

    Mesh(data=2, pipeline=3)          pipeline
                                    0    1    2
                          data  0   0    1    2
                                1   3    4    5

The ranks along an axis through a rank are a process set: of rank 4, ``data`` is [1, 4] and
``pipeline`` [3, 4, 5].  The axis that is named last has neighbouring ranks, which mostly share a
node; so it is the one for whatever communicates most.
"""

from __future__ import annotations

import math
from itertools import product

from hvdkit.api import context
from hvdkit.errors import ArgumentError
from hvdkit.process_sets import ProcessSet

DATA, PIPELINE = "data", "pipeline"


class Mesh:
    """A grid of all ranks.  Creating it is collective; what it makes, it keeps until `shutdown`.

    Args:
        axes: how many ranks along each axis, by its name; one of them may be -1: as many as there
            are ranks for.

    Raises:
        ArgumentError: they do not multiply to the number of ranks.
    """

    def __init__(self, **axes: int) -> None:
        here = context()
        self.shape = _shape(axes, here.topology.size)
        """Ranks along each axis, by its name, the outermost first."""
        self._places = list(product(*map(range, self.shape.values())))
        self.rank = here.topology.rank
        self.coordinates = self.coordinates_of(self.rank)
        """Where this rank is, by axis."""
        self._sets: dict[str, ProcessSet] = {}
        for axis in self.shape:
            for ranks in self.lines(axis):
                process_set = here.process_sets.find_or_add(ranks)
                if self.rank in ranks:
                    self._sets[axis] = process_set

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self._places)

    def coordinates_of(self, rank: int) -> dict[str, int]:
        """Return where a rank is, by axis."""
        return dict(zip(self.shape, self._places[rank], strict=True))

    def rank_at(self, **coordinates: int) -> int:
        """Return the rank at a place; along the axes that are left out, this rank's own.

        Raises:
            ArgumentError: an axis or a place that there is not.
        """
        for axis, place in coordinates.items():
            if axis not in self.shape or not 0 <= place < self.shape[axis]:
                raise ArgumentError(f"there is no {axis}={place} in {self}")
        return self._places.index(tuple((self.coordinates | coordinates).values()))

    def process_set(self, axis: str) -> ProcessSet:
        """Return the ranks along an axis through this one, in order along it.

        Raises:
            ArgumentError: no such axis.
        """
        if axis not in self._sets:
            raise ArgumentError(f"{self} has no axis {axis!r}")
        return self._sets[axis]

    def size_of(self, axis: str) -> int:
        """Return the ranks along an axis; 1 if there is no such axis."""
        return self.shape.get(axis, 1)

    def place(self, axis: str) -> int:
        """Return this rank's place along an axis; 0 if there is no such axis."""
        return self.coordinates.get(axis, 0)

    def lines(self, axis: str) -> list[tuple[int, ...]]:
        """Return the ranks of every line along an axis, in order along it.

        Raises:
            ArgumentError: no such axis.
        """
        if axis not in self.shape:
            raise ArgumentError(f"{self} has no axis {axis!r}")
        dim = list(self.shape).index(axis)
        lines: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(self._places):
            lines.setdefault(place[:dim] + place[dim + 1 :], []).append(rank)
        return [tuple(ranks) for ranks in lines.values()]

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{axis}={size}' for axis, size in self.shape.items())})"


def _shape(axes: dict[str, int], ranks: int) -> dict[str, int]:
    """Return `axes` with whatever is -1 worked out.

    Raises:
        ArgumentError: they do not multiply to `ranks`.
    """
    described = ", ".join(f"{axis}={size}" for axis, size in axes.items())
    open_axes = [axis for axis, size in axes.items() if size == -1]
    known = math.prod(size for size in axes.values() if size != -1)
    if not axes or len(open_axes) > 1 or any(size < 1 and size != -1 for size in axes.values()):
        raise ArgumentError(
            f"Mesh({described}): a mesh has at least one axis, each of 1 rank or more; one of them "
            "may be -1"
        )
    if ranks % known or (not open_axes and known != ranks):
        raise ArgumentError(
            f"Mesh({described}) is for {known} ranks{' or a multiple' if open_axes else ''}, and "
            f"there are {ranks}: start as many, or change an axis"
        )
    return {axis: ranks // known if size == -1 else size for axis, size in axes.items()}
