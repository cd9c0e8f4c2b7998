"""A pipeline over one axis of a mesh: what is the same for every framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdkit.api import context
from hvdkit.dtypes import Average, Max, Sum
from hvdkit.engine.communicator import Communicator
from hvdkit.errors import ArgumentError
from hvdkit.parallel.mesh import DATA, PIPELINE, Mesh
from hvdkit.parallel.partition import Partition
from hvdkit.parallel.pipeline import registry
from hvdkit.parallel.pipeline.executor import Edge, Executor, Worker, edges_of
from hvdkit.parallel.pipeline.instructions import Forward
from hvdkit.parallel.pipeline.ties import Tie, layer_of
from hvdkit.process_sets import ProcessSet
from hvdkit.transport.courier import Loopback


@dataclass(frozen=True)
class Holders:
    """The ranks that have a parameter, and the one whose it is: which has the layer named first."""

    ranks: ProcessSet
    root: int


class Pipeline:
    """The stages of a model over the ``pipeline`` axis of a mesh, and its replicas over ``data``.

    Args:
        mesh: None: all ranks in one pipeline.
        schedule: by its name.
        microbatches: into which a batch is cut, at most.
        chunks: stages of a rank.

    Raises:
        ArgumentError: no such schedule, or not for these numbers.
    """

    def __init__(self, mesh: Mesh | None, schedule: str, microbatches: int, chunks: int) -> None:
        self.mesh = mesh or Mesh(pipeline=-1)
        self.ranks = self.mesh.size_of(PIPELINE)
        self.place = self.mesh.place(PIPELINE)
        self.schedule = registry.get(schedule)
        self.schedule.check(self.ranks, microbatches, chunks)
        self.microbatches, self.chunks = microbatches, chunks
        self.stages = self.ranks * chunks
        self.mine = range(self.place, self.stages, self.ranks)
        """The stages of this rank."""
        self.has_last = self.place == self.ranks - 1
        self.replicated = self.mesh.size_of(DATA) > 1
        """Whether other ranks have the same stages."""

    def in_flight(self, stage: int, stages: int) -> int:
        """Return of how many microbatches a stage holds activations, at most."""
        ranks = stages // self.chunks
        memory = self.schedule.memory(stage % ranks, ranks, self.microbatches, self.chunks)
        return -(-memory.in_flight // self.chunks)

    def open(self, worker: Worker, skips: Sequence[Edge]) -> None:
        """Connect the ranks, whose stages `worker` computes.  Collective."""
        courier = context().courier(self._along(PIPELINE)) if self.ranks > 1 else Loopback()
        self._executor = Executor(courier, edges_of(self.stages, skips), worker)

    def train(self, microbatches: int) -> None:
        """Run the schedule.  Collective along the pipeline, blocking."""
        steps = self.schedule.steps(self.place, self.ranks, microbatches, self.chunks)
        self._executor.run(steps)

    def look(self, microbatches: int) -> None:
        """Run forward alone.  Collective along the pipeline, blocking."""
        numbers = range(microbatches)
        self._executor.run(Forward(stage, number) for stage in self.mine for number in numbers)

    def total(self, loss: float) -> float:
        """Return the loss on every rank: of the last stages, the mean over ``data``.  Collective.

        Args:
            loss: of this rank's batch; of a rank that has not the last stage, anything.
        """
        loss = self.over_stages(loss if self.has_last else 0.0, Sum)
        return self._reduced(loss, DATA, Average)

    def over_stages(self, value: float, op: Any = Sum) -> float:
        """Return the sum, or the maximum, of a number over the ranks of the pipeline."""
        return self._reduced(value, PIPELINE, op)

    def any_stage(self, flag: bool) -> bool:
        """Return whether something is so on any rank of the pipeline.  Collective."""
        return bool(self.over_stages(float(flag), Max))

    def from_last(self, value: Any) -> Any:
        """Return what the rank with the last stage has, picklable.  Collective."""
        if self.ranks == 1:
            return value
        among = self._along(PIPELINE)
        return among.broadcast_object(value, among.ranks[-1], name="output")

    def _along(self, axis: str) -> Communicator:
        return self.mesh.process_set(axis).communicator()

    def _reduced(self, value: float, axis: str, op: Any) -> float:
        if self.mesh.size_of(axis) == 1:
            return value
        return float(self._along(axis).allreduce(np.array([value], np.float64), op)[0])

    # Between layers of different ranks

    def skips(self, ends: dict[str, tuple[int, int]], partition: Partition) -> list[Edge]:
        """Return the skip connections from stage to stage.

        Args:
            ends: by name, at which layer each begins and ends.
        """
        edges = [
            Edge(name, partition.stage_of(first), partition.stage_of(last))
            for name, (first, last) in ends.items()
        ]
        return [edge for edge in edges if edge.source != edge.target]

    def holders(self, ties: Sequence[Tie], partition: Partition) -> dict[Tie, Holders]:
        """Return the ranks that share each parameter with this one.  Collective among all ranks.

        What is on one rank alone, or not on this one, is left out.
        """
        found: dict[Tie, Holders] = {}
        for tie in ties:
            places = [partition.stage_of(layer_of(name)) % self.ranks for name in tie]
            if len(set(places)) == 1:
                continue
            for line in self.mesh.lines(PIPELINE):
                ranks = sorted({line[place] for place in places})
                process_set = context().process_sets.find_or_add(ranks)
                if self.mesh.rank in ranks:
                    found[tie] = Holders(process_set, line[places[0]])
        return found


def check_skips(begins: Sequence[tuple[str, int]], ends: Sequence[tuple[str, int]]) -> None:
    """Refuse skip connections that do not fit.

    Args:
        begins: names, with the layers where they begin.
        ends: likewise.

    Raises:
        ArgumentError: one without a name, or that begins or ends twice, or not at all, or ends
            before it begins.
    """
    if not all(name for name, _ in (*begins, *ends)):
        raise ArgumentError("a skip connection needs a name; '' is the way to the next stage")
    for several in (begins, ends):
        names = [name for name, _ in several]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ArgumentError(f"the skip connection {twice[0]!r} is there twice")
    first, last = dict(begins), dict(ends)
    for name in sorted({*first, *last}):
        if name not in first or name not in last or last[name] < first[name]:
            raise ArgumentError(f"the skip connection {name!r} wants a Stash, and a Pop behind it")
