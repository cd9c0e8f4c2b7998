"""Start all ranks alike: variables and objects from one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from hvdkit import array_collectives
from hvdkit.api import communicator
from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.errors import MismatchError, UnsupportedError
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.tensorflow.collectives import numbered, spec_of
from hvdkit.tensorflow.convert import as_tensor, variable_of
from hvdkit.tensorflow.graph import call, unconverted
from hvdkit.tensorflow.movements import root_value


@unconverted
def broadcast_variables(
    variables: Iterable[Any],
    root_rank: int,
    process_set: ProcessSet = global_process_set,
    inplace: bool = False,
) -> None:
    """Overwrite `variables` with the root's.  Collective, blocking.

    Either all of them are overwritten or, after an error, none.

    Args:
        variables: of TensorFlow or Keras, such as ``model.variables``; as many, of the same shapes
            and dtypes in the same order, on every rank.  Their names may differ.
        root_rank: the rank to copy from, counted among all ranks.
        process_set: whose ranks take part.
        inplace: without effect; Horovod's scripts pass it.

    Raises:
        MismatchError: on every rank, if they have other numbers, shapes or dtypes of variables.
        UnsupportedError: what is no variable.
        ArgumentError, PeerError: as `broadcast`.
    """
    del inplace
    _overwrite(list(variables), root_rank, None, process_set)


@unconverted
def broadcast_(
    variables: Sequence[Any],
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[tf.Tensor]:
    """Overwrite `variables` with the root's, and return their values.  Collective, blocking.

    Args:
        variables, root_rank, process_set: as in `broadcast_variables`, as are the errors.
        name: named in errors; ranks must give the same one.
    """
    return _overwrite(variables, root_rank, name, process_set)


def _overwrite(
    variables: Sequence[Any], root_rank: int, name: str | None, process_set: ProcessSet
) -> list[tf.Tensor]:
    targets = [_checked(variable) for variable in variables]
    titles = [str(getattr(variable, "path", variable.name)) for variable in variables]

    def fetch_one(place: int, value: tf.Tensor) -> tf.Tensor:
        try:
            return root_value(value, root_rank, numbered(name, place), process_set)
        except MismatchError as exc:
            raise MismatchError(f"variable {place}, here {titles[place]!r}: {exc}") from exc

    def fetch(*values: tf.Tensor) -> list[tf.Tensor]:
        communicator(process_set).call(_agree_on_number, name, len(values))
        return [fetch_one(place, value) for place, value in enumerate(values)]

    values = [as_tensor(target) for target in targets]
    fetched = call(fetch, values, [spec_of(value) for value in values])
    for target, value in zip(targets, fetched, strict=True):
        target.assign(value, read_value=False)
    return fetched


def _checked(variable: Any) -> tf.Variable:
    """Return the tf.Variable that `variable` is, or has if it is one of Keras.

    Raises:
        UnsupportedError: it is none.
    """
    found = variable_of(variable)
    if not isinstance(found, tf.Variable):
        raise UnsupportedError(
            f"expected variables of TensorFlow or Keras, not {type(variable).__name__}: pass "
            "model.variables"
        )
    return found


def _agree_on_number(group: Group, name: str | None, number: int) -> None:
    group.agree(Call("broadcast_variables", name, (("number of variables", str(number)),)))


def broadcast_global_variables(root_rank: int) -> None:
    """Say what to call instead: TensorFlow 2 has no list of all variables.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        "broadcast_global_variables needs TensorFlow 1's list of all variables: call "
        f"hvd.broadcast_variables(model.variables, root_rank={root_rank})"
    )


def broadcast_object(
    obj: Any,
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return the root's picklable `obj` on every rank.  Collective, blocking.

    It is called at once, also while a graph is made.

    Args:
        obj: of use on the root alone.
        root_rank: the rank whose `obj` it is, counted among all ranks.
        session: without effect, for there are no sessions.
        name: named in errors; ranks must give the same one.
        process_set: whose ranks take part.

    Raises:
        MismatchError, ArgumentError, PeerError: as `broadcast`.
    """
    del session
    return array_collectives.broadcast_object(obj, root_rank, name, process_set)


def broadcast_object_fn(
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Callable[[Any], Any]:
    """Return a function of `obj` that does what `broadcast_object` does.  Local."""

    def broadcast(obj: Any) -> Any:
        return broadcast_object(obj, root_rank, session, name, process_set)

    return broadcast


def allgather_object(
    obj: Any,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[Any]:
    """Return every rank's picklable `obj`, in rank order.  Collective, blocking.

    Arguments and errors are `broadcast_object`'s.
    """
    del session
    return array_collectives.allgather_object(obj, name, process_set)
