"""Random operations on the arena while ranks are interrupted, stopped and killed from outside.

Every answer up to then must be right, and what cannot be finished must end as an error.  A process
of its own does the disturbing: it learns of the ranks' pids from shared memory.
"""

from __future__ import annotations

import mmap
import os
import random
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import numpy as np
import pytest
from test_arena import (
    FLOAT32,
    LIMIT_SECONDS,
    SLOT,
    SPINS,
    SUM,
    _native,
    data_of,
    reduced,
    run,
    same_bits,
    shared,
)

from hvdkit.dtypes import ReduceOp

STRIDE = 64_000
LENGTHS = (1, 33, 500, 3000, 12_000)


class Pids:
    """The pids of the ranks that may be disturbed, and a word that ends the disturbing."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = mmap.mmap(-1, 4096)

    def __setitem__(self, index: int, value: int) -> None:
        struct.pack_into("i", self.memory, 4 * index, value)

    def __getitem__(self, index: int) -> int:
        return struct.unpack_from("i", self.memory, 4 * index)[0]

    def all(self) -> list[int]:
        """Return every rank's pid, or an empty list while there is one not to be disturbed."""
        pids = [self[rank] for rank in range(self.size)]
        return pids if all(pids) else []

    @property
    def over(self) -> bool:
        return bool(self[self.size])


Disturb = Callable[[list[int], random.Random], bool]


@contextmanager
def disturbing(size: int, disturb: Disturb, seed: int) -> Iterator[Pids]:
    """Call `disturb` in another process once all ranks are there, until it says that it is done."""
    pids = Pids(size)
    disturber = os.fork()
    if disturber == 0:
        try:
            _disturb_again_and_again(pids, disturb, random.Random(seed))
        finally:
            os._exit(0)
    try:
        yield pids
    finally:
        pids[size] = 1
        os.waitpid(disturber, 0)


def _disturb_again_and_again(pids: Pids, disturb: Disturb, rng: random.Random) -> None:
    deadline, done = time.monotonic() + LIMIT_SECONDS, False
    while not (done or pids.over) and time.monotonic() < deadline:
        alive = pids.all()
        with suppress(ProcessLookupError):  # it was just leaving
            done = bool(alive) and disturb(alive, rng)
        time.sleep(0.001)


class Traffic:
    """Random operations, the same on all ranks, each checked against numpy's answer."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.region = mmap.mmap(-1, size * STRIDE)

    def operation(self, rank: int, arena: Any, rng: random.Random, step: int) -> None:
        size, kind, length = self.size, rng.choice("rrdbge"), rng.choice(LENGTHS)
        inputs = [data_of(np.dtype(np.float32), length, r, step) for r in range(size)]
        out = inputs[rank].copy()
        if kind == "d":
            out = np.frombuffer(self.region, np.float32, length, rank * STRIDE)
            out[:] = inputs[rank]
        if kind in "rd":
            assert arena.allreduce(out, out, FLOAT32, SUM, 1.0, 1, 1.0, step) == 0
            same_bits(out, reduced(inputs, ReduceOp.SUM))
        elif kind == "b":
            assert arena.broadcast(out, step % size, step) == 0
            same_bits(out, inputs[step % size])
        elif kind == "g":
            everyones = np.zeros(length * size, np.float32)
            assert arena.allgather(out, everyones, (4 * length,) * size, step) == 0
            same_bits(everyones, np.concatenate(inputs))
        else:
            assert arena.exchange(bytes([rank]), step) == [bytes([r]) for r in range(size)]


@pytest.mark.parametrize("spin", SPINS)
@pytest.mark.parametrize("size", [2, 5])
def test_signals_at_any_moment_change_nothing(size: int, spin: int) -> None:
    traffic = Traffic(size)

    def disturb(pids: list[int], rng: random.Random) -> bool:
        for pid in rng.sample(pids, rng.randint(1, size)):
            os.kill(pid, signal.SIGUSR1)
        return False

    def body(rank: int, arena: Any) -> None:
        came: list[int] = []
        signal.signal(signal.SIGUSR1, lambda *_: came.append(1))
        same, own = random.Random(size + spin), random.Random(rank)
        arena.register(traffic.region, STRIDE)
        pids[rank] = os.getpid()
        for step in range(300):
            if own.random() < 0.03:
                time.sleep(own.random() * 0.02)
            traffic.operation(rank, arena, same, step)
        while not came:  # the disturber may be slow to begin; who waits for it fails in the end
            time.sleep(0.001)
        assert arena.barrier(1) == 0
        assert not arena.aborted
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        pids[rank] = 0

    with disturbing(size, disturb, seed=size + spin) as pids:
        run(size, body, spin=spin)


@pytest.mark.parametrize("spin", SPINS)
def test_a_stopped_rank_is_waited_for(spin: int) -> None:
    """For longer than a sleep's limit, too, after which its peers look whether it is alive."""
    size = 3
    traffic = Traffic(size)
    stops, enough = mmap.mmap(-1, 4096), 12

    def disturb(pids: list[int], rng: random.Random) -> bool:
        pid = rng.choice(pids)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(rng.choice((0.0, 0.002, 0.03, 0.12)))
        os.kill(pid, signal.SIGCONT)
        stops[0] += 1
        return stops[0] == enough

    def body(rank: int, arena: Any) -> None:
        same = random.Random(spin)
        arena.register(traffic.region, STRIDE)
        pids[rank] = os.getpid()
        for step in count():
            traffic.operation(rank, arena, same, step)
            if step % 50 == 49:  # all must come to the same end
                seen = arena.exchange(bytes([stops[0]]), 1)
                if seen == [bytes([enough])] * size:
                    break
        pids[rank] = 0
        assert not arena.aborted

    with disturbing(size, disturb, seed=spin) as pids:
        run(size, body, spin=spin)


@pytest.mark.parametrize("trial", range(6))
@pytest.mark.parametrize("spin", SPINS)
def test_a_rank_killed_at_any_moment_is_an_error_on_the_others(spin: int, trial: int) -> None:
    """Whatever it was in the middle of; that the others end at all is for `run` to see."""
    size = 2 + trial % 3
    victim = trial % size
    traffic = Traffic(size)

    def disturb(pids: list[int], rng: random.Random) -> bool:
        time.sleep(rng.random() * 0.05)
        os.kill(pids[victim], signal.SIGKILL)
        return True

    def body(rank: int, arena: Any) -> None:
        same = random.Random(trial)
        arena.register(traffic.region, STRIDE)
        pids[rank] = os.getpid()
        with pytest.raises(_native.ArenaError, match=f"local rank {victim} died"):
            for step in count():
                traffic.operation(rank, arena, same, step)
        assert arena.aborted
        with pytest.raises(_native.ArenaError, match=f"local rank {victim} died"):
            arena.barrier(1)

    with disturbing(size, disturb, seed=trial + spin) as pids:
        run(size, body, spin=spin, killed=(victim,))


def test_a_rank_of_unknown_start_time_counts_as_alive() -> None:
    """It was taken for dead when no file descriptor was free at the moment that it attached."""
    size = 2
    memory = shared(size)

    def body(rank: int, _arena: Any) -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        if rank == 0:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        arena = _native.Arena(memory, rank, size, SLOT, 0)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        if rank == 0:
            time.sleep(0.3)
        assert arena.barrier(1) == 0

    run(size, body)
