"""Jobs whose ranks are `Progress` objects of one process, with mail in its memory."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
import pytest

from hvdkit import collectives
from hvdkit.collectives.group import Group
from hvdkit.dtypes import Sum
from hvdkit.engine.channel import Channel
from hvdkit.engine.communicator import Communicator
from hvdkit.engine.lane import Lane
from hvdkit.engine.progress import Progress
from hvdkit.engine.recording import Recording
from hvdkit.engine.stall import Watch
from hvdkit.native import NumpyKernels
from hvdkit.transport.mail import MessageMail, PipeMail
from hvdkit.transport.threads import ThreadTransport, ThreadWorld

#: Long enough for a busy machine, short enough for a hang to be noticed.
SECONDS = 20


class Box:
    """One rank's mail; `failing`, if set, is what its `receive` raises.

    `patient` is whether whoever receives is, or was when last asked.
    """

    def __init__(self, rank, boxes):
        self.rank, self.boxes = rank, boxes
        self.messages, self.woken = deque(), False
        self.changed = threading.Condition()
        self.failing = None
        self.patient = False

    def send(self, destination, message):
        box = self.boxes[destination]
        with box.changed:
            box.messages.append((self.rank, message))
            box.changed.notify()

    def receive(self, timeout, *, patient=False):
        self.patient = patient
        if self.failing is not None:
            raise self.failing
        with self.changed:
            self.changed.wait_for(lambda: self.messages or self.woken, timeout)
            found, self.woken = list(self.messages), False
            self.messages.clear()
            return found

    def wake(self):
        with self.changed:
            self.woken = True
            self.changed.notify()

    def close(self):
        pass


class Job:
    """Ranks with a progress thread and communicators each.

    Args:
        size: how many ranks.
        sets: the ranks of process sets 1, 2, ...
        connect: given the size, returns each rank's mail; None: boxes in memory.
        watching: how long until what is looked for; see `Watch`.
    """

    def __init__(self, size, sets=(), *, fuse_bytes=1 << 20, connect=None, **watching):
        members = {0: tuple(range(size)), **dict(enumerate(sets, 1))}
        self.size, self.members = size, members
        self.boxes = []
        self.boxes += connect(size) if connect else [Box(r, self.boxes) for r in range(size)]
        self.recordings = [Recording() for _ in range(size)]
        self.channels = [[] for _ in range(size)]
        self.named = [self._groups(number) for number in members]
        self.groups = [
            {n: groups[rank] for n, groups in enumerate(self.named) if rank in groups}
            for rank in range(size)
        ]
        synchronous = {number: self._groups(number) for number in members}
        limits = {"check": 0.0, "shutdown": 0.0, "deadlock": 0.0} | watching
        self.progress = [
            Progress(
                self.boxes[rank],
                self.groups[rank],
                dict(members),
                rank=rank,
                fuse_bytes=fuse_bytes,
                watch=Watch(self.channels[rank], rank=rank, size=size, **limits),
                recording=self.recordings[rank],
            )
            for rank in range(size)
        ]
        self.lanes = []
        self._communicators = {}
        for number, ranks in members.items():
            for rank in ranks:
                lane = Lane(f"{number}", threaded=True)
                channel = Channel(f"set {number}", ranks, synchronous[number][rank], lane)
                self.channels[rank].append(channel)
                self.lanes.append(lane)
                self._communicators[rank, number] = Communicator(
                    number, ranks, channel, self.progress[rank]
                )

    def _groups(self, number):
        ranks = self.members[number]
        world = ThreadWorld(len(ranks))
        return {
            rank: Group(
                ThreadTransport(world, place), NumpyKernels(), "none", segment_bytes=64, spin=0
            )
            for place, rank in enumerate(ranks)
        }

    def at(self, rank, number=0):
        """Return the communicator of a process set on a rank."""
        return self._communicators[rank, number]

    def on_ranks(self, body):
        """Call ``body(rank)`` on a thread for each rank; return the results.

        Raises:
            The first exception of any; TimeoutError.
        """
        return ThreadWorld(self.size).run(lambda transport: body(transport.rank), timeout=SECONDS)

    def close(self):
        """Leave on all ranks at once."""
        for lane in self.lanes:
            lane.stop()
        threads = [threading.Thread(target=p.close, daemon=True) for p in self.progress]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
            assert not thread.is_alive(), "a progress thread did not end"
        for lane in self.lanes:
            lane.close()
        for box in self.boxes:
            box.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def pipe_mail(size):
    return ThreadWorld(size).run(PipeMail.create)


def message_mail(size):
    world = ThreadWorld(size)
    return [MessageMail(ThreadTransport(world, rank)) for rank in range(size)]


def start(job, rank, name, value=None, *, number=0, count=3, op=Sum, **how):
    """Start to reduce an array full of `value`, the rank by default; completes with the target."""
    array = np.full(count, rank if value is None else value, np.float64)
    target = np.empty_like(array)
    communicator = job.at(rank, number)
    return communicator.allreduce_async([(array, target)], name=name, op=op, result=target, **how)


def value_of(handle):
    """Return the one value that all elements of the result have."""
    (value,) = set(handle.wait(SECONDS).tolist())
    return value


def error_of(handle):
    with pytest.raises(Exception) as caught:
        handle.wait(SECONDS)
    return caught.value


def allgather(job, rank, name, array, **how):
    def work(group):
        return collectives.allgather(group, array, name=name, algorithm="auto")

    return job.at(rank).start("allgather", [array], work, name=name, ragged=True, **how)


def assert_in_step(job):
    def body(rank):
        assert value_of(start(job, rank, "afterwards", 1)) == job.size

    job.on_ranks(body)
