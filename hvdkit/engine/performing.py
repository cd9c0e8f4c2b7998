"""Performs what was decided: named operations of this rank, together with the other ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hvdkit.collectives.allreduce import allreduce
from hvdkit.collectives.group import Group
from hvdkit.collectives.joining import contribute, neutral
from hvdkit.engine.fusion import Packer
from hvdkit.engine.negotiation import Run
from hvdkit.engine.recording import Recording
from hvdkit.engine.requests import Operation


class Performer:
    """Runs operations one after the other, on the progress thread.

    Args:
        groups: of each process set that this rank is in, by its number; a live mapping.
        recording: is told what was done.
    """

    def __init__(self, groups: Mapping[int, Group], recording: Recording) -> None:
        self._groups = groups
        self._recording = recording
        self._packers: dict[int, Packer] = {}

    def release(self, set_id: int) -> None:
        """Let go of what is kept for a process set."""
        self._packers.pop(set_id, None)

    def perform(self, run: Run, mine: Sequence[Operation]) -> list[Any]:
        """Return the results of this rank's operations of `run`.  Collective, blocking.

        Args:
            run: what was decided.
            mine: its operations as this rank has them; none if it has joined.
        """
        began = time.perf_counter()
        group = self._groups[run.keys[0][0]]
        self._fetch(group, mine)
        results = self._perform(group, run, mine)
        for number, operation in enumerate(mine):
            if operation.store is not None:
                results[number] = operation.store(results[number])
        self._recording.named(mine, began, time.perf_counter())
        return results

    def _fetch(self, group: Group, mine: Sequence[Operation]) -> None:
        """Bring the sources from where they are; if that fails, the other ranks learn why."""
        for operation in mine:
            if operation.fetch is not None:
                try:
                    operation.fetch()
                except Exception as exc:
                    group.refuse(mine[0].request.call.kind, mine[0].request.call.name, exc)

    def _perform(self, group: Group, run: Run, mine: Sequence[Operation]) -> list[Any]:
        call = (mine[0].request if mine else run.requests[0]).call
        if call.kind == "allreduce" and "arrays" in (call.arguments or {}):
            arguments = dict(call.arguments or {})
            arguments.pop("arrays")
            pairs = [pair for operation in mine for pair in operation.pairs]
            if not mine:
                for request in run.requests:
                    for dtype, shape in (request.call.arguments or {})["arrays"]:
                        nothing = neutral(dtype, shape, arguments["op"], arguments["prescale"])
                        pairs.append((nothing, nothing))
            if len(pairs) == 1:
                allreduce(group, *pairs[0], name=call.name, **arguments)
            else:
                self._packer(run.keys[0][0], group).allreduce(pairs, **arguments)
            return [operation.result for operation in mine]
        if not mine:
            contribute(group, call)
            return []
        assert mine[0].work is not None
        return [mine[0].work(group)]

    def _packer(self, set_id: int, group: Group) -> Packer:
        packer = self._packers.get(set_id)
        if packer is None or packer.group is not group:
            packer = self._packers[set_id] = Packer(group)
        return packer
