"""The state between ``init()`` and ``shutdown()``: one object, which everything else is passed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hvdkit import native
from hvdkit.collectives.calls import Call, mismatch
from hvdkit.collectives.group import Group
from hvdkit.collectives.hierarchical import Layout
from hvdkit.collectives.joining import serve_joined
from hvdkit.config import BUCKET_BYTES, Config
from hvdkit.engine.agreement import agree_on_gradients
from hvdkit.engine.bucketing import Gradient
from hvdkit.engine.channels import Channels
from hvdkit.engine.communicator import Communicator
from hvdkit.engine.grouping import GroupMaker
from hvdkit.engine.progress import Progress
from hvdkit.engine.recording import Recording
from hvdkit.engine.reducer import GradientReducer
from hvdkit.engine.stall import Watch
from hvdkit.errors import (
    ArgumentError,
    HvdkitError,
    LauncherError,
    UnsupportedError,
    format_ranks,
)
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.transport.base import JobTransport, Topology
from hvdkit.transport.cores import have_own_cores
from hvdkit.transport.courier import Courier
from hvdkit.transport.launcher import RANK_PROCESS, check_not_a_worker
from hvdkit.transport.mail import Mail, MessageMail, PipeMail, WatchedMail
from hvdkit.transport.opening import load_mpi, open_world
from hvdkit.tuning.finding import agree_on_tuning, this_machine
from hvdkit.tuning.record import Tuning, World
from hvdkit.version import __version__

log = logging.getLogger("hvdkit")


class Context:
    """One initialised job, as this rank sees it.  Creating and closing it is collective.

    Args:
        comm: an mpi4py intracommunicator, which is duplicated; None: all ranks of the job, over
            MPI or TCP as `hvdkit.transport.opening` decides.
        config: what the environment says.
        process_sets: to be known from the start.

    Raises:
        LauncherError: MPI is missing, or is not the MPI of the launcher, or has no threads; or the
            ranks did not meet in time.
        MismatchError: the ranks have different configurations.
        ConfigError: the tuning file cannot be read, or is none.
        UnsupportedError: `comm` is not an intracommunicator.
    """

    def __init__(self, comm: Any, config: Config, process_sets: Sequence[ProcessSet] = ()) -> None:
        check_not_a_worker(os.environ)
        os.environ[RANK_PROCESS] = str(os.getpid())
        self.config = config
        log.setLevel(config.log_level)
        opened = open_world(comm, config, os.environ)
        self.kind: str = opened.kind
        self.joined: str = opened.description
        self.threaded: bool = opened.threaded
        self._transport: JobTransport = opened.transport
        # When a rank of MPI's is lost, its launcher ends the others; over TCP they see to it.
        self._look = opened.transport.incoming if opened.kind == "tcp" else None
        log.info("rank %d joined %s", self._transport.rank, self.joined)
        self._check_same_configuration()
        self._local, topology = self._transport.split_by_node()
        self.topology: Topology = topology
        leader = self._local.broadcast_object(self.topology.rank, 0)
        self.nodes = Layout.of(self._transport.allgather_object(leader)).nodes
        """The ranks of each node, ascending."""
        self.local_sizes: tuple[int, ...] = tuple(
            next(len(node) for node in self.nodes if rank in node)
            for rank in range(self.topology.size)
        )
        self._spin = config.spin if have_own_cores(self._local) else 0
        self._local.backoff.spin = self._spin
        self._check_threads()
        self.kernels = native.load(enabled=config.native)
        self.recording = Recording()
        self.tuning = agree_on_tuning(
            self._transport, config.tuning_file, self.describe_world, os.environ
        )
        self._groups = GroupMaker(
            config, self.kernels, self.recording, spin=self._spin, tuning=self.tuning
        )
        self.channels = Channels(self._transport, self._groups, threaded=self.threaded)
        self._members: dict[int, tuple[int, ...]] = {0: tuple(range(self.topology.size))}
        self._named: dict[int, Group] = {}
        self._couriers: dict[int, Courier] = {}
        self._sets: dict[int, ProcessSet] = {0: global_process_set}
        self._next_set = 1
        self._made_here: set[int] = set()  # process sets that no user has asked for
        self._adopted: dict[int, ProcessSet] = {}  # the users' own for these
        self._mail = self._open_mail()
        self._progress = self._start_progress()
        self.world = self._communicator(0, self._transport.duplicate())
        self.arena = self.world.group.arena or self.world.group.no_arena
        self.group = self.world.group
        global_process_set.bind(0, self._members[0], self.world)
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
                self.stop_timeline()
            except HvdkitError as exc:
                log.warning("the timeline stays in parts, one a rank: %s", exc)
        for courier in self._couriers.values():
            courier.close()
        for channel in self.channels.open:
            channel.lane.stop()
        self._progress.close()
        for channel in self.channels.open:
            channel.lane.close()
            channel.group.close(in_step=self._watch.in_step(channel))
        for group in self._named.values():
            group.close()
        for process_set in (*self._sets.values(), *self._adopted.values()):
            process_set.unbind()
        self._mail.close()
        self._local.close()
        self._transport.close()

    def abort(self, code: int) -> None:
        """End every process of the job at once."""
        self._transport.abort(code)

    # Tuning

    @property
    def bucket_bytes(self) -> int:
        """Bytes of gradients that travel together: as configured, or tuned, or usual."""
        if self.config.bucket_bytes is not None:
            return self.config.bucket_bytes
        tuned = None if self.tuning is None else self.tuning.bucket_bytes
        return BUCKET_BYTES if tuned is None else tuned

    def describe_world(self) -> World:
        """Return what times depend on here.  Collective, blocking."""
        machines = self._transport.allgather_object(this_machine())
        return World(
            hvdkit=__version__,
            machines=tuple(sorted(set(machines))),
            nodes=tuple(len(node) for node in self.nodes),
            transport=self.kind,
            library=load_mpi().library_version() if self.kind == "mpi" else "",
            kernels=self.kernels.name,
            shared_memory=self.config.shm and native.why_unavailable() is None,
        )

    def part(self, ranks: Sequence[int]) -> JobTransport:
        """Return messages among `ranks`, apart from all others.  Collective among them."""
        return self._transport.subset(ranks)

    def adopt_tuning(self, tuning: Tuning) -> None:
        """Choose by `tuning` from now on.  Collective, blocking."""
        self.tuning = self._groups.tuning = tuning
        self._groups.adopt(self.group, self.topology)
        self.world.forget_short_ways()

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
        known = self._number_of(ranks)
        if known in self._made_here and known not in self._adopted:
            return self.world.call(self._adopt, process_set, known)
        try:
            if not ranks or ranks[-1] >= self.topology.size:
                raise ArgumentError(
                    f"{list(ranks)} is no process set: ranks are 0 to {self.topology.size - 1}"
                )
            if known is not None:
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

    def process_set_of(self, ranks: Iterable[int]) -> ProcessSet:
        """Return the process set of `ranks`, which is added if there is none.  Collective."""
        found = self.find_process_set(ranks)
        if found is None:
            found = self.add_process_set(ranks)
            assert found.process_set_id is not None
            self._made_here.add(found.process_set_id)
        return found

    def find_process_set(self, ranks: Iterable[int]) -> ProcessSet | None:
        """Return the process set of `ranks`, if there is one.  Local."""
        number = self._number_of(tuple(sorted(ranks)))
        return None if number is None else self._sets[number]

    def _number_of(self, ranks: tuple[int, ...]) -> int | None:
        return next((number for number, known in self._members.items() if known == ranks), None)

    def _adopt(self, group: Group, process_set: ProcessSet, number: int) -> ProcessSet:
        """Let a user's process set be one that was made for something else, and stays for it."""
        ranks = self._members[number]
        group.agree(Call("add_process_set", None, (("ranks", str(list(ranks))),)))
        mine = self._sets[number]
        process_set.bind(number, ranks, mine.communicator() if mine.included() else None)
        self._adopted[number] = process_set
        return process_set

    def remove_process_set(self, process_set: ProcessSet) -> bool:
        """Let go of a process set; return whether it was one.  Collective among all ranks.

        Raises:
            ArgumentError: on every rank, if named operations are under way in the set on any.
        """
        number = process_set.process_set_id
        if number is not None and self._adopted.get(number) is process_set:
            self._adopted.pop(number).unbind()
            return True
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
            self.channels.release_set(process_set.communicator())
            self._groups.release(self._named.pop(number))
            if number in self._couriers:
                self._couriers.pop(number).close()
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
            for channel in self.channels.open
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
        self.channels.release_unused(among)
        reducer = GradientReducer(
            agreed,
            channel=self.channels.beside(among, "gradients"),
            bucket_bytes=self.bucket_bytes if bucket_bytes is None else bucket_bytes,
            **how,
        )
        self.channels.keep(reducer.channel, among, reducer)
        return reducer

    # Arrays from rank to rank

    def courier(self, among: Communicator) -> Courier:
        """Return what carries arrays between the ranks of `among`, one for all.  Collective.

        Raises:
            UnsupportedError: MPI was started without support for threads.
        """
        if among.number not in self._couriers:
            if not self.threaded:
                raise UnsupportedError(
                    "MPI was started without thread support, which a pipeline needs: start it with "
                    '"multiple", as mpi4py does if nobody else has'
                )
            self._couriers[among.number] = among.call(self._open_courier, among.ranks)
        return self._couriers[among.number]

    def _open_courier(self, group: Group, ranks: Sequence[int]) -> Courier:
        group.agree(Call("courier", None))
        off = self.config.stall_check_disable
        transport: Any = group.transport
        return Courier(
            transport.duplicate(),
            shared=self.config.shm,
            check=0.0 if off else self.config.stall_check,
            shutdown=0.0 if off else self.config.stall_shutdown,
            ranks=ranks,
            look=self._look,
        )

    # Timeline

    def start_timeline(self, path: Path | str) -> None:
        """Begin to record what every rank does.  Collective."""
        self.world.call(self.recording.start, str(path))
        for process_set in self._sets.values():
            if process_set.included():
                process_set.communicator().forget_short_ways()

    def stop_timeline(self) -> None:
        """End the recording; rank 0 writes one file of it.  Collective."""
        if self.recording.timeline is None:
            raise ArgumentError("no timeline is being written; call start_timeline() first")
        self.world.call(self.recording.stop)

    # What it is made of

    def _communicator(
        self, number: int, transport: JobTransport, ranks: tuple[int, ...] | None = None
    ) -> Communicator:
        """Return the collectives of a set of ranks, this one among them.  Collective among them."""
        ranks = self._members[0] if ranks is None else ranks
        label = "all ranks" if number == 0 else f"process set {number}"
        channel = self.channels.make(label, ranks, transport, beside=False)
        by_name = self._groups.make(transport.duplicate(), f"{label}, by name", beside=True)
        self._named[number] = by_name
        return Communicator(number, ranks, channel, self._progress)

    def _open_mail(self) -> Mail:
        if self.topology.local_size == self.topology.size:
            mail = PipeMail.create(self._local)
            if not isinstance(mail, str):
                return mail if self._look is None else WatchedMail(mail, self._look)
        return MessageMail(self._transport.duplicate())

    def _start_progress(self) -> Progress:
        config = self.config
        off = config.stall_check_disable or self.topology.size == 1
        self._watch = Watch(
            self.channels.open,
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
            fuse_bytes=self.bucket_bytes,
            watch=self._watch,
            recording=self.recording,
        )

    def _check_threads(self) -> None:
        """Refuse an MPI that must not be used from hvdkit's threads, where these would use it."""
        beyond_memory = self.topology.local_size < self.topology.size or not self.config.shm
        if not self.threaded and self.topology.size > 1 and beyond_memory:
            level = load_mpi().threads_level()
            raise LauncherError(
                f"MPI was started with thread support {level!r}, and hvdkit's threads are to send "
                'messages here: start it with "multiple", as mpi4py does if nobody else has'
            )

    def _check_same_configuration(self) -> None:
        """Refuse ranks that were told different things; of tuning files rank 0's is read."""
        mine = {name: str(value) for name, value in asdict(self.config).items()}
        del mine["tuning_file"]
        calls = [
            Call("init", None, tuple(theirs.items()))
            for theirs in self._transport.allgather_object(mine)
        ]
        if len({call.signature for call in calls}) > 1:
            raise mismatch(calls)
