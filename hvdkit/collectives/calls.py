"""What a rank asks for, in a form that ranks can compare, and the error when they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from hvdkit.errors import MismatchError, describe_by_rank


@dataclass(frozen=True)
class Call:
    """One collective call as every rank must have made it.

    Args:
        kind: the collective, such as ``"allreduce"``.
        name: the name that the user gave the tensor, if any.
        parts: ``((label, value), ...)`` of all else that ranks must agree on.
    """

    kind: str
    name: str | None
    parts: tuple[tuple[str, str], ...] = ()
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
    def title(self) -> str:
        return self.kind if self.name is None else f"{self.kind} {self.name!r}"


def mismatch(calls: Sequence[Call]) -> MismatchError:
    """Return the error for calls, one a rank, that are not all the same."""
    first = calls[0]
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
            for label, _ in first.parts
            if len({dict(call.parts)[label] for call in calls}) > 1
        ]
        if len({call.name for call in calls}) > 1:
            head = f"{first.kind}: ranks gave different names"
            shown = [f"name={call.name!r}  {_summary(call, differing)}".rstrip() for call in calls]
        else:
            head = f"{first.title}: ranks disagree on the {' and '.join(differing)}"
            shown = [_summary(call, differing) for call in calls]
        remedy = "Give every rank the same call: the same model, the same arguments, in one order."
    return MismatchError(f"{head}\n{describe_by_rank(dict(enumerate(shown)))}\n{remedy}")


def _summary(call: Call, differing: Sequence[str]) -> str:
    """Return dtype and shape, and whatever else differs, in one line."""
    parts = dict(call.parts)
    words = [parts[label] for label in ("dtype", "shape") if label in parts]
    words += [f"{label}={parts[label]}" for label in differing if label not in ("dtype", "shape")]
    return " ".join(words)
