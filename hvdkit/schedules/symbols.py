"""Symbolic contents of a chunk: who contributed, how often, and combined in which order."""

from __future__ import annotations


class Symbols:
    """Expressions over the ranks' contributions, each kept once, so that equal ones are one number.

    An expression is one rank's contribution or an unordered pair of expressions: the operation is
    commutative, not associative.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], int] = {}
        self._heard: list[int] = []  # bit r: the contribution of rank r is in it
        self._repeated: list[int] = []  # bit r: it is in it more than once

    def contribution(self, rank: int) -> int:
        """Return the symbol of what `rank` brings."""
        return self._intern((-1, rank), 1 << rank, 0)

    def combine(self, mine: int, incoming: int) -> int:
        """Return the symbol of the two combined, in either order."""
        pair = (mine, incoming) if mine < incoming else (incoming, mine)
        heard, also = self._heard[mine], self._heard[incoming]
        repeated = self._repeated[mine] | self._repeated[incoming] | (heard & also)
        return self._intern(pair, heard | also, repeated)

    def heard(self, symbol: int) -> int:
        """Return the ranks whose contributions are in `symbol`, rank r as bit r."""
        return self._heard[symbol]

    def repeated(self, symbol: int) -> int:
        """Return the ranks whose contributions are in `symbol` more than once, rank r as bit r."""
        return self._repeated[symbol]

    def _intern(self, key: tuple[int, int], heard: int, repeated: int) -> int:
        symbol = self._known.setdefault(key, len(self._heard))
        if symbol == len(self._heard):
            self._heard.append(heard)
            self._repeated.append(repeated)
        return symbol
