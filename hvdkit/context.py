"""The state between ``init()`` and ``shutdown()``: one object, which everything else is passed."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hvdkit import native
from hvdkit.collectives.calls import Call, mismatch
from hvdkit.collectives.hierarchical import Layout
from hvdkit.collectives.joining import serve_joined
from hvdkit.config import BUCKET_BYTES, Config
from hvdkit.engine.agreement import agree_on_gradients
from hvdkit.engine.bucketing import Gradient
from hvdkit.engine.channels import Channels
from hvdkit.engine.communicator import Communicator
from hvdkit.engine.couriers import Couriers
from hvdkit.engine.grouping import GroupMaker
from hvdkit.engine.progress import Progress
from hvdkit.engine.recording import Recording
from hvdkit.engine.reducer import GradientReducer
from hvdkit.engine.stall import Watch
from hvdkit.errors import ArgumentError, HvdkitError, LauncherError
from hvdkit.process_set_table import ProcessSetTable
from hvdkit.process_sets import ProcessSet
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
        self._couriers = Couriers(config, self._look, threaded=self.threaded)
        self.process_sets = ProcessSetTable(
            self._transport, self._groups, self.channels, self._couriers
        )
        self._mail = self._open_mail()
        self._progress = self._start_progress()
        self.world = self.process_sets.open(self._progress)
        self.arena = self.world.group.arena or self.world.group.no_arena
        self.group = self.world.group
        try:
            for process_set in process_sets:
                self.process_sets.add(process_set)
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
        self._couriers.close()
        for channel in self.channels.open:
            channel.lane.stop()
        self._progress.close()
        for channel in self.channels.open:
            channel.lane.close()
            channel.group.close(in_step=self._watch.in_step(channel))
        self.process_sets.close()
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
        return self._couriers.courier(among)

    # Timeline

    def start_timeline(self, path: Path | str) -> None:
        """Begin to record what every rank does.  Collective."""
        self.world.call(self.recording.start, str(path))
        for communicator in self.process_sets.communicators():
            communicator.forget_short_ways()

    def stop_timeline(self) -> None:
        """End the recording; rank 0 writes one file of it.  Collective."""
        if self.recording.timeline is None:
            raise ArgumentError("no timeline is being written; call start_timeline() first")
        self.world.call(self.recording.stop)

    # What it is made of

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
            self.process_sets.named,
            self.process_sets.members,
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
