"""hvdkit for Keras by its other name, in place of ``horovod.tensorflow.keras``: `hvdkit.keras`."""

from typing import TYPE_CHECKING, NoReturn

from hvdkit.keras import *  # noqa: F403
from hvdkit.keras import __all__ as __all__
from hvdkit.missing import refuse_name

if not TYPE_CHECKING:  # to a type checker any name would be known

    def __getattr__(name: str) -> NoReturn:
        """Say what to do without it, if it is something of Horovod's."""
        refuse_name(__name__, name)
