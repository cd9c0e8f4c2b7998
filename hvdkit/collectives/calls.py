"""What a rank asks for, in a form that ranks can compare, and the error when they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from hvdkit.errors import MismatchError, UnsupportedError, describe_by_rank, format_ranks

#: The kind of call in which a rank stands that has no more data; see `hvdkit.collectives.joining`.
JOIN = "join"

#: In which a rank that has joined can take part.  The others move data that only the rank has.
JOINABLE = ("allreduce", "barrier")


@dataclass(frozen=True)
class Call:
    """One collective call as every rank must have made it.

    Args:
        kind: the collective, such as ``"allreduce"``.
        name: the name that the user gave the tensor, if any.
        parts: ``((label, value), ...)`` of all else that ranks must agree on.
        arguments: with which a rank that has joined takes part; follows from the rest.
    """

    kind: str
    name: str | None
    parts: tuple[tuple[str, str], ...] = ()
    arguments: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    signature: int = field(init=False)
    """A 64-bit digest: equal on ranks that ask for the same."""

    def __post_init__(self) -> None:
        text = repr((self.kind, self.name, self.parts)).encode()
        digest = int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
        object.__setattr__(self, "signature", digest)

    @classmethod
    def refused(cls, kind: str, name: str | None, error: Exception) -> Call:
        """Return a call that this rank cannot make, so that its peers learn why."""
        return cls(kind, name, (("error", f"{type(error).__name__}: {error}"),))

    @property
    def dtype(self) -> str:
        """The dtype's name; empty where the call has none."""
        return next((value for label, value in self.parts if label == "dtype"), "")

    @property
    def title(self) -> str:
        return self.kind if self.name is None else f"{self.kind} {self.name!r}"


def joined_error(call: Call, joined: Sequence[int]) -> UnsupportedError:
    """Return the error of a call in which ranks that have joined cannot take part."""
    return UnsupportedError(
        f"{call.title}: {format_ranks(joined)} called join(), having no more data; until every "
        f"rank has joined, the others can only call {' and '.join(JOINABLE)}"
    )


def mismatch(calls: Sequence[Call], ranks: Sequence[int] | None = None) -> MismatchError:
    """Return the error for calls that are not all the same: one a rank, of `ranks` or of all."""
    first = calls[0]
    labels = range(len(calls)) if ranks is None else ranks
    if len({call.kind for call in calls}) > 1:
        head = "ranks called different collectives"
        shown = [f"{call.title}  {_summary(call, ())}".rstrip() for call in calls]
        remedy = "Every rank must make the same collective calls in the same order."
    elif any(dict(call.parts).get("error") for call in calls):
        head = f"{first.title}: not every rank could make the call"
        shown = [dict(call.parts).get("error") or "ready" for call in calls]
        remedy = "Mend the call on the ranks that show an error."
    else:
        differing = [
            label
            for label in dict.fromkeys(label for call in calls for label, _ in call.parts)
            if len({dict(call.parts).get(label) for call in calls}) > 1
        ]
        if len({call.name for call in calls}) > 1:
            head = f"{first.kind}: ranks gave different names"
            shown = [f"name={call.name!r}  {_summary(call, differing)}".rstrip() for call in calls]
        else:
            head = f"{first.title}: ranks disagree on the {' and '.join(differing)}"
            shown = [_summary(call, differing) for call in calls]
        remedy = "Give every rank the same call: the same model, the same arguments, in one order."
    return MismatchError(
        f"{head}\n{describe_by_rank(dict(zip(labels, shown, strict=True)))}\n{remedy}"
    )


def _summary(call: Call, differing: Sequence[str]) -> str:
    """Return dtype and shape, and whatever else differs, in one line."""
    parts = dict(call.parts)
    words = [parts[label] for label in ("dtype", "shape") if label in parts]
    others = [label for label in differing if label in parts and label not in ("dtype", "shape")]
    words += [f"{label}={parts[label]}" for label in others]
    return " ".join(words)
