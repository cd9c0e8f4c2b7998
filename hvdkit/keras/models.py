"""`load_model`: a saved model whose optimizer is distributed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from hvdkit.errors import ArgumentError
from hvdkit.keras.optimizer import Compression, DistributedOptimizer


def load_model(
    filepath: Any,
    custom_optimizers: Sequence[type] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    compression: Any = Compression.none,
    legacy_opts: bool = False,
    **options: Any,
) -> Any:
    """Return a saved model, its optimizer with its state, distributed.  Local.

    Args:
        filepath: of the model.
        custom_optimizers: classes of optimizers that are not Keras's.
        custom_objects: other classes and functions that the model needs, by name.
        compression: as `DistributedOptimizer`.
        legacy_opts: of Horovod; Keras 3 has no such optimizers.
        options: further arguments of `DistributedOptimizer`.

    Raises:
        ArgumentError: `legacy_opts`.
    """
    if legacy_opts:
        raise ArgumentError("Keras 3 has no legacy optimizers: leave out legacy_opts")
    known = {kind.__name__: kind for kind in custom_optimizers or ()} | dict(custom_objects or {})
    model = keras.models.load_model(filepath, custom_objects=known)
    if getattr(model, "optimizer", None) is not None:
        DistributedOptimizer(model.optimizer, compression=compression, **options)
    return model
