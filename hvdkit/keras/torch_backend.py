"""Keras's torch backend: gradients leave in backward, as those of hvdkit.torch's optimizer do.

    first apply      the ranks agree on which variables have gradients           [1]
    zero_grad        Keras's train_step, before each backward
    backward         buckets leave as they fill up                               [2]
    apply            waits for them; the reduced gradients are what it applies   [3]

Gradients that are given to apply, and are not those that backward left, leave there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import keras
import torch

from hvdkit.api import communicator
from hvdkit.dtypes import ReduceOp
from hvdkit.engine.compression.choices import bucket_compressor
from hvdkit.engine.wishes import check_groups, gradient_op, places_of
from hvdkit.errors import InFlightError
from hvdkit.torch.compression import Compression
from hvdkit.torch.gradients import Gradients, Settings
from hvdkit.torch.onebyone import OneByOne

if TYPE_CHECKING:
    from hvdkit.keras.distribution import Wishes

__all__ = ["Compression", "reduction", "unconverted"]

F = TypeVar("F", bound=Callable[..., Any])


def unconverted(function: F) -> F:
    """Return `function`: nothing here converts Python."""
    return function


def reduction(wishes: Wishes) -> Reduction:
    """Return what combines gradients: ``reduction(gradients, variables)``.

    Raises:
        ArgumentError: wishes that do not fit together.
    """
    check_groups(wishes.groups, keras.Variable, "variables")
    settings = Settings(
        compression=bucket_compressor(wishes.compression),
        op=gradient_op(wishes.op, wishes.predivide),
        predivide=wishes.predivide,
        sparse_as_dense=wishes.sparse_as_dense,
        process_set=wishes.process_set,
        as_views=False,  # what a loop reads between backward and apply is this rank's own
    )
    return Reduction(settings, wishes)


class Reduction:
    """Combines the gradients of variables of Keras, step by step.

    Args:
        settings: how.
        wishes: what they were made of.
    """

    def __init__(self, settings: Settings, wishes: Wishes) -> None:
        self._settings = settings
        self._wishes = wishes
        self._gradients: list[Gradients | OneByOne] = []
        self._known: set[torch.nn.Parameter] = set()

    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Return the combined gradients.  Collective, blocking.

        Args:
            gradients: tensors or None, one for each variable.
            variables: the same in the same order on every rank.

        Raises:
            MismatchError: on every rank, naming the first variable that differs.
            InFlightError: a gradient was changed in place after backward, when it was on its way.
        """
        self._adopt(gradients, variables)
        parameters = [variable.value for variable in variables]
        pairs = list(zip(gradients, parameters, strict=True))
        others = [(g, p) for g, p in pairs if p in self._known and g is not p.grad]
        if others:  # made of what backward has left, or without it
            self._finish()
            for gradient, parameter in others:
                copy = None if gradient is None else gradient.detach().to(parameter, copy=True)
                parameter.grad = copy
        self._finish()  # [3]
        return [p.grad if p in self._known else g for g, p in pairs]

    def _finish(self) -> None:
        try:
            with ExitStack() as all_of_them:  # an error of one must not leave others on their way
                for gradients in self._gradients:
                    all_of_them.callback(gradients.finish)
        except InFlightError as exc:
            raise InFlightError(
                "a gradient was changed in place between backward() and apply(), when it was on "
                "its way to the other ranks: give apply() new tensors instead, or have the "
                "optimizer clip (clipnorm=, global_clipnorm=, clipvalue=)"
            ) from exc

    def _adopt(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """Take in the variables that have gradients for the first time.  Then collective."""
        new = [
            (variable, gradient is not None)
            for variable, gradient in zip(variables, gradients, strict=True)
            if variable.value not in self._known
        ]
        if self._known and not any(has_gradient for _, has_gradient in new):
            return
        among = communicator(self._settings.process_set)
        mine = [(variable.path, has_gradient) for variable, has_gradient in new]
        everyone = among.allgather_object(mine, name="gradients")  # [1]
        if all(len(theirs) == len(mine) for theirs in everyone):
            chosen = [i for i in range(len(new)) if any(theirs[i][1] for theirs in everyone)]
        else:
            chosen = list(range(len(new)))  # what ranks differ in is found below
        # Keras numbers names, differently where one rank has made other models besides.
        names = [everyone[0][i][0] if i < len(everyone[0]) else mine[i][0] for i in chosen]
        for device in dict.fromkeys(new[i][0].value.device for i in chosen):
            there = [place for place, i in enumerate(chosen) if new[i][0].value.device == device]
            self._reduce([new[chosen[k]][0] for k in there], [names[k] for k in there])

    def _reduce(self, variables: Sequence[Any], names: Sequence[str]) -> None:
        """Have the gradients of `variables`, all on one device, reduced from now on."""
        parameters = [variable.value for variable in variables]
        self._known.update(parameters)
        # Sums of several passes, and what Adasum combines, are not backward's: `finish` sends them.
        is_backwards = self._wishes.passes == 1 and self._settings.op is not ReduceOp.ADASUM
        passes = 1 if is_backwards else sys.maxsize  # [2]
        if self._settings.compression is None:
            made: Gradients | OneByOne = OneByOne(
                parameters,
                names,
                self._settings,
                passes=passes,
                compression=self._wishes.compression,
            )
        else:
            groups: Any = self._wishes.groups
            if isinstance(groups, list | tuple):
                groups = [[id(variable) for variable in group] for group in groups]
            places = places_of([id(variable) for variable in variables], groups)
            made = _Gradients(parameters, names, self._settings, passes=passes, groups=places)
        self._gradients.append(made)


class _Gradients(Gradients):
    """As `Gradients`, where backward may come again though nobody applied what it gave.

    That is so where one model's loss is computed through another, which has an optimizer of its
    own: zero_grad() throws those gradients away, but they are on their way.
    """

    def before(self, index: int) -> None:
        """Make sure that a gradient is not on its way when another is computed."""
        if self.parameters[index].grad is not None or not self.on_its_way(index):
            super().before(index)
            return
        left = [parameter.grad for parameter in self.parameters]
        with suppress(InFlightError):
            self.finish()
        for parameter, gradient in zip(self.parameters, left, strict=True):
            if gradient is not None and self._settings.op is ReduceOp.SUM:
                gradient.div_(self._among.size)  # it is alike on all ranks now, and summed again
            parameter.grad = gradient

    def on_its_way(self, index: int) -> bool:
        """Return whether a gradient has been handed over since the last `finish`."""
        return self._reducer.has_come(index) or index in self._apart_handles
