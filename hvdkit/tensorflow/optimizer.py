"""`DistributedOptimizer`: for optimizers of Keras, and of ``tf.compat.v1.train``."""

from __future__ import annotations

import warnings
from typing import Any

import tensorflow as tf

from hvdkit.dtypes import Average, ReduceOp
from hvdkit.engine.wishes import check_passes
from hvdkit.errors import ArgumentError, UnsupportedError
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.tensorflow.compression import Compression
from hvdkit.tensorflow.gradients import Reduction, Settings
from hvdkit.tensorflow.graph import unconverted
from hvdkit.tensorflow.local import LocalSources


def DistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: Any,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: Any = Average,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Any = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
) -> Any:
    """Return `optimizer` with gradients combined over all ranks before they are applied.

    Args:
        optimizer: of Keras, which `hvdkit.keras.DistributedOptimizer` then makes distributed; or of
            ``tf.compat.v1.train``, whose ``compute_gradients()`` and ``minimize()`` are then
            collective.
        backward_passes_per_step: for optimizers of Keras: see there.
        average_aggregated_gradients: likewise.
        use_locking, device_dense, device_sparse: without effect.
        name, compression, sparse_as_dense, op, gradient_predivide_factor, num_groups, groups,
            process_set, scale_local_gradients: as `DistributedGradientTape` has them.

    Raises:
        ArgumentError: arguments that do not fit together, or what is no optimizer.
        UnsupportedError: `tf.compat.v1.train` with Adasum, or with several backward passes.
    """
    del use_locking
    wishes = {
        "compression": compression,
        "sparse_as_dense": sparse_as_dense,
        "op": op,
        "gradient_predivide_factor": gradient_predivide_factor,
        "num_groups": num_groups,
        "groups": groups,
        "process_set": process_set,
        "scale_local_gradients": scale_local_gradients,
    }
    check_passes(backward_passes_per_step)
    if isinstance(optimizer, tf.compat.v1.train.Optimizer):
        if backward_passes_per_step > 1:
            raise UnsupportedError(
                "backward_passes_per_step is for optimizers of Keras, not of tf.compat.v1.train"
            )
        return _distribute(optimizer, **wishes)
    from hvdkit.keras import DistributedOptimizer as ForKeras  # which is made of this package

    return ForKeras(
        optimizer,
        name=name,
        device_dense=device_dense,
        device_sparse=device_sparse,
        backward_passes_per_step=backward_passes_per_step,
        average_aggregated_gradients=average_aggregated_gradients,
        **wishes,
    )


def _distribute(
    optimizer: Any,
    *,
    gradient_predivide_factor: float,
    num_groups: int,
    groups: Any,
    scale_local_gradients: bool,
    **wishes: Any,
) -> Any:
    """Make an optimizer of ``tf.compat.v1.train`` a distributed one, itself."""
    if isinstance(optimizer, _Distributed):
        raise ArgumentError("this optimizer is a DistributedOptimizer already")
    if num_groups:
        warnings.warn("num_groups= is deprecated; use groups=", DeprecationWarning, stacklevel=3)
    settings = Settings.of(
        predivide=gradient_predivide_factor,
        groups=groups if groups is not None else num_groups or None,
        **wishes,
    )
    if settings.op is ReduceOp.ADASUM:
        raise UnsupportedError(
            "Adasum combines what optimizers do, and those of tf.compat.v1.train apply it at once; "
            "use an optimizer of Keras"
        )
    plain = type(optimizer)
    optimizer.__class__ = type(plain.__name__, (_Distributed, plain), {"__module__": __name__})
    optimizer._reduction = Reduction(settings)
    optimizer._local = LocalSources(settings.process_set, scaled=scale_local_gradients)
    return optimizer


class _Distributed(tf.compat.v1.train.Optimizer):  # type: ignore[misc]
    """What a distributed optimizer of ``tf.compat.v1.train`` does beside its own class's work."""

    def register_local_var(self, var: Any) -> None:
        """Leave the gradient of a variable out of what is combined."""
        self._local.add(var)

    @unconverted
    def compute_gradients(self, *args: Any, **kwargs: Any) -> list[tuple[Any, Any]]:
        """Return ``(gradient, variable)`` pairs, of all ranks' gradients.  Collective."""
        gradients, variables = zip(*super().compute_gradients(*args, **kwargs), strict=True)
        reduced = self._local.reduce(self._reduction, gradients, variables)
        return list(zip(reduced, variables, strict=True))
