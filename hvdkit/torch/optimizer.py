"""`DistributedOptimizer`: any torch optimizer, with gradients averaged over all ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hvdkit.api import context, size
from hvdkit.engine.bucketing import Gradient
from hvdkit.engine.reducer import GradientReducer
from hvdkit.errors import ArgumentError, HvdkitError, UnsupportedError
from hvdkit.torch.convert import numpy_dtype, tensor_of


def DistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
    *,
    bucket_bytes: int | None = None,
) -> torch.optim.Optimizer:
    """Return `optimizer` with gradients averaged over all ranks before each step.  Collective.

    Gradients become views of buckets, which are all-reduced while backward still runs: each bucket
    as soon as its last gradient is there.  ``step()`` waits for them.  A parameter that got no
    gradient on a rank counts as zeros there.

    Args:
        optimizer: over the same parameters, in the same order, on every rank.
        named_parameters: ``model.named_parameters()``, for errors that name the parameter.
        bucket_bytes: the most that travels together; None: ``HVDKIT_FUSION_THRESHOLD``, 25 MiB.

    Returns:
        `optimizer` itself, its class now a subclass of its own (learning-rate schedulers and
        ``isinstance`` go on as before), which adds ``synchronize()``.  To clip gradients,
        call that first.

    Raises:
        MismatchError: on every rank, if the ranks' parameters differ.
        ArgumentError: names missing or double, or `optimizer` is distributed already.
    """
    if isinstance(optimizer, _Distributed):
        raise ArgumentError("this optimizer is a DistributedOptimizer already")
    parameters = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
    names = _names(parameters, named_parameters)
    optimizer.__class__ = type(
        type(optimizer).__name__, (_Distributed, type(optimizer)), {"__module__": __name__}
    )
    assert isinstance(optimizer, _Distributed)
    optimizer._distribute(parameters, names, bucket_bytes)
    return optimizer


class _Distributed(torch.optim.Optimizer):
    """What a distributed optimizer does beside its own class's work."""

    def _distribute(
        self, parameters: list[torch.nn.Parameter], names: list[str], bucket_bytes: int | None
    ) -> None:
        self._reduced = parameters
        self._averaged = False
        self._reducer: GradientReducer | None = None
        if size() == 1:
            return
        self._reducer = context().gradient_reducer(
            [
                Gradient(name, tuple(parameter.shape), numpy_dtype(parameter.dtype))
                for name, parameter in zip(names, parameters, strict=True)
            ],
            bucket_bytes=bucket_bytes,
        )
        self._views = [tensor_of(view) for view in self._reducer.views]
        self._versions = [view._version for view in self._views]
        for index, parameter in enumerate(parameters):
            hook = _hook(weakref.ref(self), index)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _ready(self, index: int) -> None:
        """Move a gradient into its bucket, unless it is there, and let the bucket go if full."""
        assert self._reducer is not None
        parameter, view = self._reduced[index], self._views[index]
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise UnsupportedError(
                f"the gradient of {self._reducer.gradients[index].name!r} is sparse; "
                "DistributedOptimizer averages dense gradients (sparse=False)"
            )
        if gradient.data_ptr() != view.data_ptr():
            view.copy_(gradient)
            parameter.grad = view
        self._averaged = False
        self._versions[index] = view._version
        self._reducer.ready(index)

    def synchronize(self) -> None:
        """Return when every gradient is averaged, and in place.  Collective, blocking.

        Call it before ``step()`` to work on averaged gradients, as to clip them; ``step()`` then
        does not average again.

        Raises:
            HvdkitError: a gradient was changed after backward, when it was on its way already.
        """
        if self._reducer is None:
            return
        missing = set(self._reducer.missing())
        changed = [
            gradient.name
            for index, gradient in enumerate(self._reducer.gradients)
            if index not in missing and self._views[index]._version != self._versions[index]
        ]
        for index in self._reducer.missing():  # set by hand, or left from an earlier step
            if self._reduced[index].grad is not None:
                self._ready(index)
        self._reducer.finish()
        if changed:
            raise HvdkitError(
                f"the gradient of {changed[0]!r} was changed between backward() and step(), when "
                "it was on its way to the other ranks: call optimizer.synchronize() first, then "
                "clip, unscale or otherwise change gradients; step() does not average again"
            )
        for parameter, view in zip(self._reduced, self._views, strict=True):
            if parameter.requires_grad:
                parameter.grad = view
        self._averaged = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average the gradients, unless `synchronize` has, then step.  Collective, blocking."""
        if closure is None:
            if not self._averaged:
                self.synchronize()
            self._averaged = False
            return super().step()

        def averaged() -> Any:
            loss = closure()
            self.synchronize()
            return loss

        return super().step(averaged)

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Step without averaging: for after ``synchronize()``, as Horovod's scripts have it."""
        self._averaged = True
        try:
            yield
        finally:
            self._averaged = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients.

        Raises:
            HvdkitError: between backward and step, when gradients are on their way.
        """
        if self._reducer is not None and self._reducer.in_flight:
            raise HvdkitError(
                "zero_grad() was called after backward() but before step() or synchronize(): "
                "the gradients are on their way to the other ranks"
            )
        super().zero_grad(set_to_none)


def _hook(owner: weakref.ref[_Distributed], index: int) -> Callable[[torch.Tensor], None]:
    """Return a hook for gradient `index` that does nothing once its optimizer is gone."""

    def ready(_: torch.Tensor) -> None:
        optimizer = owner()
        if optimizer is not None:
            optimizer._ready(index)

    return ready


def _names(
    parameters: list[torch.nn.Parameter],
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None,
) -> list[str]:
    """Return each parameter's name.

    Raises:
        ArgumentError: a parameter without a name, or a name that is given twice.
    """
    if named_parameters is None:
        return [f"parameter.{index}" for index in range(len(parameters))]
    pairs = list(named_parameters)
    given = [name for name, _ in pairs]
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise ArgumentError(f"named_parameters has names that occur twice: {', '.join(twice)}")
    by_identity = {id(parameter): name for name, parameter in pairs}
    nameless = [parameter for parameter in parameters if id(parameter) not in by_identity]
    if nameless:
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in nameless)
        raise ArgumentError(
            f"named_parameters names {len(parameters) - len(nameless)} of the optimizer's "
            f"{len(parameters)} parameters; without a name are those of shape {shapes}"
        )
    return [by_identity[id(parameter)] for parameter in parameters]
