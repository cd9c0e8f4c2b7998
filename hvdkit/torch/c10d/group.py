"""The process group: torch's collectives, in order on a lane, and its messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import distributed as dist

from hvdkit.api import context, is_initialized
from hvdkit.context import Context
from hvdkit.engine.handles import Handle
from hvdkit.errors import HorovodInternalError
from hvdkit.torch.c10d import movements, reductions
from hvdkit.torch.c10d.messages import Messages
from hvdkit.torch.c10d.tensors import Target, source
from hvdkit.torch.c10d.work import TimeLimit, Work

Tensors = Sequence[torch.Tensor]

_Base: Any = dist.ProcessGroup  # the stubs have overloads that nothing calls


class ProcessGroup(_Base):  # type: ignore[misc]
    """A process group of torch.distributed, some ranks of hvdkit's.  Creating it is collective.

    Args:
        here: hvdkit's state.
        ranks: of all ranks, those in the group, ascending.
        name: of the group; the same on all of them, and no other group's.
        timeout: of an operation.  One that takes longer ends the group.
    """

    def __init__(self, here: Context, ranks: Sequence[int], name: str, timeout: timedelta) -> None:
        super().__init__(ranks.index(here.topology.rank), len(ranks))
        self._here = here
        self._name = name
        self._desc = ""
        self._channel = here.channels.subgroup(ranks, f"process group {name}")
        self._lane = self._channel.lane
        seconds = timeout.total_seconds()
        self._limit = TimeLimit(self._channel, seconds)
        messages: Any = self._channel.group.transport
        self._messages = Messages(messages.duplicate(), seconds, threaded=here.threaded)
        self._lane_thread = 0

    # What torch asks of every group

    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        return "hvdkit"

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def group_desc(self) -> str:
        return self._desc

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._desc

    def setGroupDesc(self, desc: str) -> None:  # noqa: N802
        self._desc = desc

    def set_timeout(self, timeout: timedelta) -> None:
        """Change the time that later operations may take."""
        self._limit.seconds = self._messages.seconds = timeout.total_seconds()

    def shutdown(self) -> None:
        """Finish what was started, and let go of everything.  Collective in the group."""
        if self._limit.closed:
            return
        alive = is_initialized() and context() is self._here
        if alive:
            self._lane.call(int)  # what is queued is done before the lane is closed
        self._limit.close()
        if alive:
            self._messages.close()
            self._here.channels.release(self._channel)

    def abort(self) -> None:
        """End whatever waits in the group, now and later."""
        error = HorovodInternalError(f"{self._channel.key} was aborted")
        self._messages.abort(error)
        self._channel.group.abort(error)

    # Collectives

    def allreduce(self, tensors: Tensors, opts: Any = None) -> Work:
        opts = opts or dist.AllreduceOptions()
        return self._start(opts, tensors, reductions.allreduce, tensors, opts.reduceOp)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Work:
        opts = opts or dist.AllreduceCoalescedOptions()
        return self._start(opts, tensors, reductions.allreduce, tensors, opts.reduceOp)

    def reduce(self, tensors: Tensors, opts: Any) -> Work:
        how = (opts.reduceOp, opts.rootRank)
        return self._start(opts, tensors, reductions.reduce, tensors, *how)

    def broadcast(self, tensors: Tensors, opts: Any) -> Work:
        return self._start(opts, tensors, movements.broadcast, tensors, opts.rootRank)

    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> Work:
        return self.allgather_coalesced(outputs, inputs, opts)

    def allgather_coalesced(
        self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None
    ) -> Work:
        flat = [tensor for several in outputs for tensor in several]
        return self._start(opts, flat, movements.all_gather_lists, outputs, inputs)

    def all_gather_single(
        self, output: torch.Tensor, given: torch.Tensor, opts: Any = None
    ) -> Work:
        return self.all_gather_single_coalesced([output], [given], opts)

    def all_gather_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any = None
    ) -> Work:
        return self._start(opts, outputs, movements.all_gather, outputs, inputs)

    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> Work:
        opts = opts or dist.ReduceScatterOptions()
        lists = (outputs, inputs, opts.reduceOp)
        return self._start(opts, outputs, reductions.reduce_scatter_lists, *lists)

    def reduce_scatter_single(
        self, output: torch.Tensor, given: torch.Tensor, opts: Any = None
    ) -> Work:
        return self.reduce_scatter_single_coalesced([output], [given], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any = None
    ) -> Work:
        opts = opts or dist.ReduceScatterOptions()
        pairs = (outputs, inputs, opts.reduceOp)
        return self._start(opts, outputs, reductions.reduce_scatter, *pairs)

    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any) -> Work:
        to = [tensor for several in outputs for tensor in several]
        return self._start(opts, to, movements.gather, to, inputs[0], opts.rootRank)

    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any) -> Work:
        parts = [tensor for several in inputs for tensor in several]
        return self._start(opts, outputs, movements.scatter, outputs[0], parts, opts.rootRank)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        given: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
    ) -> Work:
        rows = (output, given, output_splits, input_splits)
        return self._start(opts, [output], movements.all_to_all, *rows)

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Work:
        return self._start(opts, outputs, movements.all_to_all_list, outputs, inputs)

    def barrier(self, opts: Any = None) -> Work:
        return self._start(opts, [], movements.barrier)

    # What the same were called before torch 2.13
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def _start(
        self, opts: Any, outputs: Tensors, operation: Callable[..., None], *arguments: Any
    ) -> Work:
        """Start ``operation(group, *arguments)``; it is complete already unless asynchronous."""
        work = partial(self._limit.run, getattr(opts, "timeout", None), operation, *arguments)
        if threading.get_ident() == self._lane_thread:  # in a callback of an earlier operation
            handle: Handle[None] = Handle()
            handle.run(work)
        elif getattr(opts, "asyncOp", True):
            handle = self._lane.submit(partial(self._on_lane, work))
        else:
            handle = Handle()
            handle.complete(self._lane.call(work))
        handle.title = operation.__name__
        return Work(handle, outputs)

    def _on_lane(self, work: Callable[[], None]) -> None:
        self._lane_thread = threading.get_ident()
        work()

    # Messages

    def send(self, tensors: Tensors, destination: int, tag: int) -> Work:
        (tensor,) = tensors
        title = f"send of {_described(tensor)} to rank {destination}, tag {tag}"
        data = source(tensor, moved=True).reshape(-1).view("u1")
        return Work(self._messages.send(data, destination, tag, title), [])

    def recv(self, tensors: Tensors, sender: int | None, tag: int) -> Work:
        (tensor,) = tensors
        whom = "any rank" if sender is None else f"rank {sender}"
        title = f"receive of {_described(tensor)} from {whom}, tag {tag}"
        target = Target(tensor, moved=True)
        data = target.flat.view("u1")
        message = self._messages.receive(data, sender, tag, title, finish=target.store)
        return Work(message, tensors)

    def recv_anysource(self, tensors: Tensors, tag: int) -> Work:
        return self.recv(tensors, None, tag)


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
