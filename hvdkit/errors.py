"""The one family of errors.  Each says what was asked, what each rank had, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class HvdkitError(Exception):
    """Base of every error that hvdkit raises on purpose."""


class HorovodInternalError(HvdkitError, RuntimeError):
    """A collective that had begun cannot end; scripts for Horovod catch it by this name."""


class NotInitializedError(HvdkitError, RuntimeError, ValueError):
    """A function was called before ``hvd.init()`` or after ``hvd.shutdown()``."""


class LauncherError(HvdkitError, RuntimeError):
    """MPI is missing, or the launcher and MPI disagree on how many processes there are."""


class ConfigError(HvdkitError, ValueError):
    """An environment variable holds a value that does not parse."""


class ArgumentError(HvdkitError, ValueError):
    """An argument is out of range or unknown; seen on this rank alone, before anything was sent."""


class UnsupportedError(HvdkitError, TypeError, ValueError):
    """The dtype, operation or kind of array is not one that hvdkit handles."""


class MismatchError(HvdkitError, ValueError):
    """Ranks asked for different things in the same collective call; raised on every rank."""


class InFlightError(HvdkitError, AssertionError):
    """Gradients were touched while they were on their way to the other ranks."""


class PeerError(HorovodInternalError):
    """Another rank died or gave up in the middle of a collective."""


class StallError(HorovodInternalError):
    """Ranks wait for one that does not come: longer than allowed, or for each other for ever."""


class MissingError(HvdkitError, AttributeError):
    """A script asks for something of Horovod's that hvdkit does not have."""


class CheckpointError(HvdkitError, RuntimeError):
    """A checkpoint cannot be written, or is missing, damaged, newer, or not what was asked for."""


class ScheduleError(HvdkitError, ValueError):
    """A schedule is wrong: the verifier found a deadlock, a lost contribution or an unread send."""


def format_ranks(ranks: Sequence[int]) -> str:
    """Return ranks in short form: ``[0, 2, 3, 4]`` becomes ``"ranks 0, 2-4"``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] + 1 == rank:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'' if len(ranks) == 1 else 's'} {text}"


def describe_by_rank(values: Mapping[int, str]) -> str:
    """Return one line for each distinct value with the ranks that hold it, first rank first."""
    groups: dict[str, list[int]] = {}
    for rank, value in sorted(values.items()):
        groups.setdefault(value, []).append(rank)
    labels = {value: format_ranks(ranks) + ":" for value, ranks in groups.items()}
    width = max(map(len, labels.values()), default=0)
    return "\n".join(f"  {labels[value]:<{width}}  {value}" for value in groups)
