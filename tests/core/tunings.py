"""Tunings that were never measured, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hvdkit.schedules.machine import Level
from hvdkit.tuning.record import Cell, Levels, Tuning, World

KIB, MIB = 1024, 1024 * 1024

WORLD = World(
    hvdkit="0.1.0",
    machines=("Some CPU, 2 cores",),
    nodes=(4,),
    transport="mpi",
    library="Open MPI 5.0.11",
    kernels="numpy",
    shared_memory=True,
)
LEVELS = Levels(
    memory=Level(5e-7, 5e-11, 3e-11),
    within=Level(15e-6, 1e-10, 3e-11, at_once=0.75),
    across=Level(60e-6, 8e-9, 3e-11, at_once=0.25),
    check=(1e-5, 4e-5),
)


def cells(seconds: Mapping[int, float], margin: float = 0.0) -> tuple[Cell, ...]:
    """Return measurements by their bytes, each with a margin that is a share of it."""
    return tuple(
        Cell(nbytes, time, float(f"{margin * time:.4g}")) for nbytes, time in seconds.items()
    )


def tuning(
    nodes: Sequence[int] = (4,),
    *,
    library: str = WORLD.library,
    allreduce: Mapping[str, Any] | None = None,
    **parts: Any,
) -> Tuning:
    """Return a tuning for so many ranks on each node, with these times of all-reduces."""
    return Tuning(
        world=replace(WORLD, nodes=tuple(nodes), library=library),
        measured="2026-11-21 12:00",
        hosts=("alpha",),
        levels=parts.pop("levels", LEVELS),
        grid={"allreduce": dict(allreduce)} if allreduce else {},
        **parts,
    )
