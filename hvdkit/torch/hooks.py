"""The hooks by which a distributed optimizer learns of gradients, and of changes to them.

A parameter's gradient is in one place, so one optimizer at a time can reduce it: the newest.  An
older one that lives on hears no more of the parameter, and says so when it is to step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from hvdkit.errors import ArgumentError, InFlightError


class Listener(Protocol):
    """Who wants to know of gradients, of parameters by their place."""

    def before(self, index: int) -> None:
        """Called in backward, before a gradient is added to ``.grad``."""
        ...

    def after(self, index: int) -> None:
        """Called in backward, after it was."""
        ...


class Hooks:
    """The hooks of one listener; they are gone when it is.

    Args:
        listener: is called, as long as it lives; has no other owner than its optimizer.
        parameters: which require gradients; the listener keeps them alive.
        names: of the parameters.
    """

    def __init__(
        self,
        listener: Listener,
        parameters: Sequence[torch.nn.Parameter],
        names: Sequence[str],
    ) -> None:
        self._lost: list[str] = []
        self._names = {
            id(parameter): name for parameter, name in zip(parameters, names, strict=True)
        }
        self._handles: dict[int, tuple[Any, Any]] = {}
        reference = weakref.ref(listener)
        for index, parameter in enumerate(parameters):
            key = id(parameter)
            older = _newest.get(key)
            if older is not None:
                older._let_go(key)
            _newest[key] = self
            before, after = _calls(reference, index)
            self._handles[key] = (
                parameter.register_hook(before),
                parameter.register_post_accumulate_grad_hook(after),
            )
        weakref.finalize(self, _remove, self._handles).atexit = False

    def check(self) -> None:
        """Check that every parameter's gradients still come here.

        Raises:
            ArgumentError: those of some go to a newer optimizer.
        """
        if self._lost:
            raise ArgumentError(
                f"a newer DistributedOptimizer averages the gradients of {self._lost[0]!r}; step "
                "that one, and let go of this one"
            )

    def _let_go(self, key: int) -> None:
        for handle in self._handles.pop(key):
            handle.remove()
        self._lost.append(self._names[key])


#: Who has the hooks of a parameter, by its `id`; an entry goes when the listener does.
_newest: weakref.WeakValueDictionary[int, Hooks] = weakref.WeakValueDictionary()


def _calls(
    listener: weakref.ref[Listener], index: int
) -> tuple[Callable[[torch.Tensor], None], Callable[[torch.Tensor], None]]:
    """Return what is called before and after a gradient is accumulated."""

    def before(_: torch.Tensor) -> None:
        alive = listener()
        if alive is not None:
            alive.before(index)

    def after(_: torch.Tensor) -> None:
        alive = listener()
        if alive is not None:
            alive.after(index)

    return before, after


def _remove(handles: dict[int, tuple[Any, Any]]) -> None:
    for pair in handles.values():
        for handle in pair:
            handle.remove()


class Watch:
    """Notices gradients that are changed while they are on their way."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], names: Sequence[str]) -> None:
        self._parameters = parameters
        self._names = names
        self._seen: dict[int, tuple[torch.Tensor, int]] = {}

    def begin(self, index: int) -> None:
        """Watch the gradient that a parameter has now."""
        gradient = self._parameters[index].grad
        assert gradient is not None
        self._seen[index] = (gradient, gradient._version)

    def end(self) -> InFlightError | None:
        """Watch no more; return an error if a gradient is another than it was."""
        seen, self._seen = self._seen, {}
        for index, (gradient, version) in sorted(seen.items(), key=lambda item: item[0]):
            if gradient._version != version or self._parameters[index].grad is not gradient:
                return InFlightError(
                    f"the gradient of {self._names[index]!r} was changed between backward() and "
                    "step(), when it was on its way to the other ranks: call "
                    "optimizer.synchronize() first, then clip, unscale or otherwise change "
                    "gradients; step() does not average again"
                )
        return None
