"""The double binary tree: two trees, each rank an inner node of at most one, share the work.

Sanders, Speck & Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan",
Parallel Computing 35 (2009).

Rank 0 is the root of both and stands outside.  Ranks 1 to p-1 form two binary trees in which an
inner node of one is a leaf of the other: tree 0 numbers its nodes in order, so that odd ranks
are leaves, and tree 1 is tree 0 mirrored (p odd) or shifted by one rank (p even), so that even
ranks are.  A rank then has, over both trees together, two parents and at most two children.

So each rank receives on two edges and sends on two at the most.  Take for each rank one vertex as
a sender and one as a receiver: the edges form a bipartite graph of degree 2, which has a
2-colouring (Koenig), and steps in which edges of colour 0 and of colour 1 are used in turn have at
most one send and one receive for each rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from hvdkit.schedules.cost import Cost, log2_floor
from hvdkit.schedules.steps import Exchange, Transfer


@dataclass(frozen=True, slots=True)
class Edge:
    """An edge of one of the two trees.

    Args:
        tree: 0 or 1.
        parent: rank.
        child: rank.
        first: the time, counted from 0, at which the broadcast's first segment passes; segment i
            passes at first + 2i.
    """

    tree: int
    parent: int
    child: int
    first: int

    def carries(self, chunks: int) -> range:
        """Return the chunks that pass, in their order."""
        return range(self.tree, chunks, 2)

    def times(self, chunks: int) -> range:
        """Return the broadcast's times at which they pass; t is -1 - t in the reduction."""
        return range(self.first, self.first + 2 * len(self.carries(chunks)), 2)


def double_tree(rank: int, size: int, chunks: int) -> Iterator[Exchange]:
    """Reduce up both trees, then broadcast down, pipelined.  [Sanders, Speck & Träff 2009]

    With s segments a tree there are 2s chunks; tree 0 carries the even ones, tree 1 the odd.  The
    reduction is the broadcast played backwards with its arrows turned, about time 0.

    Steps 4(s-1) + 2d, where d is the time the first segments take down the trees: 2 log2 p, or if p
    is no power of two 2 floor(log2 p) + 1, and 1 more where p mod 4 = 3; the bound is ceil(log2 p).
    (This d is read off the trees, not derived; the tests hold it against them for p = 1..64 and
    for chosen sizes up to 1027.)
    Bytes sent a rank 2n for p > 3 (n for p = 2, 3n/2 for p = 3), where 2n(p-1)/p is the bound.
    p = 3, s = 1::

        step   from 0    from 1    from 2
        1                          2→1 c1+
        2                1→2 c0+
        3                1→0 c1+
        4                          2→0 c0+
        5      0→2 c0=
        6      0→1 c1=
        7                          2→1 c0=
        8                1→2 c1=
    """
    at: defaultdict[int, dict[str, Transfer]] = defaultdict(dict)
    for edge in _edges_by_rank(size)[rank]:
        for time, chunk in zip(edge.times(chunks), edge.carries(chunks), strict=True):
            if rank == edge.child:
                at[-1 - time]["send"] = (edge.parent, chunk)
                at[time]["store"] = (edge.parent, chunk)
            else:
                at[-1 - time]["reduce"] = (edge.child, chunk)
                at[time]["send"] = (edge.child, chunk)
    for time in sorted(at):
        yield Exchange(**at[time])


def double_tree_cost(size: int, chunks: int) -> Cost:
    """Return 4(s-1) + 2d steps and 2n bytes (less for p < 4), for an even number of chunks 2s."""
    if size == 1:
        return Cost(0, Fraction(0))
    depth = 2 * log2_floor(size)
    if size != 1 << log2_floor(size):
        depth += 1 + (size % 4 == 3)
    sent = {2: Fraction(1), 3: Fraction(3, 2)}.get(size, Fraction(2))
    return Cost(4 * (chunks // 2 - 1) + 2 * depth, sent)


def double_tree_edges(size: int) -> list[Edge]:
    """Return the edges of both trees, in the order of their children."""
    return [
        edge
        for rank, edges in enumerate(_edges_by_rank(size))
        for edge in edges
        if edge.child == rank
    ]


@lru_cache(maxsize=128)  # one set of trees serves all ranks
def _edges_by_rank(size: int) -> tuple[tuple[Edge, ...], ...]:
    """Return for each rank the edges that it is an end of."""
    parents = (_tree(size), _twin(_tree(size), size))
    colours = _colour(parents)
    first: dict[tuple[int, int], int] = {}

    def passes_first(tree: int, child: int) -> int:
        """Return the earliest time of the edge's colour at which its parent has a segment."""
        if (tree, child) not in first:
            parent = parents[tree][child]
            ready = passes_first(tree, parent) + 1 if parent else 0
            first[tree, child] = ready + (ready + colours[tree, child]) % 2
        return first[tree, child]

    edges: list[list[Edge]] = [[] for _ in range(size)]
    for tree, child in colours:
        edge = Edge(tree, parents[tree][child], child, passes_first(tree, child))
        edges[edge.parent].append(edge)
        edges[child].append(edge)
    return tuple(map(tuple, edges))


def _tree(size: int) -> dict[int, int]:
    """Return the parents in an in-order binary tree of the ranks 1 to p-1, hung below rank 0.

    In the perfect tree the parent of a node whose lowest bit is b has 2b as its lowest bit, and
    stands b to the left or to the right.  A node whose ancestors on the right are missing hangs
    from the nearest on its left, which is b away as well.
    """
    parents = {}
    for rank in range(1, size):
        bit = rank & -rank
        parent = (rank - bit) | (2 * bit)
        parents[rank] = parent if parent < size else rank - bit
    return parents


def _twin(parents: dict[int, int], size: int) -> dict[int, int]:
    """Return the tree mirrored (p odd) or shifted by a rank (p even): odd ranks become inner."""

    def renamed(rank: int) -> int:
        if rank == 0:
            return 0
        return size - rank if size % 2 else rank % (size - 1) + 1

    return {renamed(child): renamed(parent) for child, parent in parents.items()}


def _colour(parents: tuple[dict[int, int], dict[int, int]]) -> dict[tuple[int, int], int]:
    """Return a colour 0 or 1 for each edge ``(tree, child)``: edges that share a port differ."""
    by_sender: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for tree in (0, 1):
        for child, parent in parents[tree].items():
            by_sender[parent].append((tree, child))
    colours: dict[tuple[int, int], int] = {}
    for start in [(tree, child) for tree in (0, 1) for child in sorted(parents[tree])]:
        pending = [(start, 0)]
        while pending:
            edge, colour = pending.pop()
            if edge in colours:
                continue
            colours[edge] = colour
            tree, child = edge
            neighbours = [(1 - tree, child), *by_sender[parents[tree][child]]]
            pending += [(other, 1 - colour) for other in neighbours if other != edge]
    return colours
