"""Check once that every rank has the same gradients, so that no later step need ask."""

from __future__ import annotations

from collections.abc import Sequence

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.dtypes import Average, check_supported
from hvdkit.engine.bucketing import Gradient
from hvdkit.errors import MismatchError, describe_by_rank


def agree_on_gradients(group: Group, gradients: tuple[Gradient, ...]) -> tuple[Gradient, ...]:
    """Return `gradients` if every rank has the same.  Collective.

    Raises:
        MismatchError: on every rank, naming the first gradient that differs.
        UnsupportedError: a gradient's dtype has no average.
    """
    group.agree(Call("gradient_reducer", None))
    everyone = group.transport.allgather_object(gradients)
    if len({len(theirs) for theirs in everyone}) > 1:
        raise _mismatch([("model", f"{len(theirs)} gradients") for theirs in everyone])
    for same_place in zip(*everyone, strict=True):
        if len(set(same_place)) > 1:
            raise _mismatch([(gradient.name, str(gradient)) for gradient in same_place])
    for gradient in gradients:
        check_supported(gradient.dtype, Average)
    return gradients


def _mismatch(seen: Sequence[tuple[str, str]]) -> MismatchError:
    names = sorted({name for name, _ in seen})
    shown = {rank: f"{name} {text}" for rank, (name, text) in enumerate(seen)}
    return MismatchError(
        f"the ranks' models differ at gradient {' / '.join(names)}\n{describe_by_rank(shown)}\n"
        "Build the same model with the same parameters, in the same order, on every rank."
    )
