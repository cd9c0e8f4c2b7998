"""Which layers each stage has: the contiguous split whose slowest stage is fastest.

A pure function of numbers, the same on every rank: parameters counted, or seconds and bytes
measured in a dry run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from hvdkit.errors import ArgumentError
from hvdkit.parallel import splitting
from hvdkit.parallel.splitting import InFlight, Problem


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer takes.

    Args:
        cost: time for a microbatch, forward and backward, in any unit: parameters, or seconds.
        nbytes: memory that it takes throughout: parameters, gradients, optimizer state.
        activation_bytes: memory for each microbatch in flight, in bytes.
        name: for messages.
    """

    cost: float
    nbytes: int = 0
    activation_bytes: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cost) and self.cost >= 0):
            raise ArgumentError(f"layer {self.name!r}: its cost is {self.cost!r}; give 0 or more")
        if self.nbytes < 0 or self.activation_bytes < 0:
            raise ArgumentError(
                f"layer {self.name!r}: {self.nbytes} bytes and {self.activation_bytes} of "
                "activations; neither may be negative"
            )


@dataclass(frozen=True)
class Partition:
    """Layers split into stages.  ``str()`` is a table.

    Args:
        bounds: stage s has the layers ``bounds[s]`` to ``bounds[s + 1] - 1``.
        ranks: stage s is on rank s % ranks.
        costs: of each stage, in the unit of its layers.
        times: of each stage: its cost over the speed of its rank.
        nbytes: of each stage, activations in flight included.
        limits: of each rank, in bytes; None: without limit.
        proven: whether no other split has a faster slowest stage: not so for a split by hand, nor
            where the search ended early (see `partition`).
    """

    bounds: tuple[int, ...]
    ranks: int
    costs: tuple[float, ...]
    times: tuple[float, ...]
    nbytes: tuple[int, ...]
    limits: tuple[float, ...] | None = None
    proven: bool = True

    @property
    def stages(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of layers of each stage."""
        return tuple(len(self.layers(stage)) for stage in range(self.stages))

    @property
    def slowest(self) -> float:
        """The time of the slowest stage, which sets the pace of all."""
        return max(self.times)

    @property
    def rank_bytes(self) -> tuple[int, ...]:
        """The bytes of each rank, all its stages together."""
        return tuple(sum(self.nbytes[rank :: self.ranks]) for rank in range(self.ranks))

    def layers(self, stage: int) -> range:
        """Return the indices of the layers of `stage`."""
        return range(self.bounds[stage], self.bounds[stage + 1])

    def stage_of(self, layer: int) -> int:
        """Return the stage that has `layer`.

        Raises:
            ArgumentError: there is no such layer.
        """
        for stage in range(self.stages):
            if layer in self.layers(stage):
                return stage
        raise ArgumentError(f"there is no layer {layer}: the layers are 0 to {self.bounds[-1] - 1}")

    def __str__(self) -> str:
        rows = [("stage", "rank", "layers", "cost", "time", "memory")]
        for stage in range(self.stages):
            first, last = self.layers(stage)[0], self.layers(stage)[-1]
            memory = self._memory(stage) if self.ranks == self.stages else None
            rows.append(
                (
                    f"{stage}",
                    f"{stage % self.ranks}",
                    f"{first}" if first == last else f"{first}-{last}",
                    f"{self.costs[stage]:.6g}",
                    f"{self.times[stage]:.6g}" + " *" * (self.times[stage] == self.slowest),
                    memory or format_bytes(self.nbytes[stage]),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append("* slowest" + ("" if self.proven else "; another split may be faster"))
        if self.limits is not None and self.ranks < self.stages:
            lines += [f"rank {rank}: {self._memory(rank)}" for rank in range(self.ranks)]
        return "\n".join(lines)

    def _memory(self, rank: int) -> str:
        nbytes = self.rank_bytes[rank]
        if self.limits is None:
            return format_bytes(nbytes)
        over = nbytes - self.limits[rank]
        text = f"{format_bytes(nbytes)} of {format_bytes(self.limits[rank])}"
        return f"{text}, {format_bytes(over)} too much" if over > 0 else text


def partition(
    layers: Sequence[Layer],
    stages: int,
    *,
    ranks: int | None = None,
    speeds: Sequence[float] | None = None,
    limit: float | Sequence[float] | None = None,
    in_flight: InFlight | None = None,
) -> Partition:
    """Split `layers` into `stages` so that the slowest stage is as fast as can be.

    Exact, by dynamic programming (see `hvdkit.parallel.splitting`).  Of several such splits it is
    the one with the least sum of squared stage times, which balances the other stages; of several
    of those, the one whose first stages are shortest.

    Where ranks have several stages each and a limit of memory that binds, the search is by branch
    and bound: any of the best splits is taken, and ``proven`` is False if it ended early.

    Args:
        layers: in their order in the model.
        stages: how many; each has a layer or more.
        ranks: stage s is on rank s % ranks; None: each stage has a rank of its own.
        speeds: of each rank, relative: a stage takes its cost over the speed of its rank.
        limit: bytes that a rank may use: one number for all, or one for each.
        in_flight: None: one microbatch in flight on every stage.

    Raises:
        ArgumentError: fewer layers than stages, an argument that makes no sense, or no split that
            fits into the limit; the message shows the sizes, and how many ranks would do.
    """
    problem = _problem(layers, stages, ranks=ranks, speeds=speeds, limit=limit, in_flight=in_flight)
    split = splitting.best(problem)
    if split is None:
        nearest = _describe(problem, splitting.nearest(problem), proven=True)
        found = "fits into" if problem.ranks == stages else "was found that fits into"
        raise ArgumentError(
            f"no split of {len(layers)} layers into {stages} stages {found} the memory of "
            f"{_count(problem.ranks, 'rank')}; the nearest is\n{nearest}\n"
            + _advice(layers, problem, in_flight or _one, limit)
        )
    return _describe(problem, split.bounds, proven=split.proven)


def by_hand(
    layers: Sequence[Layer],
    lengths: Sequence[int],
    *,
    ranks: int | None = None,
    speeds: Sequence[float] | None = None,
    limit: float | Sequence[float] | None = None,
    in_flight: InFlight | None = None,
) -> Partition:
    """Split `layers` as told: stage s has ``lengths[s]`` of them.

    Args otherwise as for `partition`.

    Raises:
        ArgumentError: as `partition`, or the lengths do not add up to the layers.
    """
    lengths = list(lengths)
    wrong = [length for length in lengths if not _is_count(length)]
    if wrong:
        raise ArgumentError(f"a stage of {wrong[0]!r} layers: each stage needs 1 or more")
    if sum(lengths) != len(layers):
        raise ArgumentError(
            f"lengths {lengths} are for {_count(sum(lengths), 'layer')}; there are {len(layers)}"
        )
    problem = _problem(
        layers, len(lengths), ranks=ranks, speeds=speeds, limit=limit, in_flight=in_flight
    )
    result = _describe(problem, (0, *accumulate(map(int, lengths))), proven=False)
    if not problem.fits(result.bounds):
        raise ArgumentError(
            f"lengths {lengths} do not fit into the memory of {_count(problem.ranks, 'rank')}\n"
            f"{result}\ngive other lengths, or let partition() choose them"
        )
    return result


def format_bytes(nbytes: float) -> str:
    """Return a size for people: ``"512 bytes"``, ``"1.25 GiB"``."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << power:
            return f"{nbytes / (1 << power):.2f} {unit}"
    return f"{nbytes:g} bytes"


def _one(_stage: int, _stages: int) -> int:
    return 1


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _is_count(value: Any) -> bool:
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_whole and bool(value >= 1)


def _problem(
    layers: Sequence[Layer],
    stages: int,
    *,
    ranks: int | None,
    speeds: Sequence[float] | None,
    limit: float | Sequence[float] | None,
    in_flight: InFlight | None,
) -> Problem:
    """Check the arguments of `partition`, and return them by stage.

    Raises:
        ArgumentError: one makes no sense.
    """
    if not _is_count(stages) or stages > len(layers):
        raise ArgumentError(
            f"{len(layers)} layers cannot make {stages!r} stages: "
            "give at least 1 stage, and at most one for each layer"
        )
    ranks = stages if ranks is None else ranks
    if not _is_count(ranks) or ranks > stages:
        raise ArgumentError(f"{stages} stages cannot be on {ranks!r} ranks: give 1 to {stages}")
    speed = _by_rank("speeds", 1.0 if speeds is None else speeds, ranks)
    limits = None if limit is None else _by_rank("limit", limit, ranks)
    flights = [(in_flight or _one)(stage, stages) for stage in range(stages)]
    if not all(_is_count(flight) or flight == 0 for flight in flights):
        raise ArgumentError(f"in_flight gives {flights}: give whole numbers, 0 or more")
    return Problem(
        costs=tuple(float(layer.cost) for layer in layers),
        resident=tuple(layer.nbytes for layer in layers),
        activations=tuple(layer.activation_bytes for layer in layers),
        speeds=tuple(speed[stage % ranks] for stage in range(stages)),
        in_flight=tuple(flights),
        limits=limits and tuple(limits[stage % ranks] for stage in range(stages)),
        ranks=ranks,
    )


def _by_rank(what: str, value: float | Sequence[float], ranks: int) -> tuple[float, ...]:
    values = np.atleast_1d(value).tolist() * (ranks if np.ndim(value) == 0 else 1)
    if len(values) != ranks:
        raise ArgumentError(f"{what} has {len(values)} numbers for {ranks} ranks: give one each")
    if not all(math.isfinite(number) and number > 0 for number in values):
        raise ArgumentError(f"{what} is {values}: every number must be above 0")
    return tuple(values)


def _describe(problem: Problem, bounds: tuple[int, ...], *, proven: bool) -> Partition:
    stages = range(problem.stages)
    costs = [math.fsum(problem.costs[bounds[s] : bounds[s + 1]]) for s in stages]
    return Partition(
        bounds=bounds,
        ranks=problem.ranks,
        costs=tuple(costs),
        times=tuple(costs[stage] / problem.speeds[stage] for stage in stages),
        nbytes=tuple(problem.nbytes(bounds)),
        limits=problem.limits and problem.limits[: problem.ranks],
        proven=proven,
    )


def _advice(
    layers: Sequence[Layer],
    problem: Problem,
    in_flight: InFlight,
    limit: float | Sequence[float] | None,
) -> str:
    """Return what would fit, if anything."""
    assert problem.limits is not None
    fewest, most = min(problem.in_flight), max(problem.limits)
    needs = [layer.nbytes + fewest * layer.activation_bytes for layer in layers]
    largest = max(range(len(layers)), key=needs.__getitem__)
    if needs[largest] > most:
        name = f" ({layers[largest].name})" if layers[largest].name else ""
        return (
            f"layer {largest}{name} alone needs {format_bytes(needs[largest])}, "
            f"and the largest limit is {format_bytes(most)}: split the layer, or raise the limit"
        )
    if limit is not None and np.ndim(limit) > 0:
        return "raise the limits, or give more ranks"
    more = splitting.ranks_that_fit(problem, in_flight, most)
    if more is None:
        return "no number of ranks would do: raise the limit, or keep fewer microbatches in flight"
    each = problem.stages // problem.ranks
    return f"{more} ranks would do" + (f", with {each} stages each" if each > 1 else "")
