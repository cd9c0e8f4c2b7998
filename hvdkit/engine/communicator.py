"""A set of ranks, as one of them sees it: its collectives, synchronous and by name."""

from __future__ import annotations

import math
import pickle
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy import ndarray
from numpy.typing import DTypeLike, NDArray

from hvdkit import collectives
from hvdkit.arrays import Results, as_array, contiguous, writable
from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.collectives.repeat import Remember, Repeat
from hvdkit.dtypes import Average, as_op
from hvdkit.engine.channel import Channel
from hvdkit.engine.handles import Handle
from hvdkit.engine.lane import Lane
from hvdkit.engine.progress import Progress
from hvdkit.engine.requests import (
    Operation,
    Request,
    Work,
    allreduce_request,
    other_request,
)
from hvdkit.errors import ArgumentError, HvdkitError, UnsupportedError, format_ranks
from hvdkit.native import short_way

T = TypeVar("T")

#: Collectives that have a short way.
_REPEATED = ("allreduce", "allgather", "reducescatter", "broadcast", "alltoall")


class Communicator:
    """The collectives of one set of ranks.  Threads may share it.

    Synchronous calls are matched in the order in which they are made, asynchronous ones by name.
    The two never wait for each other: each kind has a group of its own.

    Args:
        number: of the process set; 0 is all ranks.
        ranks: of all ranks, those of the set, ascending.
        channel: of the synchronous calls.
        progress: runs the asynchronous ones.
    """

    def __init__(
        self, number: int, ranks: tuple[int, ...], channel: Channel, progress: Progress
    ) -> None:
        self.number = number
        self.ranks = ranks
        self.channel = channel
        self.group: Group = channel.group
        self.lane: Lane = channel.lane
        self.rank = self.group.rank
        self.size = self.group.size
        self._progress = progress
        self._short_ways = {kind: short_way(self.lane, self.group) for kind in _REPEATED}
        self._short_allreduce = self._short_ways["allreduce"]
        self._repeats = count()
        self._nameless: defaultdict[str, count[int]] = defaultdict(partial(count, 1))

    # Synchronous: matched by order

    def allreduce(
        self,
        x: Any,
        op: object = Average,
        name: str | None = None,
        prescale_factor: float = 1.0,
        postscale_factor: float = 1.0,
        algorithm: str = "auto",
        in_place: bool = False,
    ) -> NDArray[Any]:
        try:  # spelt out: a call with * takes 0.1 us more
            done = self._short_allreduce(
                x, op, name, prescale_factor, postscale_factor, algorithm, in_place
            )
        except RuntimeError as exc:
            self._raise_as_known(exc)
        if done is not NotImplemented:
            return done
        source = contiguous(x)
        target = writable(x) if in_place else np.empty(source.shape, source.dtype)
        direct = target if target.flags.c_contiguous else np.empty(source.shape, source.dtype)
        plan = self.lane.call(
            collectives.allreduce,
            self.group,
            source,
            direct,
            op=op,
            name=name,
            prescale=prescale_factor,
            postscale=postscale_factor,
            algorithm=algorithm,
        )
        if plan is not None and plan.bound is not None and self._can_repeat(x):
            arguments = (op, name, prescale_factor, postscale_factor, algorithm, in_place)
            again = self.group.settling(plan.call)
            result = None if in_place else (x.shape, x.dtype)
            self._short_allreduce.remember(x, arguments, plan.bound, plan, again, result)
        if direct is not target:
            target[...] = direct
        return target

    def allgather(self, x: Any, name: str | None = None, algorithm: str = "auto") -> NDArray[Any]:
        arguments = (name, algorithm)
        done = self._short("allgather", x, arguments)
        if done is not NotImplemented:
            return done
        return self.lane.call(
            collectives.allgather,
            self.group,
            contiguous(x),
            name=name,
            algorithm=algorithm,
            remember=self._remember("allgather", x, arguments),
        )

    def reducescatter(
        self,
        x: Any,
        op: object = Average,
        name: str | None = None,
        prescale_factor: float = 1.0,
        postscale_factor: float = 1.0,
        algorithm: str = "auto",
    ) -> NDArray[Any]:
        arguments = (op, name, prescale_factor, postscale_factor, algorithm)
        done = self._short("reducescatter", x, arguments)
        if done is not NotImplemented:
            return done
        return self.lane.call(
            collectives.reducescatter,
            self.group,
            contiguous(x),
            op=op,
            name=name,
            prescale=prescale_factor,
            postscale=postscale_factor,
            algorithm=algorithm,
            remember=self._remember("reducescatter", x, arguments),
        )

    def broadcast(
        self,
        x: Any,
        root_rank: int,
        name: str | None = None,
        algorithm: str = "auto",
        in_place: bool = False,
    ) -> NDArray[Any]:
        arguments = (root_rank, name, algorithm, in_place)
        done = self._short("broadcast", x, arguments)
        if done is not NotImplemented:
            return done
        target = writable(x) if in_place else np.array(as_array(x), order="C")
        direct = np.ascontiguousarray(target) if not target.flags.c_contiguous else target
        self.lane.call(
            collectives.broadcast,
            self.group,
            direct,
            root=self.place_of(root_rank),
            name=name,
            algorithm=algorithm,
            remember=self._remember("broadcast", x, arguments, in_place=in_place),
        )
        if direct is not target:
            target[...] = direct
        return target

    def alltoall(
        self,
        x: Any,
        splits: Sequence[int] | None = None,
        name: str | None = None,
        algorithm: str = "auto",
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the rows received, and how many came from each rank."""
        return self.lane.call(
            collectives.alltoall,
            self.group,
            contiguous(x),
            splits,
            name=name,
            algorithm=algorithm,
        )

    def alltoall_evenly(
        self, x: Any, name: str | None = None, algorithm: str = "auto"
    ) -> NDArray[Any]:
        """Return the rows received, where every rank sends each one equally many."""
        arguments = (name, algorithm)
        done = self._short("alltoall", x, arguments)
        if done is not NotImplemented:
            return done
        received, _ = self.lane.call(
            collectives.alltoall,
            self.group,
            contiguous(x),
            None,
            name=name,
            algorithm=algorithm,
            remember=self._remember("alltoall", x, arguments),
        )
        return received

    # The short way: a call like an earlier one, for Python costs more than a few bytes do

    def _short(self, kind: str, x: Any, arguments: tuple[Any, ...]) -> NDArray[Any]:
        """Return the result of a call that is known; NotImplemented of any other."""
        try:
            return self._short_ways[kind](x, *arguments)
        except RuntimeError as exc:
            self._raise_as_known(exc)

    def _raise_as_known(self, exc: RuntimeError) -> NoReturn:
        """Raise the arena's error as the one that users know; any other as it is."""
        if isinstance(exc, HvdkitError):
            raise exc
        error = self.group.peer_error(exc)
        raise error from (None if error is self.group.failure else exc)

    def _can_repeat(self, x: Any) -> bool:
        return type(x) is ndarray and self.group.tracer is None  # the short way tells no tracer

    def _remember(
        self, kind: str, x: Any, arguments: tuple[Any, ...], *, in_place: bool = False
    ) -> Remember | None:
        """Return what keeps a call for the next one like it; None if it is not to be kept."""
        if not self._can_repeat(x):
            return None

        def remember(repeat: Repeat) -> None:
            shape = x.shape if repeat.shape is None else repeat.shape
            if math.prod(shape) * x.itemsize >= Results.LARGE:
                return
            result = None if in_place else (shape, x.dtype)
            self.group.keep(("repeat", next(self._repeats)), repeat)  # which counts
            self._short_ways[kind].remember(
                x, arguments, repeat.bound, repeat, repeat.again, result
            )

        return remember

    def forget_short_ways(self) -> None:
        """Let every call be seen by the recorder."""
        for way in self._short_ways.values():
            way.clear()

    def barrier(self, *, name: str | None = None, algorithm: str = "auto") -> None:
        self.lane.call(collectives.barrier, self.group, name=name, algorithm=algorithm)

    def broadcast_object(self, value: Any, root_rank: int, *, name: str | None = None) -> Any:
        """Return the root's picklable `value` on every rank."""
        here = self.ranks[self.rank]
        mine = pickle.dumps(value) if here == root_rank else b""
        nbytes = self.broadcast(np.array([len(mine)], np.int64), root_rank, name=name)
        data = np.frombuffer(mine.ljust(int(nbytes[0]), b"\0"), np.uint8)
        return pickle.loads(self.broadcast(data, root_rank, name=name).tobytes())

    def allgather_object(self, value: Any, *, name: str | None = None) -> list[Any]:
        """Return every rank's picklable `value`, in rank order."""
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = self.allgather(np.array([mine.size], np.int64), name=name)
        pieces = np.split(self.allgather(mine, name=name), np.cumsum(lengths)[:-1])
        return [pickle.loads(piece.tobytes()) for piece in pieces]

    def empty(self, shape: Sequence[int] | int, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Return zeroed memory, in the arena where there is one.  Collective."""
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        return self.call(_empty, sizes, np.dtype(dtype))

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run ``function(group, ...)`` as the next synchronous call."""
        return self.lane.call(function, self.group, *args, **kwargs)

    def place_of(self, root_rank: Any) -> Any:
        """Return the rank within the set of `root_rank`, which counts among all ranks.

        What is no rank at all is returned as it is: the collective refuses it on every rank.
        """
        if self.number == 0:
            return root_rank
        try:
            return self.ranks.index(root_rank)
        except ValueError:
            error = ArgumentError(
                f"root_rank {root_rank!r} is not in the process set of {format_ranks(self.ranks)}"
            )
            return self.lane.call(self.group.refuse, "broadcast", None, error)

    # Asynchronous: matched by name

    def allreduce_async(
        self,
        pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]],
        *,
        name: str | None = None,
        op: object = Average,
        prescale_factor: float = 1.0,
        postscale_factor: float = 1.0,
        result: Any = None,
        **staging: Any,
    ) -> Handle[Any]:
        """Start to reduce each pair's source into its target, all of them as one operation.

        The arrays must be C-contiguous, and stay as they are until the handle is complete;
        `staging` is ``fetch`` and ``store``, as an `Operation` has them.

        Returns:
            Completes with `result`.
        """
        name = self._name("allreduce", name)

        def request() -> Request:
            arrays = tuple([(source.dtype, source.shape) for source, _ in pairs])
            factors = float(prescale_factor), float(postscale_factor)
            return allreduce_request(name, arrays, as_op(op), *factors)

        return self._submit(
            "allreduce", name, request, pairs=tuple(pairs), result=result, **staging
        )

    def start(
        self,
        kind: str,
        arrays: Sequence[NDArray[Any]],
        work: Work,
        *,
        name: str | None = None,
        parts: Sequence[tuple[str, str]] = (),
        ragged: bool = False,
        **staging: Any,
    ) -> Handle[Any]:
        """Start any other operation by name.

        Args:
            kind: the collective.
            arrays: what it is about; equal on all ranks, but for the first dimension if `ragged`.
            work: does it, when all ranks are there: ``work(group)``; its result is the handle's.
            name: None: matched by how many without a name were started before.
            parts: whatever else ranks must agree on.
            ragged: whether first dimensions may differ.
            staging: ``fetch`` and ``store``, as an `Operation` has them.
        """
        name = self._name(kind, name)

        def request() -> Request:
            shapes = tuple([(array.dtype, array.shape[ragged:]) for array in arrays])
            return other_request(kind, name, shapes, tuple(parts), ragged=ragged)

        return self._submit(kind, name, request, work=work, **staging)

    def _submit(
        self, kind: str, name: str, request: Callable[[], Request], **how: Any
    ) -> Handle[Any]:
        key = (self.number, name)
        try:
            operation = Operation(key, request(), **how)
        except (HvdkitError, TypeError, ValueError) as exc:
            error = exc if isinstance(exc, HvdkitError) else UnsupportedError(str(exc))
            self._progress.refuse(Operation(key, Request(Call.refused(kind, name, error))))
            raise error from exc
        return self._progress.submit(operation)

    def _name(self, kind: str, name: str | None) -> str:
        if name is not None:
            return str(name)
        return f"{kind}.noname.{next(self._nameless[kind])}"


def _empty(group: Group, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    group.agree(Call("empty", None, (("dtype", dtype.name), ("shape", str(shape)))))
    return group.empty(int(np.prod(shape, dtype=np.int64)), dtype).reshape(shape)
