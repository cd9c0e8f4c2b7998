"""Gradients that travel one by one, each through a compressor of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hvdkit.api import communicator
from hvdkit.engine.agreement import agree_on_gradients
from hvdkit.errors import InFlightError
from hvdkit.torch.asynchronous.all_reduce import allreduce_async
from hvdkit.torch.asynchronous.handles import TensorHandle, synchronize
from hvdkit.torch.gradients import Settings, label
from hvdkit.torch.hooks import Hooks, Watch
from hvdkit.torch.parameters import described


class OneByOne:
    """As `Gradients`, for a compressor that the core knows nothing of.  Creating it is collective.

    Args:
        parameters: trainable, the same on every rank.
        names: of the parameters.
        settings: how they are reduced.
        passes: backward passes that a gradient is accumulated over before it travels.
        compression: has ``compress(tensor)`` and ``decompress(tensor, ctx)``.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        names: Sequence[str],
        settings: Settings,
        *,
        passes: int,
        compression: Any,
    ) -> None:
        self._parameters = list(parameters)
        self._names = list(names)
        self._settings = settings
        self._compression = compression
        among = communicator(settings.process_set)
        among.call(agree_on_gradients, described(parameters, names))
        self._label = label(among)
        self.set_passes(passes)
        self._handles: dict[int, tuple[TensorHandle, Any]] = {}
        self._watch = Watch(self._parameters, self._names)
        self._hooks = Hooks(self, self._parameters, self._names)

    def set_passes(self, passes: int) -> None:
        """Change over how many backward passes gradients are summed up; between steps."""
        self._passes = passes
        self.forget_passes()

    def forget_passes(self) -> None:
        """Count backward passes anew: what was summed up is thrown away."""
        self._left = [self._passes] * len(self._parameters)

    @property
    def in_flight(self) -> bool:
        """Whether gradients are on their way."""
        return bool(self._handles)

    @property
    def fresh(self) -> bool:
        """Whether gradients have come since the last `finish`."""
        return self.in_flight or any(left < self._passes for left in self._left)

    def before(self, index: int) -> None:
        """Refuse to add to a gradient that is on its way.

        Raises:
            InFlightError: it is.
        """
        if index in self._handles:
            raise InFlightError(
                f"the gradient of {self._names[index]!r} came again before step(), when it was on "
                "its way: give backward_passes_per_step, or one of Compression's compressors"
            )

    def after(self, index: int) -> None:
        """Let a gradient go when it is the sum of as many passes as wanted."""
        self._left[index] -= 1
        if self._left[index] == 0:
            self._start(index)
            self._watch.begin(index)

    def _start(self, index: int) -> None:
        parameter, settings = self._parameters[index], self._settings
        gradient = parameter.grad
        if gradient is None or not parameter.requires_grad:
            gradient = torch.zeros_like(parameter)
        packed, form = self._compression.compress(gradient.detach().to_dense())
        handle = allreduce_async(
            packed,
            name=f"{self._label}.{self._names[index]}",
            op=settings.op,
            prescale_factor=1.0 / settings.predivide,
            postscale_factor=settings.predivide,
            process_set=settings.process_set,
        )
        self._handles[index] = (handle, form)

    def finish(self) -> None:
        """Return when every gradient is reduced, and in place.  Collective, blocking.

        Raises:
            InFlightError: a gradient was changed after backward, when it was on its way already.
            ArgumentError: a newer optimizer has the gradients.
        """
        self._hooks.check()
        changed = self._watch.end()
        try:
            for index in range(len(self._parameters)):
                if index not in self._handles:
                    self._start(index)
            for index, (handle, form) in self._handles.items():
                reduced = self._compression.decompress(synchronize(handle), form)
                if self._parameters[index].requires_grad:
                    self._hand_back(self._parameters[index], reduced)
        finally:
            self._handles.clear()
            self.forget_passes()
        if changed is not None:
            raise changed

    def _hand_back(self, parameter: torch.nn.Parameter, reduced: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            parameter.grad = torch.empty_like(parameter).copy_(reduced)
        elif gradient.is_sparse:
            parameter.grad = reduced.to_sparse(gradient.sparse_dim())
        else:
            gradient.copy_(reduced)
