"""`DistributedOptimizer`: any optimizer of Keras, with gradients averaged over all ranks.

It is the same object, whose class is now one derived from its own.  So its variables, its
learning-rate schedule, whatever else was set on it, and a model that knows it stay as they are,
built or not.  (Made anew from its config, as Horovod does it, it would lose its state.)  Keras
saves it as what it was: the file loads without hvdkit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras

from hvdkit.dtypes import Average, ReduceOp, as_op
from hvdkit.errors import ArgumentError, UnsupportedError
from hvdkit.keras import backends, patches
from hvdkit.keras.distribution import Distribution, Wishes, distribution_of
from hvdkit.process_sets import ProcessSet, global_process_set

Compression = backends.compression()


def DistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = Average,
    num_groups: int = 0,
    groups: Any = None,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
) -> Any:
    """Return `optimizer` with gradients averaged over all ranks before it applies them.

    ``apply()`` and ``apply_gradients()`` are then collective, wherever they are called: by ``fit``,
    ``train_on_batch``, a ``train_step`` or a loop of one's own, eager or in a tf.function.  What
    the optimizer does with gradients (clipping, accumulating, weight decay) it does with averaged
    ones.  A gradient that some ranks do not have counts as zeros there.  Give it gradients of a
    plain tape: those of a `DistributedGradientTape` would be combined again.

    Args:
        optimizer: of Keras, built or not; of one that scales losses, that which it wraps.
        compression: one of `Compression`'s, or a class with ``compress`` and ``decompress``.
        sparse_as_dense: whether tf.IndexedSlices travel as dense tensors; else all ranks' are
            gathered.
        gradient_predivide_factor: by which an average's division is done before the sum; the rest
            of it, after.
        op: `Average`, `Sum`, or `Adasum`, which combines the optimizer's steps, not gradients.
        num_groups: deprecated, as `groups`.
        groups: gradients to reduce together: so many groups, or lists of variables; None: by size.
        backward_passes_per_step: calls over which gradients are summed up before they travel and
            are applied.  ``iterations`` counts steps; learning-rate schedules count calls, as with
            Keras's gradient_accumulation_steps.
        average_aggregated_gradients: whether the sums are divided by their number.
        process_set: whose ranks take part; the others' gradients stay their own.
        scale_local_gradients: whether those of local variables, which are not combined, are divided
            by the number of ranks.
        name, device_dense, device_sparse: without effect.

    Returns:
        `optimizer` itself, its class now a subclass of its own, which adds
        ``register_local_var(variable)``.

    Raises:
        ArgumentError: arguments that do not fit together, or `optimizer` is distributed already.
        UnsupportedError: Adasum with what does not go with it; or a backend of Keras that is
            neither TensorFlow nor torch.
    """
    del name, device_dense, device_sparse
    if num_groups:
        warnings.warn("num_groups= is deprecated; use groups=", DeprecationWarning, stacklevel=2)
    wishes = Wishes(
        compression=compression,
        op=op,
        predivide=gradient_predivide_factor,
        sparse_as_dense=sparse_as_dense,
        groups=groups if groups is not None else num_groups or None,
        process_set=process_set,
        passes=backward_passes_per_step,
        mean_of_passes=average_aggregated_gradients,
        scale_local=scale_local_gradients,
    )
    _distribute(optimizer, wishes)
    return optimizer


def PartialDistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    groups: Any = None,
    process_set: ProcessSet = global_process_set,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
) -> Any:
    """Return `optimizer` as `DistributedOptimizer` does, with some layers left out.

    Args:
        local_layers: a layer or several, built, whose gradients stay this rank's own.

    Raises:
        ArgumentError: `local_layers` are none; and as `DistributedOptimizer`.
    """
    del name, device_dense, device_sparse
    several = local_layers or []
    if isinstance(several, keras.layers.Layer):
        several = [several]
    if not all(isinstance(layer, keras.layers.Layer) for layer in several):
        raise ArgumentError(f"local_layers must be layers of Keras, not {local_layers!r}")
    wishes = Wishes(
        compression=compression,
        op=op,
        predivide=gradient_predivide_factor,
        sparse_as_dense=sparse_as_dense,
        groups=groups,
        process_set=process_set,
        passes=backward_passes_per_step,
        mean_of_passes=average_aggregated_gradients,
        scale_local=scale_local_gradients,
    )
    distributed = _distribute(optimizer, wishes)
    for layer in several:
        for variable in layer.trainable_weights:
            distributed.register_local_var(variable)
    return optimizer


def _distribute(optimizer: Any, wishes: Wishes) -> _Distributed:
    """Make an optimizer a distributed one, and return it; of one around another, the other.

    Raises:
        ArgumentError, UnsupportedError: as `DistributedOptimizer`.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ArgumentError(f"DistributedOptimizer takes an optimizer of Keras, not {optimizer!r}")
    if distribution_of(optimizer) is not None:
        raise ArgumentError("this optimizer is a DistributedOptimizer already")
    is_adasum = as_op(wishes.op) is ReduceOp.ADASUM
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        if is_adasum:
            raise UnsupportedError("op=Adasum is not for optimizers that scale losses")
        optimizer = optimizer.inner_optimizer
    if is_adasum and optimizer.use_ema:
        raise UnsupportedError(
            "op=Adasum is not for optimizers with use_ema, which would average what the weights "
            "are before they are combined"
        )
    if wishes.passes > 1 and optimizer.gradient_accumulation_steps:
        raise ArgumentError(
            "backward_passes_per_step and gradient_accumulation_steps do the same: give one of them"
        )
    distribution = Distribution(wishes)
    patches.install()
    kind = _subclass(type(optimizer), wishes)
    object.__setattr__(optimizer, "__class__", kind)
    object.__setattr__(optimizer, "_distribution", distribution)
    distributed: _Distributed = optimizer
    return distributed


def _subclass(plain: Any, wishes: Wishes) -> type[_Distributed]:
    """Return a class that does what `plain` does with combined gradients.

    Keras saves an optimizer by the name and module of its class, or the name that the class is
    registered by.  This one's are those of `plain`.
    """
    public = getattr(keras.optimizers, plain.__name__, None) is plain
    namespace = {
        "__module__": "keras.optimizers" if public else plain.__module__,
        "__doc__": plain.__doc__,
        "_wishes": wishes,
        "apply": backends.chosen().unconverted(_Distributed.apply),
    }
    return type(keras.saving.get_registered_name(plain), (_Distributed, plain), namespace)


class _Distributed(keras.optimizers.Optimizer):  # type: ignore[misc]
    """What a distributed optimizer does beside its own class's work."""

    _wishes: Wishes

    @property
    def distribution(self) -> Distribution:
        """What brings this optimizer's gradients to the other ranks.

        One made by ``from_config`` has its own, of the same kind.
        """
        found: Distribution | None = vars(self).get("_distribution")
        if found is None:
            found = Distribution(self._wishes)
            object.__setattr__(self, "_distribution", found)
        return found

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Combine all ranks' gradients, then apply them.  Collective, blocking."""
        plain: Callable[[Sequence[Any], Any], None] = super().apply
        self.distribution.apply(self, self, plain, grads, trainable_variables)

    def register_local_var(self, var: Any) -> None:
        """Leave the gradient of a variable out of what is combined."""
        self.distribution.leave_alone(self._var_key(var))

    @property
    def iterations(self) -> Any:
        """The number of steps; several passes are one."""
        passes = self._wishes.passes
        done = super().iterations
        return done if passes == 1 else keras.ops.floor_divide(done, passes)
