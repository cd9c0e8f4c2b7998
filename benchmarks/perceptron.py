"""A training step whose gradients come one after the other, as backward yields them.

A multi-layer perceptron in numpy: forward, backward and the update are computed for real, each
weight's gradient straight into its place in a bucket, which travels while backward goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import models
import numpy as np
from numpy.typing import NDArray

import hvdkit as hvd
from hvdkit.engine.reducer import GradientReducer

Array = NDArray[np.float32]

#: Layers and their width: 32 MiB of weights.
LAYERS, WIDTH = 32, 512

#: Rows that go through at once.  So few that communication is a large part of the step.
BATCH = 16

#: Small enough for the loss to go down for as long as steps are measured.
LEARNING_RATE = np.float32(1e-6)


class Perceptron:
    """Square layers with ReLU between them, and the mean square of the output as the loss.

    Args:
        width: of every layer.
        layers: how many.
    """

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        scale = np.sqrt(2 / width)  # [He et al., Delving Deep into Rectifiers, ICCV 2015]
        weights = np.random.default_rng(3)  # the same on all ranks
        self.weights = [
            (scale * weights.standard_normal((width, width))).astype(np.float32)
            for _ in range(layers)
        ]
        mine = np.random.default_rng(hvd.rank())
        self._data = mine.standard_normal((BATCH, width)).astype(np.float32)

    @property
    def shapes(self) -> list[models.Shape]:
        return [weight.shape for weight in self.weights]

    def step(self, reducer: GradientReducer) -> None:
        """Train for a step with the gradients of all ranks, averaged.  Collective, blocking."""
        self._backward(reducer.views, reducer.ready)
        reducer.finish()
        for weight, gradient in zip(self.weights, reducer.views, strict=True):
            np.subtract(weight, LEARNING_RATE * gradient, out=weight)

    def wrong(self, reducer: GradientReducer) -> int:
        """Train for a step and return how many averaged gradients are wrong.  Collective."""
        places = [np.empty_like(weight) for weight in self.weights]
        self._backward(places, lambda _: None)
        wanted = [hvd.allreduce(place, op=hvd.Average) for place in places]
        self.step(reducer)
        return sum(
            int(np.count_nonzero(~np.isclose(view, mean, rtol=1e-3, atol=1e-6)))
            for view, mean in zip(reducer.views, wanted, strict=True)
        )

    def _backward(self, places: Sequence[Array], ready: Callable[[int], object]) -> None:
        """Put each gradient into its place, the last layer's first, and say so."""
        passed = [self._data]
        for weight in self.weights:
            passed.append(np.maximum(passed[-1] @ weight, 0))
        slope = passed[-1] / np.float32(passed[-1].size)
        for index in reversed(range(len(self.weights))):
            slope = np.where(passed[index + 1] > 0, slope, 0)
            np.matmul(passed[index].T, slope, out=places[index])
            ready(index)
            if index:
                slope = slope @ self.weights[index].T
