"""`DistributedOptimizer`: any torch optimizer, with gradients averaged over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from hvdkit.api import communicator, size
from hvdkit.dtypes import Average, ReduceOp
from hvdkit.engine.agreement import agree_on_gradients
from hvdkit.engine.compression.choices import bucket_compressor
from hvdkit.engine.wishes import check_groups, check_passes, gradient_op, places_of
from hvdkit.errors import ArgumentError, InFlightError
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.torch.all_reduce import allreduce
from hvdkit.torch.asynchronous.all_reduce import grouped_allreduce_async
from hvdkit.torch.asynchronous.handles import synchronize
from hvdkit.torch.compression import Compression, single_compressor
from hvdkit.torch.gradients import Gradients, Settings
from hvdkit.torch.onebyone import OneByOne
from hvdkit.torch.parameters import (
    Groups,
    Named,
    described,
    names_of,
)


def DistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: torch.optim.Optimizer,
    named_parameters: Named | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Groups = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
    *,
    gradient_as_bucket_view: bool = True,
    bucket_bytes: int | None = None,
) -> torch.optim.Optimizer:
    """Return `optimizer` with gradients averaged over all ranks before each step.  Collective.

    Gradients travel in buckets, while backward still runs: each bucket as soon as its last gradient
    is there.  ``step()`` waits for them.  A parameter that got no gradient on a rank counts as
    zeros there.  Parameters that are added or unfrozen later are averaged as well.  A gradient that
    comes again before ``step()`` is averaged again, for the sum of both averages.  Of several
    distributed optimizers over a parameter, the newest averages its gradients.

    Args:
        optimizer: over the same parameters, in the same order, on every rank.
        named_parameters: ``model.named_parameters()``, for errors that name the parameter.
        compression: one of `Compression`'s, or a class with ``compress`` and ``decompress``.
        backward_passes_per_step: over which gradients are summed up before they travel.
        op: `Average`, `Sum`, or `Adasum`, which combines the optimizer's steps, not gradients.
        gradient_predivide_factor: by which an average's division is done before the sum; the rest
            of it, after.
        num_groups: deprecated, as `groups`.
        groups: gradients to reduce together: so many groups, or lists of parameters.
        sparse_as_dense: whether sparse gradients travel as dense ones; those that no rank has in
            the first step do in any case.
        process_set: whose ranks take part; the others' optimizers step by themselves.
        gradient_as_bucket_view: whether ``p.grad`` is a view of its bucket; else it is copied.
        bucket_bytes: the most that travels together; None: ``HVDKIT_FUSION_THRESHOLD``, 25 MiB.

    Returns:
        `optimizer` itself, its class now a subclass of its own (learning-rate schedulers and
        ``isinstance`` go on as before), which adds ``synchronize()`` and ``skip_synchronize()``.
        To clip or unscale gradients, call ``synchronize()`` first.

    Raises:
        MismatchError: on every rank, if the ranks' parameters differ.
        ArgumentError: names missing or double, arguments that do not fit together, a process set
            that is not known, or `optimizer` is distributed already.
    """
    if isinstance(optimizer, _Distributed):
        raise ArgumentError("this optimizer is a DistributedOptimizer already")
    operation = gradient_op(op, gradient_predivide_factor)
    check_passes(backward_passes_per_step)
    groups = groups if groups is not None else num_groups or None
    check_groups(groups, torch.Tensor, "tensors")
    if process_set.included() is None:
        communicator(process_set)  # raises the error that says so
    in_buckets = bucket_compressor(compression)
    settings = Settings(
        compression=in_buckets,
        op=operation,
        predivide=gradient_predivide_factor,
        sparse_as_dense=sparse_as_dense,
        process_set=process_set,
        as_views=gradient_as_bucket_view,
        bucket_bytes=bucket_bytes,
    )
    kind: type[_Distributed] = _Distributed
    if operation is ReduceOp.ADASUM:
        kind = _DistributedAdasum
        compression = compression if in_buckets is None else single_compressor(in_buckets)
    named = names_of(optimizer, named_parameters)
    vars(optimizer).pop("step", None)  # a scheduler's, around the step that averages nothing
    plain = type(optimizer)
    distributed: Any = optimizer
    distributed.__class__ = type(plain.__name__, (kind, plain), {"__module__": __name__})
    custom = compression if in_buckets is None or kind is _DistributedAdasum else None
    try:
        distributed._distribute(
            named, settings, passes=backward_passes_per_step, groups=groups, custom=custom
        )
    except BaseException:
        distributed.__class__ = plain
        raise
    return optimizer


class _Distributed(torch.optim.Optimizer):
    """What a distributed optimizer does beside its own class's work."""

    def _distribute(
        self,
        named: dict[torch.nn.Parameter, str],
        settings: Settings,
        *,
        passes: int,
        groups: Groups,
        custom: Any,
    ) -> None:
        self._names = named
        self._settings = settings
        self._passes = passes
        self._custom = custom
        self._averaged = self._skips = False
        self._gradients: list[Gradients | OneByOne] = []
        self._reduced: set[torch.nn.Parameter] = set()
        self._local = size() == 1 or not settings.process_set.included()
        self._adopt(groups)
        if not self._local and not self._reduced:
            self._agree([], [])  # the other ranks, too, have none that is trainable

    def _adopt(self, groups: Groups = None) -> None:
        """Take in the trainable parameters that are new.  Collective if there are any."""
        if self._local:
            return
        new = [p for p in self._parameters() if p.requires_grad and p not in self._reduced]
        for device in dict.fromkeys(parameter.device for parameter in new):
            there = [parameter for parameter in new if parameter.device == device]
            names = self._names_of(there)
            self._gradients.append(self._reduce(there, names, places_of(there, groups)))
            self._reduced.update(there)

    def _agree(self, parameters: list[torch.nn.Parameter], names: list[str]) -> None:
        """Check that every rank has the same parameters.  Collective."""
        among = communicator(self._settings.process_set)
        among.call(agree_on_gradients, described(parameters, names))

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _names_of(self, parameters: list[torch.nn.Parameter]) -> list[str]:
        return [self._names.setdefault(p, f"parameter.{len(self._names)}") for p in parameters]

    def _reduce(
        self, parameters: list[torch.nn.Parameter], names: list[str], groups: Any
    ) -> Gradients | OneByOne:
        if self._custom is not None:
            return OneByOne(
                parameters, names, self._settings, passes=self._passes, compression=self._custom
            )
        return Gradients(parameters, names, self._settings, passes=self._passes, groups=groups)

    @property
    def backward_passes_per_step(self) -> int:
        """Backward passes over which gradients are summed up before they travel."""
        return self._passes

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change over how many backward passes gradients are summed up; between steps."""
        check_passes(passes)
        self._passes = passes
        for gradients in self._gradients:
            gradients.set_passes(passes)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, whose gradients are averaged as well.  Collective."""
        super().add_param_group(param_group)
        self._adopt()

    def synchronize(self) -> None:
        """Return when every gradient is averaged, and in place.  Collective, blocking.

        Call it before ``step()`` to work on averaged gradients, as to clip them; ``step()`` then
        does not average again.

        Raises:
            InFlightError: a gradient was changed after backward, when it was on its way already.
        """
        self._adopt()
        if self._is_averaged():
            return
        with ExitStack() as all_of_them:  # an error of one must not leave the others on their way
            for gradients in reversed(self._gradients):
                all_of_them.callback(gradients.finish)
        self._averaged = True

    def _is_averaged(self) -> bool:
        """Return whether `synchronize` has been, and no backward since."""
        return self._averaged and not any(gradients.fresh for gradients in self._gradients)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average the gradients, unless `synchronize` has, then step.  Collective, blocking.

        LBFGS decides by the loss how far it goes, and gets that of all ranks, combined as the
        gradients are, of what the closure returns.

        Raises:
            InFlightError: as `synchronize`; or gradients are on their way where it is skipped.
        """
        self._opt_called = True  # as torch's schedulers want to know
        if closure is None:
            if not self._skips:
                self.synchronize()
            elif any(gradients.in_flight for gradients in self._gradients):
                raise InFlightError(
                    "step() was called within skip_synchronize(), but the gradients are on their "
                    "way to the other ranks: call synchronize() first"
                )
            self._averaged = False
            return super().step()

        def averaged() -> Any:
            loss = closure()
            self.synchronize()
            self._averaged = False
            if isinstance(self, torch.optim.LBFGS) and not self._local:
                return self._reduce_loss(loss)
            return loss

        return super().step(averaged)

    # torch wraps the `step` of a class of optimizers, its schedulers that of an optimizer, unless
    # these marks are there: what is to be wrapped is the step that this one calls.
    step.hooked = step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _reduce_loss(self, loss: Any) -> Any:
        as_tensor = isinstance(loss, torch.Tensor)
        total = allreduce(
            loss.detach() if as_tensor else torch.tensor(loss, dtype=torch.float64),
            name="loss",
            op=self._settings.op,
            process_set=self._settings.process_set,
        )
        return total if as_tensor else total.item()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Step without averaging: for after ``synchronize()``, as Horovod's scripts have it."""
        self._skips = True
        try:
            yield
        finally:
            self._skips = self._averaged = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients.

        Raises:
            InFlightError: between backward and step, when gradients are on their way.
        """
        if any(gradients.in_flight for gradients in self._gradients):
            raise InFlightError(
                "zero_grad() was called after backward() but before step() or synchronize(): "
                "the gradients are on their way to the other ranks; to throw them away, call "
                "synchronize() first"
            )
        for gradients in self._gradients:
            gradients.forget_passes()
        self._averaged = False
        super().zero_grad(set_to_none)


class _DistributedAdasum(_Distributed):
    """Combines what the optimizer does to the weights on each rank, instead of gradients.

    Adasum of gradients knows nothing of what an optimizer makes of them; of its steps, it does
    [Maleki et al., MLSys 2021, section 4; Horovod does the same].
    """

    def _adopt(self, groups: Groups = None) -> None:
        """Nothing is on its way before a step is made.  Collective if there are new parameters."""
        del groups
        new = [parameter for parameter in self._parameters() if parameter not in self._reduced]
        if new and not self._local:
            self._agree(new, self._names_of(new))
            self._reduced.update(new)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step on this rank's gradients, then combine all ranks' steps.  Collective, blocking."""
        self._opt_called = True
        if self._local:
            return super(_Distributed, self).step(closure)
        parameters = self._parameters()
        starts = [parameter.detach().clone() for parameter in parameters]
        loss = super(_Distributed, self).step(closure)
        self._averaged = False
        packed, forms = [], []
        for parameter, start in zip(parameters, starts, strict=True):
            tensor, form = self._custom.compress(parameter.detach() - start)
            packed.append(tensor)
            forms.append(form)
        with torch.no_grad():
            for index, total in self._combine(packed):
                delta = self._custom.decompress(total, forms[index])
                parameters[index].copy_(starts[index] + delta)
        return loss

    step.hooked = step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _combine(self, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the combinations of all ranks' `tensors`, with their places.  Collective."""
        places: dict[torch.dtype, list[int]] = {}
        for index, tensor in enumerate(tensors):
            places.setdefault(tensor.dtype, []).append(index)
        handles = [
            grouped_allreduce_async(
                [tensors[index] for index in alike],
                name=f"adasum.{dtype}",
                op=self._settings.op,
                process_set=self._settings.process_set,
            )
            for dtype, alike in places.items()
        ]
        for alike, handle in zip(places.values(), handles, strict=True):
            yield from zip(alike, synchronize(handle), strict=True)

    def synchronize(self) -> None:
        """Do nothing: gradients stay this rank's own."""
