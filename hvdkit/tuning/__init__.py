"""Figures measured on a machine: fitted, kept in a file, and used to choose."""

from hvdkit.tuning.file import load
from hvdkit.tuning.record import Tuning

__all__ = ["Tuning", "load"]
