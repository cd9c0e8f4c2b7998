"""The all-gather of small rows over several nodes: one rank of each crosses, for all of its node.

A node's ranks share memory, where a row costs next to nothing; a message to another node costs the
same whether it has one rank's row or those of all::

                 node 0           node 1
    rank         0      1         2      3
    [1]          ab     ab        cd     cd       all-gather in each node's arena
    [2]         abcd <--------> abcd              all-gather among the nodes' first ranks
    [3]         abcd   abcd      abcd   abcd      broadcast of the others' in each node's arena

So m nodes need m(m-1) messages, however many ranks they have, and the ranks that do not cross leave
the cores to those that do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdkit.errors import HorovodInternalError
from hvdkit.transport.arena import Arena
from hvdkit.transport.base import Prepared, Transport

#: Signatures of these operations of the arena.  Any two numbers would do.
_GATHER, _SPREAD = 0x6E6F646577697365, 0x6E6F646577697366


class NodewiseAllgather:
    """An all-gather of `rows`, prepared; fulfils `Prepared`.

    Args:
        nodes: the ranks of each node, ascending.
        rank: this one.
        rows: ``(size, length)``, each rank's in its place.
        arena: of this node; None if this rank has it to itself.
        arena_call: makes a call of it, and translates its error.
        leaders: messages among the first ranks of the nodes; None if this is none of them.
    """

    def __init__(
        self,
        nodes: Sequence[Sequence[int]],
        rank: int,
        rows: NDArray[np.int64],
        *,
        arena: Arena | None,
        arena_call: Callable[..., Any],
        leaders: Transport | None,
    ) -> None:
        size, length = rows.shape
        fullest = max(map(len, nodes))
        places = [rank for node in nodes for rank in node]
        self._rows, self._mine = rows, rows[rank]
        self._in_place = places == list(range(fullest * len(nodes)))
        """Whether what the nodes send each other are the rows as they are."""
        everything = rows if self._in_place else np.zeros((fullest * len(nodes), length), np.int64)
        number = next(i for i, node in enumerate(nodes) if rank in node)
        first = fullest * number
        self._everything = everything
        self._others = everything
        """What this node's ranks have not got from each other, in one piece."""
        if number == 0:
            self._others = everything[fullest:]
        elif number == len(nodes) - 1:
            self._others = everything[:first]
        self._node = everything[first : first + len(nodes[number])]
        self._own = self._node[nodes[number].index(rank)]
        self._order = np.zeros(size, np.int64)
        for i, node in enumerate(nodes):
            self._order[list(node)] = fullest * i + np.arange(len(node))
        self._bytes = tuple([self._own.nbytes] * len(self._node))
        self._arena = arena
        self._arena_call = arena_call
        self._across: Prepared | None = None
        if leaders is not None:
            self._across = leaders.prepare_allgather(everything.reshape(len(nodes), -1))

    def run(self) -> None:
        """Receive every other rank's row into its own, and send them this rank's.  Collective.

        Raises:
            PeerError: a rank died.  An error here ends the waits of this node's other ranks, too.
            HorovodInternalError: this node's ranks are in different calls; they had agreed before.
        """
        if not self._in_place:
            self._own[:] = self._mine
        try:
            self._in_arena("allgather", self._own, self._node, self._bytes, _GATHER)
            if self._across is not None:
                self._across.run()
            self._in_arena("broadcast", self._others, 0, _SPREAD)
        except BaseException:
            if self._arena is not None:
                self._arena.native.abort()
            raise
        if not self._in_place:
            np.take(self._everything, self._order, axis=0, out=self._rows)

    def _in_arena(self, operation: str, *arguments: Any) -> None:
        """Let the arena do it, if there is one."""
        if self._arena is None:
            return
        if self._arena_call(getattr(self._arena.native, operation), *arguments):
            raise HorovodInternalError(
                "the ranks of a node are not in step; a call that was interrupted may be the cause"
            )

    def free(self) -> None:
        if self._across is not None:
            self._across.free()
