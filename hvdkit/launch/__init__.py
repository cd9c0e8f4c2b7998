"""Start ranks from a process that is none of them: ``hvd.run``."""

from hvdkit.launch.job import JobError
from hvdkit.launch.run import run

__all__ = ["JobError", "run"]
