"""A training job on paper: its layers, its mesh of ranks, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hvdkit.config import MIB
from hvdkit.errors import ArgumentError
from hvdkit.parallel import partition as splitting
from hvdkit.parallel.pipeline.registry import get
from hvdkit.simulation.rounds import Ints

#: The algorithm that is the fastest in the simulation.
BEST = "best"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What a layer takes, whole: not split over tensor-parallel ranks.

    Args:
        name: for messages.
        parameters: how many.
        forward: seconds for a microbatch.
        backward: seconds for a microbatch, for the gradients of input and weights together, which
            take as long as one another.
        activation: bytes of its output for a microbatch.

    Raises:
        ArgumentError: a number is negative.
    """

    name: str
    parameters: int
    forward: float
    backward: float
    activation: float = 0.0

    def __post_init__(self) -> None:
        for what in ("parameters", "forward", "backward", "activation"):
            if not 0 <= getattr(self, what) < float("inf"):
                raise ArgumentError(f"layer {self.name}: {what} is {getattr(self, what)}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be simulated.

    Args:
        layers: of the model, in their order.
        data, pipeline, tensor: ranks along the axes of the mesh; data is the outermost, as in
            ``Mesh(data=, pipeline=, tensor=)``.
        microbatches: of a step, of one data-parallel replica.
        schedule: of the pipeline.
        chunks: stages a rank, of the interleaved schedule.
        bucket_bytes: of gradients that travel together, at most.
        algorithm: of the gradients' all-reduce, as `simulate` has it, or `BEST`.
        compression: bytes that travel for each byte of a gradient.
        dtype: of the gradients.

    Raises:
        ArgumentError: a number makes no sense, or the layers are too few.
    """

    layers: tuple[Layer, ...]
    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    microbatches: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    bucket_bytes: int = 25 * MIB
    algorithm: str = BEST
    compression: float = 1.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("data", "pipeline", "tensor", "bucket_bytes"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not 0 < self.compression <= 1:
            raise ArgumentError(
                f"a compression to {self.compression:g} of the bytes; give more than 0, at most 1"
            )
        get(self.schedule).check(self.pipeline, self.microbatches, self.chunks)
        if len(self.layers) < self.stages:
            raise ArgumentError(
                f"{len(self.layers)} layers cannot be split into {self.stages} stages"
            )

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.data * self.pipeline * self.tensor

    @property
    def stages(self) -> int:
        """The number of stages: some on each rank along the pipeline."""
        return self.pipeline * self.chunks

    @cached_property
    def ranks(self) -> Ints:
        """The rank at ``[data, pipeline, tensor]``."""
        return np.arange(self.size).reshape(self.data, self.pipeline, self.tensor)

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Stage s has the layers ``bounds[s]`` to ``bounds[s + 1] - 1``: split by their time."""
        layers = [
            splitting.Layer(layer.forward + layer.backward, name=layer.name)
            for layer in self.layers
        ]
        return splitting.partition(layers, self.stages, ranks=self.pipeline).bounds

    def layers_of(self, stage: int) -> tuple[Layer, ...]:
        """Return the layers of a stage."""
        return self.layers[self.bounds[stage] : self.bounds[stage + 1]]
