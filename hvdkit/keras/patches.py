"""The two places in Keras that must know of distributed optimizers, and have no hook for it.

Neither changes anything for models and optimizers that are not hvdkit's.

``LossScaleOptimizer.apply`` looks for gradients that are not finite, and then skips the step.
Around a distributed optimizer it would see this rank's alone, and ranks would part, one waiting for
another's gradients in a step that this skips.  So they are combined before it looks.

``Model.jit_compile``, which Keras reads when it makes a function of a step, is False where the step
communicates, for XLA cannot compile that and torch.compile not the hooks in backward.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import keras

from hvdkit.api import is_initialized, rank
from hvdkit.keras import backends
from hvdkit.keras.distribution import distribution_of

_installed: list[bool] = []
_warned: list[bool] = []


def install() -> None:
    """Make both, once in a process."""
    if not _installed:
        _installed.append(True)
        _reduce_before_loss_scale(keras.optimizers.LossScaleOptimizer)
        _switch_compilation_off(next(k for k in keras.Model.__mro__ if "jit_compile" in vars(k)))


def _reduce_before_loss_scale(kind: Any) -> None:
    plain = kind.apply

    @functools.wraps(plain)
    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> None:
        own = functools.partial(plain, self)
        distribution = distribution_of(self)
        if distribution is None:
            own(grads, trainable_variables)
        else:
            inner = self.inner_optimizer
            distribution.apply(inner, self, own, grads, trainable_variables)

    kind.apply = backends.chosen().unconverted(apply)


def _switch_compilation_off(kind: Any) -> None:
    plain = kind.jit_compile

    def jit_compile(self: Any) -> Any:
        wanted = plain.fget(self)
        distribution = distribution_of(getattr(self, "optimizer", None))
        if not wanted or distribution is None or not is_initialized():
            return wanted
        if not distribution.has_others():
            return wanted
        if rank() == 0 and not _warned:
            _warned.append(True)
            warnings.warn(
                "jit_compile is switched off for models with a DistributedOptimizer: a step that "
                "communicates cannot be compiled; compile(jit_compile=False) says so without "
                "this warning",
                stacklevel=2,
            )
        return False

    kind.jit_compile = property(jit_compile, plain.fset, plain.fdel, plain.__doc__)
