"""`DistributedGradientTape`: a tf.GradientTape whose gradients are those of all ranks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit.dtypes import Average
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.tensorflow.compression import Compression
from hvdkit.tensorflow.gradients import Settings, reduction_for
from hvdkit.tensorflow.graph import unconverted
from hvdkit.tensorflow.local import LocalSources, variables_of_layers


def DistributedGradientTape(  # noqa: N802  (Horovod's name)
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: Any = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
) -> Any:
    """Return a tape like `gradtape` whose ``gradient()`` combines all ranks' gradients.

    ``gradient()`` is then collective and blocking.  A gradient that some ranks do not have counts
    as zeros there; what no rank has is None.

    Args:
        gradtape: which has recorded, or is to record; it stays as it is.
        compression: one of `Compression`'s, or a class with ``compress`` and ``decompress``.
        sparse_as_dense: whether tf.IndexedSlices travel as dense tensors; else all ranks' are
            gathered.
        op: `Average`, `Sum` or `Adasum`.
        gradient_predivide_factor: by which an average's division is done before the sum; the rest
            of it, after.
        num_groups: deprecated, as `groups`.
        groups: gradients to reduce together: so many groups, or lists of variables; None: by size.
        process_set: whose ranks take part; the others' gradients stay their own.
        scale_local_gradients: whether those of local sources, which are not combined, are divided
            by the number of ranks.
        device_dense, device_sparse: without effect.

    Raises:
        ArgumentError: arguments that do not fit together.
    """
    del device_dense, device_sparse
    if num_groups:
        warnings.warn("num_groups= is deprecated; use groups=", DeprecationWarning, stacklevel=2)
    settings = Settings.of(
        compression=compression,
        op=op,
        predivide=gradient_predivide_factor,
        sparse_as_dense=sparse_as_dense,
        groups=groups if groups is not None else num_groups or None,
        process_set=process_set,
    )
    tape: Any = copy.copy(gradtape)
    kind = type(gradtape)
    tape.__class__ = type(kind.__name__, (_DistributedTape, kind), {"__module__": __name__})
    tape._distribute(settings, scale_local_gradients=scale_local_gradients)
    return tape


def PartialDistributedGradientTape(  # noqa: N802  (Horovod's name)
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: Any = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    process_set: ProcessSet = global_process_set,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
) -> Any:
    """Return a tape like `DistributedGradientTape`'s that leaves some layers' gradients alone.

    Args:
        local_layers: a layer of Keras or several, whose gradients stay this rank's own.

    Raises:
        ArgumentError: `local_layers` are none; and as `DistributedGradientTape`.
    """
    tape = DistributedGradientTape(
        gradtape,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
    )
    for variable in variables_of_layers(local_layers):
        tape.register_local_source(variable)
    return tape


class _DistributedTape(tf.GradientTape):  # type: ignore[misc]
    """What a distributed tape does beside recording."""

    def _distribute(self, settings: Settings, *, scale_local_gradients: bool) -> None:
        self._settings = settings
        self._local = LocalSources(settings.process_set, scaled=scale_local_gradients)

    def register_local_source(self, source: Any) -> None:
        """Leave the gradient of a variable out of what is combined."""
        self._local.add(source)

    @unconverted
    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        unconnected_gradients: Any = tf.UnconnectedGradients.NONE,
        use_generic_names: bool = False,
    ) -> Any:
        """Return all ranks' gradients combined, in the structure of `sources`.  Collective.

        Args:
            use_generic_names: without effect, for ranks' names need not be the same.

        Raises:
            MismatchError: on every rank, if their sources differ.
        """
        del use_generic_names
        gradients = super().gradient(target, sources, output_gradients, unconnected_gradients)
        flat = self._local.reduce(
            reduction_for(self._settings), _flat(gradients), tf.nest.flatten(sources)
        )
        return tf.nest.pack_sequence_as(sources, flat, expand_composites=False)

    def get_local_and_global_gradients(
        self,
        target: Any,
        sources: Sequence[Any],
        output_gradients: Any = None,
        use_generic_names: bool = False,
    ) -> tuple[list[Any], list[Any]]:
        """Return ``(source, gradient)`` pairs: of the local sources, and of all others."""
        gradients = self.gradient(
            target, sources, output_gradients, use_generic_names=use_generic_names
        )
        pairs = list(zip(sources, gradients, strict=True))
        own = [pair for pair in pairs if pair[0] in self._local]
        return own, [pair for pair in pairs if pair[0] not in self._local]


def _flat(structure: Any) -> list[Any]:
    """Return the gradients in a structure, of which None and tf.IndexedSlices are leaves."""
    flat: list[Any] = tf.nest.flatten(structure, expand_composites=False)
    return flat
