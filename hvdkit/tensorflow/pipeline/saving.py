"""What a sharded model and its optimizer hold, as variables with global names.

layers.3.kernel                     a weight
optimizer.layers.3.kernel.momentum  what the optimizer keeps for it
optimizer.0.iteration               what it keeps once
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from hvdkit.errors import UnsupportedError
from hvdkit.tensorflow.convert import array_of, variable_of


def held_by(
    optimizer: Any | None, named: Mapping[str, Any], variables: Sequence[Any]
) -> tuple[dict[str, Any], frozenset[str]]:
    """Return what is written and read on this rank, by global name; which all have alike.

    Args:
        optimizer: built here, if it is not yet; None: without.
        named: the variables of this rank's layers.
        variables: those that are trained.

    Raises:
        UnsupportedError: the optimizer has state that cannot be assigned to the variables.
    """
    held = {
        name: variable
        for name, variable in named.items()
        if variable.dtype != "string" and "seed_generator" not in name
    }
    if optimizer is None or not variables:
        return held, frozenset()
    if not optimizer.built:
        optimizer.build(variables)
    names = {id(variable): name for name, variable in reversed(held.items())}
    once = _once_of(optimizer)
    return held | _slots_of(optimizer, names, variables) | once, frozenset(once)


def arrays_of(variables: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Return the variables' values, in their own memory."""
    return {
        name: array_of(variable_of(variable).read_value()) for name, variable in variables.items()
    }


def assign(variables: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Give the variables the values that were read."""
    for name, variable in variables.items():
        variable.assign(arrays[name])


def _slots_of(optimizer: Any, names: Mapping[int, str], variables: Sequence[Any]) -> dict[str, Any]:
    """Return what an optimizer keeps for each variable, by global name.

    Keras names a slot by its variable and makes slots in the variables' order; so several
    variables of one name can be told apart.

    Args:
        optimizer: built for `variables`.
        names: of the variables, by identity.
        variables: in the order in which the optimizer was given them.

    Raises:
        UnsupportedError: the optimizer has state that cannot be assigned so.
    """
    found: dict[str, Any] = {}
    for slot in optimizer.variables:
        if slot.name in _once(optimizer):
            continue
        for variable in variables:
            prefix = f"{variable.path.replace('/', '_')}_"
            name = f"optimizer.{names[id(variable)]}.{slot.name.removeprefix(prefix)}"
            if slot.name.startswith(prefix) and name not in found:
                found[name] = slot
                break
        else:
            raise UnsupportedError(
                f"{type(optimizer).__name__} keeps a variable {slot.path!r} that belongs to none "
                "of the model's: save the model without its optimizer"
            )
    return found


def _once_of(optimizer: Any) -> dict[str, Any]:
    """Return what an optimizer keeps once, by global name."""
    known = _once(optimizer)
    once = [variable for variable in optimizer.variables if variable.name in known]
    return {f"optimizer.{i}.{variable.name}": variable for i, variable in enumerate(once)}


def _once(optimizer: Any) -> set[str]:
    """Return the names of variables that stand for themselves."""
    names = {"iteration", "learning_rate", "step_counter", "dynamic_scale"}
    return {v.name for v in optimizer.variables if v.name in names and tuple(v.shape) == ()}
