"""Collectives on values: tensors, variables, arrays and numbers, outside of tf.function.

Results are new tensors of Keras's backend.  Inside a tf.function, hvdkit.tensorflow has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from hvdkit import array_collectives
from hvdkit.dtypes import Average, Sum
from hvdkit.errors import MismatchError, UnsupportedError, describe_by_rank
from hvdkit.keras.optimizer import Compression


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool = True,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: Any = None,
    compression: Any = Compression.none,
) -> Any:
    """Return the combination of all ranks' `value`.  Collective, blocking.

    Args:
        value: of equal shape and dtype on all ranks.
        name: named in errors; ranks must give the same one.
        average: whether it is their average or their sum, where `op` does not say.
        prescale_factor: multiplies each contribution first.
        postscale_factor: multiplies the result last.
        op: any of the operations.
        compression: `Compression.none`, ``fp16`` or ``bf16``: as what the value travels.

    Raises:
        MismatchError: on every rank, showing what each had, if ranks disagree.
        ArgumentError, UnsupportedError: what cannot be; the other ranks get a MismatchError.
        PeerError: another rank died.
    """
    if op is None:
        op = Average if average else Sum
    packed, form = compression.compress(keras.ops.convert_to_tensor(value))
    result = array_collectives.allreduce(
        _array(packed),
        op=op,
        name=name,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )
    return compression.decompress(keras.ops.convert_to_tensor(result), form)


def allgather(value: Any, name: str | None = None) -> Any:
    """Return all ranks' rows of `value` together, in rank order.  Collective, blocking."""
    return keras.ops.convert_to_tensor(array_collectives.allgather(_array(value), name=name))


def broadcast(value: Any, root_rank: int, name: str | None = None) -> Any:
    """Return the root's `value`, which is of equal shape on all ranks.  Collective, blocking."""
    return keras.ops.convert_to_tensor(
        array_collectives.broadcast(_array(value), root_rank, name=name)
    )


def reducescatter(value: Any, name: str | None = None, op: Any = Average) -> Any:
    """Return this rank's share of the rows of all ranks' combination.  Collective, blocking."""
    return keras.ops.convert_to_tensor(
        array_collectives.reducescatter(_array(value), op=op, name=name)
    )


def broadcast_variables(variables: Sequence[Any], root_rank: int) -> None:
    """Overwrite variables with the root's.  Collective, blocking.

    Args:
        variables: as ``model.weights`` and ``optimizer.variables``, the same on every rank.
        root_rank: the rank to copy from.

    Raises:
        MismatchError: on every rank, if their number, shapes or dtypes differ.
    """
    mine = [f"{tuple(variable.shape)} {variable.dtype}" for variable in variables]
    everyone = array_collectives.allgather_object(mine, name="broadcast_variables")
    if any(theirs != everyone[0] for theirs in everyone):
        raise MismatchError(_difference(everyone))
    for number, variable in enumerate(variables):
        variable.assign(
            array_collectives.broadcast(_array(variable), root_rank, name=f"variable.{number}")
        )


def broadcast_global_variables(root_rank: int) -> None:
    """Refuse: Keras 3 has no list of all variables that there are.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        "Keras 3 has no list of all variables: give fit() "
        f"hvd.callbacks.BroadcastGlobalVariablesCallback({root_rank}), or call "
        f"hvd.broadcast_variables(model.weights + model.optimizer.variables, {root_rank})"
    )


def _array(value: Any) -> Any:
    return keras.ops.convert_to_numpy(value)


def _difference(everyone: Sequence[Sequence[str]]) -> str:
    """Return what is not the same in all ranks' lists of variables."""
    counts = [len(theirs) for theirs in everyone]
    place = next((i for i in range(min(counts)) if len({t[i] for t in everyone}) > 1), None)
    if place is None:
        where, seen = "number of variables", [str(count) for count in counts]
    else:
        where, seen = f"variable {place}", [theirs[place] for theirs in everyone]
    return (
        f"broadcast_variables: ranks disagree on the {where}\n"
        f"{describe_by_rank(dict(enumerate(seen)))}\n"
        "Build the same model and optimizer on every rank before."
    )
