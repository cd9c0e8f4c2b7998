"""Every algorithm that hvdkit knows, by collective and by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hvdkit.errors import ArgumentError
from hvdkit.schedules.all_pairs import all_pairs_allreduce
from hvdkit.schedules.bruck import bruck_allgather, bruck_allgather_cost
from hvdkit.schedules.chain import chain_broadcast, chain_broadcast_cost
from hvdkit.schedules.cost import Cost, log2_floor
from hvdkit.schedules.dissemination import dissemination_barrier, dissemination_barrier_cost
from hvdkit.schedules.double_tree import (
    Edge,
    double_tree,
    double_tree_cost,
    double_tree_edges,
)
from hvdkit.schedules.doubling import (
    halving_doubling,
    halving_doubling_cost,
    recursive_doubling,
    recursive_doubling_cost,
    recursive_halving,
    recursive_halving_cost,
)
from hvdkit.schedules.pairwise import pairwise_alltoall, pairwise_alltoall_cost
from hvdkit.schedules.phases import Phase
from hvdkit.schedules.ring import (
    ring_allgather,
    ring_allreduce,
    ring_allreduce_cost,
    ring_half_cost,
    ring_reducescatter,
)
from hvdkit.schedules.steps import Schedule
from hvdkit.schedules.tree import (
    binomial_broadcast,
    binomial_broadcast_cost,
    tree_allreduce,
    tree_allreduce_cost,
)


def _one(_size: int, _segments: int) -> int:
    return 1


def _one_a_rank(size: int, _segments: int) -> int:
    return size


def _one_a_core_rank(size: int, _segments: int) -> int:
    return 1 << log2_floor(size)


def _one_a_segment(_size: int, segments: int) -> int:
    return segments


def _two_a_segment(_size: int, segments: int) -> int:
    return 2 * segments


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """A schedule and what is known about it.

    Args:
        collective: ``"allreduce"``, ``"allgather"``, ...
        name: ``"ring"``, ``"tree"``, ...; distinct within a collective.
        steps: ``steps(rank, size, chunks)`` yields the steps of one rank.
        chunks: ``chunks(size, segments)`` is the number of chunks into which the message is cut;
            `segments` counts only where the algorithm is pipelined.
        cost: ``cost(size, chunks)`` is what the schedule costs by its formula.
        source: the paper.
        pipelined: whether more segments mean more overlap, so that a caller should choose them.
        phases: ``phases(size)``: where groups of ranks run simpler schedules one after another,
            those that `steps` is made of.
        edges: ``edges(size)``: where `steps` goes by a timetable, the edges that have it.
    """

    collective: str
    name: str
    steps: Schedule
    chunks: Callable[[int, int], int]
    cost: Callable[[int, int], Cost]
    source: str
    pipelined: bool = False
    phases: Callable[[int], tuple[Phase, ...]] | None = None
    edges: Callable[[int], list[Edge]] | None = None

    @property
    def rooted(self) -> bool:
        """Whether the result depends on which rank is rank 0: the caller relabels its root."""
        return self.collective == "broadcast"


_KNOWN = (
    Algorithm(
        collective="allreduce",
        name="ring",
        steps=ring_allreduce,
        chunks=_one_a_rank,
        cost=ring_allreduce_cost,
        source="Patarasuk & Yuan 2009",
    ),
    Algorithm(
        collective="allreduce",
        name="tree",
        steps=tree_allreduce,
        chunks=_one,
        cost=tree_allreduce_cost,
        source="Thakur, Rabenseifner & Gropp 2005",
    ),
    Algorithm(
        collective="allreduce",
        name="double_tree",
        steps=double_tree,
        chunks=_two_a_segment,
        cost=double_tree_cost,
        source="Sanders, Speck & Träff 2009",
        pipelined=True,
        edges=double_tree_edges,
    ),
    Algorithm(
        collective="allreduce",
        name="recursive_doubling",
        steps=recursive_doubling,
        chunks=_one,
        cost=recursive_doubling_cost,
        source="Thakur, Rabenseifner & Gropp 2005",
    ),
    Algorithm(
        collective="allreduce",
        name="halving_doubling",
        steps=halving_doubling,
        chunks=_one_a_core_rank,
        cost=halving_doubling_cost,
        source="Rabenseifner 2004",
    ),
    Algorithm(
        collective="allreduce",
        name="all_pairs",
        steps=all_pairs_allreduce,
        chunks=_one_a_rank,
        cost=ring_allreduce_cost,
        source="Cowan et al. 2023",
    ),
    Algorithm(
        collective="allgather",
        name="ring",
        steps=ring_allgather,
        chunks=_one_a_rank,
        cost=ring_half_cost,
        source="Patarasuk & Yuan 2009",
    ),
    Algorithm(
        collective="allgather",
        name="bruck",
        steps=bruck_allgather,
        chunks=_one_a_rank,
        cost=bruck_allgather_cost,
        source="Bruck et al. 1997",
    ),
    Algorithm(
        collective="reducescatter",
        name="ring",
        steps=ring_reducescatter,
        chunks=_one_a_rank,
        cost=ring_half_cost,
        source="Patarasuk & Yuan 2009",
    ),
    Algorithm(
        collective="reducescatter",
        name="recursive_halving",
        steps=recursive_halving,
        chunks=_one_a_rank,
        cost=recursive_halving_cost,
        source="Thakur, Rabenseifner & Gropp 2005",
    ),
    Algorithm(
        collective="broadcast",
        name="binomial",
        steps=binomial_broadcast,
        chunks=_one,
        cost=binomial_broadcast_cost,
        source="Thakur, Rabenseifner & Gropp 2005",
    ),
    Algorithm(
        collective="broadcast",
        name="chain",
        steps=chain_broadcast,
        chunks=_one_a_segment,
        cost=chain_broadcast_cost,
        source="Pješivac-Grbović et al. 2007",
        pipelined=True,
    ),
    Algorithm(
        collective="alltoall",
        name="pairwise",
        steps=pairwise_alltoall,
        chunks=_one_a_rank,
        cost=pairwise_alltoall_cost,
        source="Thakur, Rabenseifner & Gropp 2005",
    ),
    Algorithm(
        collective="barrier",
        name="dissemination",
        steps=dissemination_barrier,
        chunks=_one,
        cost=dissemination_barrier_cost,
        source="Hensgen, Finkel & Manber 1988",
    ),
)

#: ``ALGORITHMS[collective][name]``
ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    collective: {known.name: known for known in _KNOWN if known.collective == collective}
    for collective in dict.fromkeys(known.collective for known in _KNOWN)
}


def get(collective: str, name: str) -> Algorithm:
    """Return the algorithm `name` of `collective`.

    Raises:
        ArgumentError: no such collective or no such algorithm; the message lists the known ones.
    """
    known = ALGORITHMS.get(collective)
    if known is None:
        raise ArgumentError(
            f"unknown collective {collective!r}; the known ones are {', '.join(ALGORITHMS)}"
        )
    if name not in known:
        raise ArgumentError(
            f"unknown algorithm {name!r} for {collective}; the known ones are {', '.join(known)}"
        )
    return known[name]
