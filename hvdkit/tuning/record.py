"""What one run of ``hvdkit tune`` has found, and where it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from hvdkit.schedules.machine import USUAL, Level, Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What times depend on; figures hold where all of this is the same.

    Args:
        hvdkit: its version.
        machines: the kinds of machines, such as ``"AMD EPYC 9V74, 2 cores"``.
        nodes: how many ranks each node has, in the order of the ranks.
        transport: ``"mpi"`` or ``"tcp"``.
        library: the MPI library, if it is MPI.
        kernels: what reduces.
        shared_memory: whether the ranks of a node share some.
    """

    hvdkit: str
    machines: tuple[str, ...]
    nodes: tuple[int, ...]
    transport: str
    library: str
    kernels: str
    shared_memory: bool

    def differences(self, other: World) -> list[str]:
        """Return what is other in `other`, such as ``"the machine: A; here: B"``."""
        mine, theirs = self.described(), other.described()
        return [
            f"{what}: {mine[what]}; here: {theirs[what]}"
            for what in mine
            if mine[what] != theirs[what]
        ]

    def described(self) -> dict[str, str]:
        """Return what is compared, in words."""
        ranks = sum(self.nodes)
        nodes = f"{len(self.nodes)} node{'s' * (len(self.nodes) > 1)}"
        return {
            "the version of hvdkit": self.hvdkit,
            "the machine": " and ".join(self.machines),
            "the number of ranks": str(ranks),
            "the ranks of the nodes": f"{', '.join(map(str, self.nodes))} on {nodes}",
            "the messages": f"over {self.library or 'TCP'}",
            "the kernels": self.kernels,
            "shared memory": "yes" if self.shared_memory else "no",
        }


#: Seconds that a message of a schedule costs in Python, on a machine that nobody has measured.
A_MESSAGE = 15e-6


@dataclass(frozen=True, slots=True)
class Levels:
    """What the levels of a machine cost.

    Args:
        memory: memory that ranks of a node share; None: not measured.
        within: messages between ranks of one node.
        across: messages between nodes.
        check: seconds of a round of messages in which ranks compare what they are about to do,
            within a node and across nodes; as `gathering_alphas` counts them.
    """

    memory: Level | None
    within: Level
    across: Level
    check: tuple[float, float]

    @property
    def messages(self) -> Machine:
        """The machine as schedules over messages see it."""
        return Machine(within=self.within, across=self.across)

    @property
    def shared(self) -> Machine:
        """The machine where the ranks of a node share memory."""
        return Machine(within=self.memory or self.within, across=self.across)


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement.

    Args:
        nbytes: of the message.
        seconds: of a call on the slowest rank; the median.
        margin: half the interval of 95 % confidence of the median.
    """

    nbytes: int
    seconds: float
    margin: float


#: What is taken for levels that nobody has measured.
USUAL_LEVELS = Levels(
    memory=USUAL.within,
    within=replace(USUAL.within, alpha=USUAL.within.alpha + A_MESSAGE),
    across=replace(USUAL.across, alpha=USUAL.across.alpha + A_MESSAGE),
    check=(USUAL.within.alpha + A_MESSAGE / 2, USUAL.across.alpha + A_MESSAGE / 2),
)

#: By collective and by algorithm, ascending in bytes.
Grid = Mapping[str, Mapping[str, tuple[Cell, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """All that was found in one world.

    Args:
        world: where.
        measured: when, as a date.
        hosts: names, for whoever reads the file.
        levels: fitted.
        margins: of the fitted figures, by the level's name.
        segments: bytes of a message, ascending, and the best segment for such.
        bucket_bytes: of a bucket of gradients; None: not measured.
        grid: measured times.
    """

    world: World
    measured: str = ""
    hosts: tuple[str, ...] = ()
    levels: Levels = USUAL_LEVELS
    margins: Mapping[str, Level] = field(default_factory=dict)
    segments: tuple[tuple[int, int], ...] = ()
    bucket_bytes: int | None = None
    grid: Grid = field(default_factory=dict)


def names(kind: type) -> tuple[str, ...]:
    """Return the fields of a dataclass."""
    return tuple(known.name for known in fields(kind))
