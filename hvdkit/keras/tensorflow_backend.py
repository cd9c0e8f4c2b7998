"""Keras's TensorFlow backend: gradients travel as those of a `DistributedGradientTape` do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdkit.tensorflow.compression import Compression
from hvdkit.tensorflow.gradients import Reduction, Settings
from hvdkit.tensorflow.graph import unconverted

if TYPE_CHECKING:
    from hvdkit.keras.distribution import Wishes

__all__ = ["Compression", "reduction", "unconverted"]


def reduction(wishes: Wishes) -> Reduction:
    """Return what combines gradients: ``reduction(gradients, variables)``.

    Raises:
        ArgumentError: wishes that do not fit together.
    """
    settings = Settings.of(
        compression=wishes.compression,
        op=wishes.op,
        predivide=wishes.predivide,
        sparse_as_dense=wishes.sparse_as_dense,
        groups=wishes.groups,
        process_set=wishes.process_set,
    )
    return Reduction(settings)
