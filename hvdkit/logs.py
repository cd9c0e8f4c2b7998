"""The logger ``"hvdkit"``: that it is heard, from which rank, and what it says of a job's start.

Python shows warnings only where nobody has set logging up.  A log level below that is a wish to
read more: then lines go to stderr, each with its rank.  Where a script has handlers of its own,
before or after ``init()``, these get them instead.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator

from hvdkit.context import Context
from hvdkit.tuning.file import default_path

log = logging.getLogger("hvdkit")

_handler = logging.StreamHandler()
_handler.addFilter(lambda _: not logging.getLogger().handlers)


def begin_logging(context: Context) -> None:
    """Let the logger be heard, and tell of the job: what ranks share by rank 0, at INFO."""
    here = context.topology
    if context.config.log_level < logging.WARNING and not log.hasHandlers():
        _handler.setStream(sys.stderr)
        _handler.setFormatter(
            logging.Formatter(f"%(levelname)s:hvdkit: rank {here.rank}: %(message)s")
        )
        log.addHandler(_handler)
    if here.rank == 0 and log.isEnabledFor(logging.INFO):
        for line in _describe(context):
            log.info(line)
    log.debug(
        "process %d on %s, local rank %d of %d, cross rank %d of %d",
        os.getpid(),
        os.uname().nodename,
        here.local_rank,
        here.local_size,
        here.cross_rank,
        here.cross_size,
    )


def end_logging() -> None:
    """Take back what `begin_logging` did, but for the level."""
    log.removeHandler(_handler)


def _describe(context: Context) -> Iterator[str]:
    """Yield what is the same on all ranks, and what rank 0 knows of the rest."""
    size, nodes = context.topology.size, [len(node) for node in context.nodes]
    on = (
        "on one node"
        if len(nodes) == 1
        else f"on {len(nodes)} nodes ({', '.join(map(str, nodes))})"
    )
    yield f"{size} rank{'s' * (size > 1)} {on}, {context.joined}"
    if not isinstance(context.arena, str):
        yield f"they share memory in {context.config.shm_dir}"
    elif context.group.hierarchy is not None:
        yield f"the ranks of each node share memory in {context.config.shm_dir}"
    elif size > 1:
        yield f"they share no memory: {context.arena}"
    yield f"kernels: {context.kernels.name}"
    if context.tuning is not None:
        path = context.config.tuning_file or default_path(os.environ)
        yield f"algorithms are picked by {path}, measured {context.tuning.measured}"
    elif size > 1:
        yield "algorithms are picked by the defaults: no tuning file is for this job"
    yield f"segments of {context.group.segment_bytes} bytes, buckets of {context.bucket_bytes}"
