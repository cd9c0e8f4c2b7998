"""Keras's backend as it is set: which module brings gradients to the other ranks."""

from __future__ import annotations

from typing import Any

import keras

from hvdkit.engine.compression import choices
from hvdkit.errors import UnsupportedError


def chosen() -> Any:
    """Return `tensorflow_backend` or `torch_backend`; only that one's framework is imported.

    Raises:
        UnsupportedError: Keras computes with something else.
    """
    name = keras.backend.backend()
    if name == "tensorflow":
        from hvdkit.keras import tensorflow_backend

        return tensorflow_backend
    if name == "torch":
        from hvdkit.keras import torch_backend

        return torch_backend
    raise UnsupportedError(
        f"Keras uses its {name!r} backend, with which hvdkit does not work: set "
        "KERAS_BACKEND=tensorflow or KERAS_BACKEND=torch before keras is imported"
    )


def compression() -> type[choices.Compression]:
    """Return the compressors of the backend's tensors; without casts if it is not supported."""
    try:
        found: type[choices.Compression] = chosen().Compression
    except UnsupportedError:
        return choices.Compression
    return found
