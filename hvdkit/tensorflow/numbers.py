"""Sizes and ranks as tensors, which are found out when a graph is run, not when it is made.

They are int32 scalars.  None is collective: any rank may ask alone.
"""

from __future__ import annotations

import tensorflow as tf

from hvdkit.api import context, is_initialized, local_rank, local_size, rank
from hvdkit.errors import ArgumentError
from hvdkit.tensorflow.collectives import number
from hvdkit.tensorflow.graph import unconverted

#: What `process_set_included_op` returns where it cannot tell; Horovod's codes.
NOT_INITIALIZED = -1
UNKNOWN_SET = -3


@unconverted
def size_op(process_set_id: int = 0, name: str | None = None) -> tf.Tensor:
    """Return the number of ranks in the process set of this number; 0 is all ranks.  Local.

    Args:
        process_set_id: `ProcessSet.process_set_id`.
        name: without effect.

    Raises:
        ArgumentError: no such set is known.
        NotInitializedError: ``init()`` was not called.
    """
    del name

    def size() -> int:
        known = context().process_sets.members
        if process_set_id not in known:
            raise ArgumentError(
                f"there is no process set {process_set_id!r}; known are "
                f"{', '.join(map(str, sorted(known)))}: call hvd.add_process_set() first"
            )
        return len(known[process_set_id])

    return number(size)


@unconverted
def rank_op(name: str | None = None) -> tf.Tensor:
    """Return this process's number among all ranks.  Local."""
    del name
    return number(rank)


@unconverted
def local_rank_op(name: str | None = None) -> tf.Tensor:
    """Return this process's number among those of its node.  Local."""
    del name
    return number(local_rank)


@unconverted
def local_size_op(name: str | None = None) -> tf.Tensor:
    """Return the number of processes on this node.  Local."""
    del name
    return number(local_size)


@unconverted
def process_set_included_op(process_set_id: int = 0, name: str | None = None) -> tf.Tensor:
    """Return whether this process is in the process set of this number: 0 or 1.  Local.

    Returns:
        -1 where hvdkit is not initialised, -3 where no such set is known, as Horovod has it.
    """
    del name

    def included() -> int:
        if not is_initialized():
            return NOT_INITIALIZED
        here = context()
        ranks = here.process_sets.members.get(process_set_id)
        return UNKNOWN_SET if ranks is None else int(here.topology.rank in ranks)

    return number(included)
