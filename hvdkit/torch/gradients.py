"""The gradients of some parameters on their way through the buckets of a `GradientReducer`.

    backward      p.grad is accumulated     [1]   before: a second pass waits for the first
                  ... into the view         [2]   after: the gradient is in its bucket
    bucket full   all-reduce                [3]   beside the rest of backward
    finish        p.grad is the view        [4]   nothing is packed or unpacked

A gradient that is not where it should be (first step, ``zero_grad(set_to_none=True)``) is copied
into its view in [2].  Views have their parameters' order in memory, such as channels last.  What
comes sparse in the first step has no view later: all ranks' parts are gathered.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from hvdkit.api import communicator, context
from hvdkit.dtypes import Average, ReduceOp
from hvdkit.engine.communicator import Communicator
from hvdkit.engine.compression import Compressor
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.torch.asynchronous.handles import synchronize
from hvdkit.torch.asynchronous.sparse import sparse_allreduce_async
from hvdkit.torch.convert import tensor_of
from hvdkit.torch.hooks import Hooks, Watch
from hvdkit.torch.parameters import described, inverse, memory_order
from hvdkit.torch.staging import DeviceBuckets


@dataclass(frozen=True)
class Settings:
    """How gradients are reduced; see `DistributedOptimizer`."""

    compression: Compressor | None = None
    op: ReduceOp = Average
    predivide: float = 1.0
    sparse_as_dense: bool = False
    process_set: ProcessSet = global_process_set
    as_views: bool = True
    bucket_bytes: int | None = None


class Gradients:
    """The gradients of `parameters`, all on one device.  Creating it is collective.

    Args:
        parameters: trainable, the same in the same order on every rank.
        names: of the parameters.
        settings: how they are reduced.
        passes: backward passes that a gradient is accumulated over before it travels.
        groups: those that travel together, by their place in `parameters`; None: by size.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        names: Sequence[str],
        settings: Settings,
        *,
        passes: int,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.names = list(names)
        self._settings = settings
        self._among = communicator(settings.process_set)
        device = parameters[0].device
        self._reducer = context().gradient_reducer(
            described(parameters, names),
            bucket_bytes=settings.bucket_bytes,
            communicator=self._among,
            op=settings.op,
            prescale=1.0 / settings.predivide,
            postscale=settings.predivide,
            compression=settings.compression,
            groups=groups,
            staging=DeviceBuckets(device) if device.type == "cuda" else None,
        )
        self._label = label(self._among)
        self.set_passes(passes)
        self._watch = Watch(self.parameters, self.names)
        self._sparse_dims: dict[int, int] = {}  # of gradients that have come sparse, ever
        self._set_apart: set[int] = set()  # that have come sparse before all ranks knew of it
        self._apart: list[int] = []  # that have no view
        self._apart_handles: dict[int, Any] = {}
        self._bind()
        self._hooks = Hooks(self, self.parameters, self.names)

    def _bind(self) -> None:
        staging = self._reducer.staging
        if isinstance(staging, DeviceBuckets):
            views = staging.views(self._reducer)
        else:
            views = [None if view is None else tensor_of(view) for view in self._reducer.views]
        self._views = [
            None if view is None else view.permute(inverse(memory_order(parameter)))
            for parameter, view in zip(self.parameters, views, strict=True)
        ]

    def set_passes(self, passes: int) -> None:
        """Change over how many backward passes gradients are summed up; between steps."""
        self._passes = passes
        self.forget_passes()

    def forget_passes(self) -> None:
        """Count backward passes anew: what was summed up is thrown away."""
        self._left = [self._passes] * len(self.parameters)

    @property
    def in_flight(self) -> bool:
        """Whether gradients are on their way."""
        return self._reducer.in_flight or bool(self._apart_handles)

    @property
    def fresh(self) -> bool:
        """Whether gradients have come since the last `finish`."""
        return self.in_flight or any(left < self._passes for left in self._left)

    # Backward

    def before(self, index: int) -> None:
        """Make sure that a gradient is not on its way when more is added to it."""
        if not self._reducer.has_come(index) and index not in self._apart_handles:
            return
        self.finish()
        if self._settings.op is ReduceOp.SUM:
            # What all ranks hold alike is summed again: a share of it each.  (An average of what
            # is alike, and Adasum of it, is what it was.)
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self._among.size)

    def after(self, index: int) -> None:
        """Let a gradient go when it is the sum of as many passes as wanted."""
        self._left[index] -= 1
        if self._left[index] == 0:
            self._hand_over(index)

    def _hand_over(self, index: int) -> None:
        """Bring a gradient into its bucket, unless it is there, and let the bucket go if full."""
        parameter, view = self.parameters[index], self._views[index]
        assert parameter.grad is not None
        gradient = parameter.grad.detach()
        is_sparse = gradient.layout != torch.strided
        if is_sparse:
            self._sparse_dims[index] = gradient.sparse_dim()
        if view is None:
            self._start_apart(index, gradient)
        elif is_sparse and not (self._settings.sparse_as_dense or self._reducer.settled):
            self._set_apart.add(index)
            view.zero_()
        elif is_sparse:
            view.copy_(gradient.to_dense())
        elif gradient.data_ptr() != view.data_ptr():
            view.copy_(gradient)
            if self._settings.as_views:
                parameter.grad = view
        self._watch.begin(index)
        if view is not None:
            self._reducer.ready(index)

    def _start_apart(self, index: int, gradient: torch.Tensor | None) -> None:
        """Reduce a gradient that has no view."""
        dims = self._sparse_dims.get(index, 1)
        if gradient is None:
            gradient = _empty(self.parameters[index], dims)
        elif gradient.layout == torch.strided:
            gradient = gradient.to_sparse(dims)
        self._apart_handles[index] = sparse_allreduce_async(
            gradient,
            f"{self._label}.{self.names[index]}",
            self._settings.op,
            self._settings.process_set,
        )

    # The end of a step

    def finish(self) -> None:
        """Return when every gradient is reduced, and in place.  Collective, blocking.

        Raises:
            InFlightError: a gradient was changed after backward, when it was on its way already.
            ArgumentError: a newer optimizer has the gradients.
        """
        self._hooks.check()
        changed = self._watch.end()
        self._finish_pass()
        if changed is not None:
            raise changed

    def _finish_pass(self) -> None:
        try:
            for index in self._reducer.missing():
                self._make_up(index)
            try:
                self._reducer.finish()
            finally:  # what was reduced before an error is on its way back as well
                if isinstance(self._reducer.staging, DeviceBuckets):
                    self._reducer.staging.wait()
            came_dense = {} if self._reducer.settled else self._settle()
            self._finish_apart(came_dense)
            self._hand_back()
        finally:
            self._apart_handles.clear()
            self._set_apart.clear()
            self._watch.end()
            self.forget_passes()

    def _make_up(self, index: int) -> None:
        """Put into its bucket what backward has not put there."""
        parameter, view = self.parameters[index], self._views[index]
        assert view is not None
        gradient = parameter.grad
        if gradient is not None and parameter.requires_grad:
            self._hand_over(index)  # set by hand, of an earlier pass, or of too few passes
            return
        if gradient is not None and gradient.data_ptr() == view.data_ptr():
            parameter.grad = gradient.clone()  # frozen since: what it has, it keeps
        view.zero_()

    def _settle(self) -> dict[int, torch.Tensor]:
        """Go over to the plan for all later steps, with this step's results.

        Returns:
            Of the gradients that have no view from now on, what came dense: it is reduced already.
        """
        before = self._views
        self._apart = self._reducer.replan(sorted(self._set_apart))
        self._bind()
        came_dense = {}
        for index, (old, new) in enumerate(zip(before, self._views, strict=True)):
            assert old is not None
            if new is None:
                came_dense[index] = old
            elif old.data_ptr() != new.data_ptr():
                new.copy_(old)
        return came_dense

    def _finish_apart(self, came_dense: dict[int, torch.Tensor]) -> None:
        """Wait for the gradients that have no view."""
        for index in self._apart:
            if index not in self._apart_handles:
                parameter = self.parameters[index]
                is_due = index in self._set_apart or index not in came_dense
                is_due = is_due and parameter.requires_grad
                self._start_apart(index, parameter.grad if is_due else None)
        for index, handle in self._apart_handles.items():
            total = synchronize(handle)
            if index in came_dense:
                total = total + came_dense[index].to_sparse(total.sparse_dim())
            if self.parameters[index].requires_grad:
                self.parameters[index].grad = total

    def _hand_back(self) -> None:
        """Let every parameter have its reduced gradient."""
        for index, (parameter, view) in enumerate(zip(self.parameters, self._views, strict=True)):
            if view is None or not parameter.requires_grad:
                continue
            gradient = parameter.grad
            if index in self._sparse_dims and (gradient is None or gradient.is_sparse):
                parameter.grad = view.to_sparse(self._sparse_dims[index])
            elif self._settings.as_views:
                parameter.grad = view
            elif gradient is None:
                parameter.grad = view.clone()
            else:
                gradient.copy_(view)


def _empty(parameter: torch.Tensor, dims: int) -> torch.Tensor:
    """Return a sparse gradient of `parameter` without entries."""
    return torch.sparse_coo_tensor(
        torch.empty((dims, 0), dtype=torch.int64, device=parameter.device),
        parameter.new_empty((0, *parameter.shape[dims:])),
        parameter.shape,
        check_invariants=False,
    )


#: How many have been numbered in each process set: the same on all its ranks.
_numbers: weakref.WeakKeyDictionary[Communicator, count[int]] = weakref.WeakKeyDictionary()


def label(among: Communicator) -> str:
    """Return a prefix for names that no other optimizer has.  Called alike on all ranks."""
    return f"gradients.{next(_numbers.setdefault(among, count()))}"
