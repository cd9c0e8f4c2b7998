"""Makes groups of ranks, each with messages and, within one node, memory of its own."""

from __future__ import annotations

import warnings

import numpy as np

from hvdkit import native
from hvdkit.collectives.group import Group
from hvdkit.collectives.hierarchical import ONE_NODE, Hierarchy, open_hierarchy
from hvdkit.config import SEGMENT_BYTES, SEGMENT_OVER_SOCKETS, Config
from hvdkit.engine.recording import Recording
from hvdkit.native import Kernels
from hvdkit.transport.arena import Arena
from hvdkit.transport.base import JobTransport, Topology
from hvdkit.tuning.estimates import Estimates
from hvdkit.tuning.record import Tuning

#: How often a rank looks before it sleeps, on a thread beside those that compute.
SPIN_BESIDE = 1000


class GroupMaker:
    """Makes the groups of one job, and lets go of them.

    Args:
        config: of the job.
        kernels: how chunks are reduced.
        recording: is told what the groups do.
        spin: how often a rank looks before it sleeps, on the user's own thread.
        tuning: what was measured of the machine.
    """

    def __init__(
        self,
        config: Config,
        kernels: Kernels,
        recording: Recording,
        *,
        spin: int,
        tuning: Tuning | None = None,
    ) -> None:
        self.tuning = tuning
        """What the groups choose by that are made from now on."""
        self._config = config
        self._kernels = kernels
        self._recording = recording
        self._spin = spin
        self._warned = False

    def make(self, transport: JobTransport, track: str, *, beside: bool = False) -> Group:
        """Return a group of the transport's ranks.  Collective among them.

        Args:
            transport: for this group alone.
            track: what the timeline calls it.
            beside: whether it is used on threads beside those that compute.
        """
        spin = min(self._spin, SPIN_BESIDE) if beside else self._spin
        transport.backoff.spin = spin
        local, topology = transport.split_by_node()
        how = {
            "segment_bytes": self._segment_bytes(transport, topology),
            "spin": min(spin, 100),  # a look costs a Python-level call here
        }
        arena: Arena | str
        hierarchy: Hierarchy | str
        if topology.local_size < topology.size:
            arena = "the ranks are on several nodes"
            hierarchy = open_hierarchy(
                transport,
                local,
                lambda: self._arena(local, topology, spin),
                kernels=self._kernels,
                **how,
            )
        else:
            arena, hierarchy = self._arena(local, topology, spin), ONE_NODE
            if isinstance(arena, str):
                local.close()
        group = Group(transport, self._kernels, arena, hierarchy=hierarchy, **how)
        self.adopt(group, topology)
        group.recorder = self._recording.track(track)
        self._recording.stats.register(group.counts)
        return group

    def adopt(self, group: Group, topology: Topology) -> None:
        """Let a group choose by the tuning.  Collective among its ranks.

        Args:
            group: of the ranks.
            topology: of this rank in it.
        """
        local_sizes = group.transport.allgather_ints(np.array([topology.local_size], np.int64))
        estimates = Estimates(
            self.tuning,
            group.size,
            int(local_sizes.max()),
            nested=group.hierarchy is not None,
            segment_bytes=self._config.segment_bytes,
            usual_segment=group.segment_bytes,
        )
        group.adopt(estimates)

    def release(self, group: Group, *, in_step: bool = True) -> None:
        """Let go of a group; what it has counted stays.  Collective if the ranks are in step."""
        self._recording.stats.unregister(group.counts)
        group.close(in_step=in_step)

    def _segment_bytes(self, transport: JobTransport, topology: Topology) -> int:
        """Return the bytes of a segment where nobody has tuned it.  Collective."""
        if self._config.segment_bytes is not None:
            return self._config.segment_bytes
        if topology.local_size == topology.size:
            return SEGMENT_BYTES
        asks = transport.allgather_ints(np.array([transport.asks_first], np.int64)).any()
        return SEGMENT_OVER_SOCKETS if asks else SEGMENT_BYTES

    def _arena(self, local: JobTransport, topology: Topology, spin: int) -> Arena | str:
        """Return the arena of this node's ranks, or why there is none; the same on all of them."""
        reason = self._why_no_arena(local)
        if reason:
            return reason
        arena = Arena.create(
            local,
            slot_bytes=max(self._config.slot_bytes, 64 * topology.local_size),
            spin=spin,
            directory=self._config.shm_dir,
        )
        if isinstance(arena, str) and topology.local_rank == 0 and not self._warned:
            warnings.warn(
                f"no shared memory: {arena}. The ranks of this node exchange messages "
                "instead, which is slower; in a container, give it more with --shm-size",
                stacklevel=7,
            )
        self._warned = True
        return arena

    def _why_no_arena(self, local: JobTransport) -> str:
        if not self._config.shm:
            return "HVDKIT_SHM=0"
        if not self._config.native:
            return "HVDKIT_NATIVE=0 leaves out the native module"
        missing = native.why_unavailable()
        mine = "" if missing is None else f"the native module is not there ({missing})"
        reasons = [text for text in local.allgather_object(mine) if text]
        return reasons[0] if reasons else ""
