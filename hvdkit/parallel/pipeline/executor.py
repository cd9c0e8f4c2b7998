"""Run this rank's part of a pipeline schedule, whatever the stages compute with.

    Forward(s, m)     wait for the inputs of s, compute, send the outputs on            [1]
    Backward(s, m)    wait for the gradients of its outputs, compute, send those of
                      its inputs back                                                   [2]

Tensors go along edges.  Most edges lead to the next stage; one that jumps stages is a skip
connection.  Sending never waits, and whatever comes is taken in as it comes, so a rank waits for
nothing but what its next instruction needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hvdkit.parallel.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
)
from hvdkit.transport.courier import Courier, Loopback

#: The tensors on an edge, as arrays; None: it has no gradient.
Bundle: TypeAlias = Sequence[NDArray[Any] | None]


@dataclass(frozen=True)
class Edge:
    """Where tensors go from stage to stage."""

    label: str
    source: int
    target: int


def edges_of(stages: int, skips: Iterable[Edge] = ()) -> tuple[Edge, ...]:
    """Return the edges of a chain of stages, with skip connections besides."""
    return (*(Edge("", stage, stage + 1) for stage in range(stages - 1)), *skips)


class Worker(Protocol):
    """Computes the stages of this rank."""

    def forward(self, stage: int, microbatch: int, inputs: dict[str, Bundle]) -> dict[str, Bundle]:
        """Return what leaves the stage, by the label of its edge.

        Args:
            inputs: what enters it, likewise; empty for the first stage.
        """
        ...

    def backward(
        self, stage: int, microbatch: int, gradients: dict[str, Bundle], *, weights: bool
    ) -> dict[str, Bundle]:
        """Return the gradients of what entered the stage, by the label of its edge.

        Args:
            gradients: of what left it; empty for the last stage.
            weights: whether the weights' are computed as well, or later by `backward_weight`.
        """
        ...

    def backward_weight(self, stage: int, microbatch: int) -> None:
        """Compute the gradients of the weights, that `backward` left out."""
        ...


class Executor:
    """Runs schedules among the ranks of a pipeline.

    Args:
        courier: among them.
        edges: of all stages.
        worker: computes this rank's.
    """

    def __init__(self, courier: Courier | Loopback, edges: Sequence[Edge], worker: Worker) -> None:
        self._courier = courier
        self._edges = tuple(edges)
        self._worker = worker

    def run(self, schedule: Iterable[Instruction]) -> None:
        """Do what `schedule` says, in order.  Collective among the pipeline's ranks, blocking.

        What a run that failed has left on its way is thrown away by the next.
        """
        self._courier.runs += 1
        for instruction in schedule:
            stage, microbatch = instruction.stage, instruction.microbatch
            if isinstance(instruction, Forward):
                self._forward(stage, microbatch)
            elif isinstance(instruction, Backward | BackwardInput):
                weights = isinstance(instruction, Backward)
                self._backward(stage, microbatch, weights=weights)
            elif isinstance(instruction, BackwardWeight):
                self._worker.backward_weight(stage, microbatch)

    def _forward(self, stage: int, microbatch: int) -> None:
        inputs = {
            edge.label: self._receive(edge.source, ("activations", edge, microbatch))
            for edge in self._edges
            if edge.target == stage
        }
        outputs = self._worker.forward(stage, microbatch, inputs)
        for edge in self._edges:
            if edge.source == stage:
                self._send(edge.target, ("activations", edge, microbatch), outputs[edge.label])

    def _backward(self, stage: int, microbatch: int, *, weights: bool) -> None:
        gradients = {
            edge.label: self._receive(edge.target, ("gradients", edge, microbatch))
            for edge in self._edges
            if edge.source == stage
        }
        results = self._worker.backward(stage, microbatch, gradients, weights=weights)
        for edge in self._edges:
            if edge.target == stage:
                self._send(edge.source, ("gradients", edge, microbatch), results[edge.label])

    def _send(self, stage: int, tag: tuple[Any, ...], bundle: Bundle) -> None:
        rank = self._rank_of(stage)
        there = (array is not None for array in bundle)
        self._courier.send(rank, tag, np.array([self._courier.runs, *there], np.int64))
        for number, array in enumerate(bundle):
            if array is not None:
                self._courier.send(rank, (*tag, number), array)

    def _receive(self, stage: int, tag: tuple[Any, ...]) -> Bundle:
        rank = self._rank_of(stage)
        run = 0
        while run < self._courier.runs:
            run, *there = self._courier.receive(rank, tag).tolist()
            bundle = [
                self._courier.receive(rank, (*tag, number)) if is_there else None
                for number, is_there in enumerate(there)
            ]
        return bundle

    def _rank_of(self, stage: int) -> int:
        """Return the rank that has a stage: they are dealt out in turn."""
        return stage % self._courier.size
