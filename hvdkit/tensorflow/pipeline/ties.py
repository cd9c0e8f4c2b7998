"""Weights that several layers share, such as a tied embedding.

Each layer has a copy.  The copies start equal and get the same gradient, the sum of what each
layer contributes; so an optimizer keeps them equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from hvdkit.dtypes import Sum
from hvdkit.parallel.pipeline.pipeline import Holders
from hvdkit.parallel.pipeline.ties import Tie
from hvdkit.process_sets import ProcessSet
from hvdkit.tensorflow.all_reduce import allreduce
from hvdkit.tensorflow.pipeline.worker import unique
from hvdkit.tensorflow.state import broadcast_


class Ties:
    """The weights of this rank that are tied, which it makes equal.  Collective.

    Args:
        ties: names of variables; all that there are.
        holders: the ranks that have each, where they are several and this is one of them; and the
            one where it counts.
        variables: of this rank, by name.
        rank: this rank.
    """

    def __init__(
        self,
        ties: Sequence[Tie],
        holders: Mapping[Tie, Holders],
        variables: Mapping[str, Any],
        rank: int,
    ) -> None:
        self._shared: list[tuple[str, list[Any], ProcessSet | None]] = []
        self.copies: set[int] = set()
        """The variables that count elsewhere, by identity."""
        for tie in ties:
            mine = unique([variables[name] for name in tie if name in variables])
            those = holders.get(tie)
            if not mine or (those is None and len(mine) == 1):
                continue
            self._shared.append((tie[0], mine, None if those is None else those.ranks))
            counts = those is None or rank == those.root
            self.copies.update(id(variable) for variable in mine[counts:])
            if those is not None:
                broadcast_(mine[:1], those.root, name=tie[0], process_set=those.ranks)
            for variable in mine[1:]:
                variable.assign(mine[0])

    def add_up(self, variables: Sequence[Any], gradients: list[Any]) -> None:
        """Give all copies the sum of their gradients, in place.  Collective, blocking."""
        places = {id(variable): place for place, variable in enumerate(variables)}
        for name, mine, ranks in self._shared:
            at = [places[id(variable)] for variable in mine if id(variable) in places]
            there = [gradients[place] for place in at if gradients[place] is not None]
            total = tf.add_n(there) if there else tf.zeros(mine[0].shape, mine[0].dtype)
            if ranks is not None:
                total = allreduce(total, op=Sum, name=name, process_set=ranks)
            for place in at:
                gradients[place] = total
