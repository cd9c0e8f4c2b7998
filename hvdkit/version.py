"""The version of hvdkit."""

__version__ = "0.1.0"
