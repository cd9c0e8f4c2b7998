"""hvdkit for Keras by its other name, in place of ``horovod.tensorflow.keras``: `hvdkit.keras`."""

from hvdkit.keras import *  # noqa: F403
from hvdkit.keras import __all__ as __all__
