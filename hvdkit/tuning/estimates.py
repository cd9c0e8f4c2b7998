"""How long a collective would take each way, and which way is the best: measured, or by the model.

Where the very ranks were measured, it is the measured times that count, between two sizes by a
straight line on logarithmic scales, and beyond the largest as the model goes on.  Other ranks, such
as a process set, have other times: the fitted figures of the machine hold for them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hvdkit.config import SEGMENT_BYTES
from hvdkit.schedules import flights
from hvdkit.schedules.machine import Machine
from hvdkit.schedules.timing import gathering_alphas, in_flights, predict
from hvdkit.tuning.record import USUAL_LEVELS, Cell, Tuning

#: The default stays if what seems better is so by less than this share of its time: measured, and
#: by the model, which is not that exact.
LEAST_GAIN = 0.03
LEAST_GAIN_BY_MODEL = 0.25

#: Where seconds are from.
MEASURED, MODEL = "measured", "model"

#: Algorithms that check by themselves that the ranks agree.
_CHECKED = ("shm", "gathered", "mpi")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of a call, half their interval of 95 % confidence, and where they are from."""

    seconds: float
    margin: float
    source: str


class Estimates:
    """The times of one group of ranks.  The same on all of them.

    Args:
        tuning: what was measured; None: nothing, so that figures are those of usual machines.
        size: of the group.
        per_node: ranks on its fullest node.
        nested: whether the ranks of each of several nodes share memory.
        sharing: how many messages share a link between nodes, whatever they are part of.
        segment_bytes: of all messages, if the user has said so.
        usual_segment: of those that nobody has tuned.
    """

    def __init__(
        self,
        tuning: Tuning | None,
        size: int,
        per_node: int | None = None,
        *,
        sharing: int = 1,
        nested: bool = True,
        segment_bytes: int | None = None,
        usual_segment: int = SEGMENT_BYTES,
    ) -> None:
        self.tuning = tuning
        self.size = size
        self.fixed_segment = segment_bytes
        self.usual_segment = usual_segment
        self.per_node = size if per_node is None else per_node
        self.nested = nested and 1 < self.per_node < size
        self.levels = USUAL_LEVELS if tuning is None else tuning.levels
        across = self.levels.across
        if sharing > 1:
            across = replace(across, beta=across.beta * sharing)
            self.levels = replace(self.levels, across=across)
        self.measured = tuning is not None and sharing == 1 and sum(tuning.world.nodes) == size
        """Whether it was these ranks that were measured."""
        self._best: dict[tuple[str, int, tuple[str, ...]], str] = {}

    def best(self, kind: str, nbytes: int, names: Sequence[str]) -> str:
        """Return which of `names` to take: the one that is surely fast.

        The first is the default, and stays if that one is no better beyond its noise.  Without a
        tuning the default is it.
        """
        if self.tuning is None:
            return names[0]
        key = (kind, nbytes, tuple(names))
        if key not in self._best:
            self._best[key] = self._find(kind, nbytes, names)
        return self._best[key]

    def _find(self, kind: str, nbytes: int, names: Sequence[str]) -> str:
        found = {name: self.estimate(kind, name, nbytes) for name in names}
        known = {name: estimate for name, estimate in found.items() if estimate is not None}
        measured = {name: e for name, e in known.items() if e.source == MEASURED}
        if measured:
            known = measured
        if not known:
            return names[0]
        best = min(known, key=lambda name: known[name].seconds + known[name].margin)
        if names[0] == "shm" and not measured:
            return names[0]  # what was measured anywhere says that no message is as fast
        usual = known.get(names[0])
        if usual is None:
            return best if measured else names[0]
        least = LEAST_GAIN if measured else LEAST_GAIN_BY_MODEL
        gain = usual.seconds - known[best].seconds
        return best if gain > max(least * usual.seconds, known[best].margin) else names[0]

    def estimate(self, kind: str, name: str, nbytes: int) -> Estimate | None:
        """Return how long a call takes, with the check that the ranks agree; None: nobody knows.

        Args:
            kind: the collective.
            name: of the algorithm, or ``"mpi"``, for which there is no model.
            nbytes: of the message.
        """
        cells = self._cells(kind, name)
        if cells:
            return self._interpolated(kind, name, nbytes, cells)
        if name == "mpi":
            return None
        return Estimate(self.modelled(kind, name, nbytes), 0.0, MODEL)

    def modelled(self, kind: str, name: str, nbytes: int) -> float:
        """Return the seconds by the model, with the check that the ranks agree."""
        machine = self.messages(name, nbytes)
        if name in ("shm", "hierarchical") or (name == "gathered" and self.nested):
            machine = self.levels.shared
        # "gathered" takes the alpha of schedules: it is repeated in the native module as those of
        # short messages are, while the check alone is made in Python.
        seconds = predict(
            kind,
            name,
            nbytes,
            self.size,
            ranks_per_node=self.per_node,
            machine=machine,
            segment_bytes=self.segment_bytes(nbytes),
            nested=self.nested,
        )
        # Ranks on several nodes that expect a short all-reduce begin it without asking.
        expected = kind == "allreduce" and self.per_node < self.size and self.is_short(nbytes)
        return seconds + (0.0 if name in _CHECKED or expected else self.check_seconds())

    def messages(self, name: str, nbytes: int) -> Machine:
        """Return the machine as the messages of a schedule see it."""
        if name == "all_pairs" and self.is_short(nbytes):
            return in_flights(self.levels.messages, self.size)
        return self.levels.messages

    def check_seconds(self) -> float:
        """Return how long it takes the ranks to find that they agree."""
        levels = self.levels
        if not self.nested:
            level = (levels.within, levels.across)[self.per_node < self.size]
            alphas = gathering_alphas(self.size, level.at_once)
            return levels.check[self.per_node < self.size] * alphas
        alphas = gathering_alphas(-(-self.size // self.per_node), levels.across.at_once)
        return levels.check[1] * alphas + 2 * levels.shared.within.alpha

    def is_short(self, nbytes: int) -> bool:
        """Return whether a message of so many bytes is not worth cutting in segments."""
        return flights.is_short(nbytes, self.segment_bytes(nbytes))

    def segment_bytes(self, nbytes: int) -> int:
        """Return the bytes of a segment of a message of so many bytes."""
        if self.fixed_segment is not None:
            return self.fixed_segment
        if self.tuning is None or not self.tuning.segments:
            return self.usual_segment
        at = math.log(max(nbytes, 1))
        _, segment = min(self.tuning.segments, key=lambda pair: abs(math.log(pair[0]) - at))
        return segment

    def _cells(self, kind: str, name: str) -> tuple[Cell, ...]:
        if self.tuning is None or not self.measured:
            return ()
        return self.tuning.grid.get(kind, {}).get(name, ())

    def _interpolated(
        self, kind: str, name: str, nbytes: int, cells: tuple[Cell, ...]
    ) -> Estimate | None:
        first, last = cells[0], cells[-1]
        if nbytes <= first.nbytes:
            return Estimate(first.seconds, first.margin, MEASURED)
        if nbytes > last.nbytes:
            growth = nbytes / last.nbytes
            if name != "mpi":
                growth = self.modelled(kind, name, nbytes) / self.modelled(kind, name, last.nbytes)
            return Estimate(last.seconds * growth, last.margin * growth, MEASURED)
        place = bisect_left(cells, nbytes, key=lambda cell: cell.nbytes)
        low, high = cells[place - 1], cells[place]
        share = math.log(nbytes / low.nbytes) / math.log(high.nbytes / low.nbytes)
        seconds = low.seconds ** (1 - share) * high.seconds**share
        margin = max(low.margin / low.seconds, high.margin / high.seconds) * seconds
        return Estimate(seconds, margin, MEASURED)
