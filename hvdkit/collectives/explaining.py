"""What ``"auto"`` picks for a message, and how long each way would take."""

from __future__ import annotations

from dataclasses import dataclass

from hvdkit.collectives.group import Group
from hvdkit.collectives.pick import known_algorithms
from hvdkit.collectives.reduction import resolve
from hvdkit.errors import ArgumentError
from hvdkit.schedules.registry import ALGORITHMS
from hvdkit.tuning.estimates import MEASURED
from hvdkit.tuning.file import COMMAND


@dataclass(frozen=True, slots=True)
class Way:
    """One algorithm.

    Args:
        algorithm: its name.
        seconds: of a call, as far as anybody knows; None: nobody does.
        margin: half the interval of 95 % confidence, where they were measured.
        source: ``"measured"`` or ``"model"``; empty where there are no seconds.
        missing: why it cannot be had here; empty if it can.
    """

    algorithm: str
    seconds: float | None
    margin: float
    source: str
    missing: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What ``"auto"`` picks; prints as a table.

    Args:
        kind: the collective.
        nbytes: of the message.
        size: number of ranks.
        picked: the algorithm.
        segment_bytes: of a message of a schedule, at most.
        ways: all algorithms, the fastest first.
        basis: what the figures are from.
    """

    kind: str
    nbytes: int
    size: int
    picked: str
    segment_bytes: int
    ways: tuple[Way, ...]
    basis: str

    def __str__(self) -> str:
        lines = [
            f"{self.kind} of {self.nbytes:,} bytes on {self.size} ranks: auto picks {self.picked}"
        ]
        for way in self.ways:
            mark = "*" if way.algorithm == self.picked else " "
            lines.append(f" {mark} {way.algorithm:<20}{_time(way):>12}  {_remark(way)}".rstrip())
        lines.append(f"Schedules send segments of {self.segment_bytes:,} bytes.  {self.basis}")
        return "\n".join(lines)


def explain(group: Group, nbytes: int, kind: str = "allreduce") -> Explanation:
    """Return what ``"auto"`` picks for a message of `nbytes`.  Local.

    Args:
        group: the ranks.
        nbytes: of the message, as `hvdkit.schedules.cost` counts them.
        kind: the collective.

    Raises:
        ArgumentError: no such collective, or no number of bytes.
    """
    if kind not in ALGORITHMS:
        raise ArgumentError(
            f"unknown collective {kind!r}; the known ones are {', '.join(ALGORITHMS)}"
        )
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 0:
        raise ArgumentError(f"{nbytes!r} is no number of bytes")
    ways = [_way(group, kind, name, nbytes) for name in known_algorithms(kind) if name != "auto"]
    return Explanation(
        kind=kind,
        nbytes=nbytes,
        size=group.size,
        picked=resolve(group, kind, "auto", nbytes),
        segment_bytes=group.estimates.segment_bytes(nbytes),
        ways=tuple(sorted(ways, key=_order)),
        basis=_basis(group),
    )


def _way(group: Group, kind: str, name: str, nbytes: int) -> Way:
    missing = {
        "shm": group.no_arena,
        "hierarchical": group.no_hierarchy,
        "mpi": "" if hasattr(group.transport, "library_allreduce") else "the ranks are not MPI's",
    }.get(name, "")
    estimate = None if missing else group.estimates.estimate(kind, name, nbytes)
    if estimate is None:
        return Way(name, None, 0.0, "", missing)
    return Way(name, estimate.seconds, estimate.margin, estimate.source, missing)


def _order(way: Way) -> tuple[bool, float]:
    return bool(way.missing), float("inf") if way.seconds is None else way.seconds


def _time(way: Way) -> str:
    if way.seconds is None:
        return "-"
    if way.seconds < 1e-3:
        return f"{way.seconds * 1e6:.1f} us"
    return f"{way.seconds * 1e3:.2f} ms"


def _remark(way: Way) -> str:
    if way.missing:
        return f"cannot be had here: {way.missing}"
    if way.seconds is None:
        return "not measured, and there is no model of it"
    if way.source == MEASURED:
        return f"measured, +-{100 * way.margin / way.seconds:.0f} %"
    return "by the model"


def _basis(group: Group) -> str:
    estimates = group.estimates
    if estimates.tuning is None:
        command = COMMAND.format(ranks=group.size)
        return (
            "This machine was not measured: auto goes by its defaults, and the times are those of "
            f"usual machines.  To measure it: {command}"
        )
    when = estimates.tuning.measured
    if estimates.measured:
        return f"Measured {when}."
    ranks = sum(estimates.tuning.world.nodes)
    return f"Fitted to times of all {ranks} ranks, measured {when}; these ranks were not."
