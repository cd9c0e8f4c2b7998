"""The shared-memory arena, between real processes, against numpy's own answers.

`run(size, body)` forks `size` ranks over one anonymous shared mapping; each calls
``body(rank, arena)``.  Whoever is not done in time is killed and reported: nothing here can hang.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hvdkit.dtypes import DTYPE_CODES, DTYPES, ReduceOp, bfloat16
from hvdkit.native import NumpyKernels

_native = pytest.importorskip("hvdkit.native._native", reason="no native module is built")
if not hasattr(_native, "Arena"):
    pytest.skip("the arena is for Linux alone", allow_module_level=True)

SLOT = 4096
LIMIT_SECONDS = 60
SIZES = (1, 2, 3, 4, 5)
SPINS = (0, 500)
FLOAT32 = DTYPE_CODES[np.dtype(np.float32)]
SUM = int(ReduceOp.SUM)

Body = Callable[[int, Any], object]


def shared(size: int) -> mmap.mmap:
    return mmap.mmap(-1, _native.arena_bytes(size, SLOT))


def run(
    size: int,
    body: Body,
    *,
    spin: int = 0,
    memory: mmap.mmap | None = None,
    killed: tuple[int, ...] = (),
) -> None:
    """Run `body` on every rank; fail with the first rank's traceback, or when time is up."""
    memory = memory or shared(size)
    children: dict[int, tuple[int, int]] = {}
    for rank in range(size):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _run_rank(rank, size, memory, body, spin, writing)
        os.close(writing)
        children[rank] = pid, reading
    _collect(children, killed)


def _run_rank(rank: int, size: int, memory: mmap.mmap, body: Body, spin: int, writing: int) -> None:
    status = 0
    try:
        random.seed(rank)
        arena = _native.Arena(memory, rank, size, SLOT, spin)
        body(rank, arena)
    except BaseException:
        os.write(writing, traceback.format_exc().encode()[-60_000:])
        status = 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def _collect(children: dict[int, tuple[int, int]], killed: tuple[int, ...]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    waiting, failures = dict(children), []
    while waiting:
        for rank, (pid, reading) in list(waiting.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() < deadline:
                continue
            if not done:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                failures.append(f"rank {rank} was not done in {LIMIT_SECONDS} s")
            elif status and rank not in killed:
                failures.append(
                    f"rank {rank} ended with {status}:\n{os.read(reading, 65536).decode()}"
                )
            os.close(reading)
            del waiting[rank]
        time.sleep(0.002)
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


def data_of(dtype: np.dtype, count: int, rank: int, seed: int = 0) -> np.ndarray:
    """Return what `rank` contributes; every rank can compute everyone's."""
    rng = np.random.default_rng([rank, count, seed])
    if dtype.kind == "b":
        return rng.integers(0, 2, count).astype(bool)
    if dtype.kind in "iu":
        return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).copy()
    values = rng.standard_normal(count).astype(np.float32)
    return values.astype(dtype) if dtype.kind != "c" else (values + 1j * values[::-1]).astype(dtype)


def exported(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == bfloat16 else array


def reduced(
    arrays: list[np.ndarray], op: ReduceOp, divisor: int = 1, pre: float = 1.0, post: float = 1.0
) -> np.ndarray:
    """Return the answer in rank order; 16-bit floats in float32, rounded once."""
    kernels, dtype = NumpyKernels(), arrays[0].dtype
    if dtype in (np.dtype(np.float16), bfloat16):
        arrays = [array.astype(np.float32) for array in arrays]
    arrays = [array.copy() for array in arrays]
    for array in arrays:
        kernels.scale(array, factor=pre)
    total = arrays[0]
    for array in arrays[1:]:
        kernels.reduce(total, array, op, incoming_first=False)
    kernels.scale(total, divisor=divisor, factor=post)
    return total.astype(dtype)


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def counts_to_try(size: int, itemsize: int) -> list[int]:
    piece = SLOT // itemsize  # also the limit of what goes in one round
    edges = (0, 1, size - 1, size, size + 1, 100, piece - 1, piece, piece + 1)
    return sorted({*edges, 3 * piece + 5, 11 * piece + 1})


# ------------------------------------------------------------------------------------ all-reduce


@pytest.mark.parametrize("spin", SPINS)
@pytest.mark.parametrize("size", SIZES)
def test_allreduce_of_every_dtype_and_op(size: int, spin: int) -> None:
    def body(rank: int, arena: Any) -> None:
        for dtype in DTYPES:
            for op in set(ReduceOp) - {ReduceOp.ADASUM}:  # no element-wise operation
                if dtype.kind == "c" and op in (ReduceOp.MIN, ReduceOp.MAX):
                    continue
                for count in (5, 3 * SLOT // dtype.itemsize + 5):
                    inputs = [data_of(dtype, count, r) for r in range(size)]
                    out = np.zeros(count, dtype)
                    arguments = (DTYPE_CODES[dtype], int(op), 1.0, 1, 1.0, 9)
                    status = arena.allreduce(exported(inputs[rank]), exported(out), *arguments)
                    assert status == 0
                    same_bits(out, reduced(inputs, op))

    run(size, body, spin=spin)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_allreduce_of_every_length(size: int, in_place: bool) -> None:
    def body(rank: int, arena: Any) -> None:
        for dtype in (np.dtype(np.uint8), np.dtype(np.float32), np.dtype(np.complex128)):
            for count in counts_to_try(size, dtype.itemsize):
                inputs = [data_of(dtype, count, r) for r in range(size)]
                source = inputs[rank].copy()
                out = source if in_place else np.zeros(count, dtype)
                assert arena.allreduce(source, out, DTYPE_CODES[dtype], SUM, 1.0, 1, 1.0, 3) == 0
                same_bits(out, reduced(inputs, ReduceOp.SUM))
                if not in_place:
                    same_bits(source, inputs[rank])

    run(size, body)


@pytest.mark.parametrize("size", SIZES)
def test_factors_and_unaligned_buffers(size: int) -> None:
    def body(rank: int, arena: Any) -> None:
        for name in ("u1", "i4", "i8", "f2", "f4", "f8", "c8", "bfloat16"):
            dtype = bfloat16 if name == "bfloat16" else np.dtype(name)
            for op in (ReduceOp.AVERAGE, ReduceOp.PRODUCT):
                for count in (7, 2 * SLOT + 3):
                    inputs = [data_of(dtype, count, r) for r in range(size)]
                    storage = np.zeros(count * dtype.itemsize + 1, np.uint8)
                    storage[1:] = inputs[rank].view(np.uint8)
                    for pre, divisor, post in ((1.0, size, 1.0), (0.5, 3, 1.5), (0.5, 1, 1.0)):
                        out = np.zeros_like(storage)
                        arguments = (DTYPE_CODES[dtype], int(op), pre, divisor, post, 1)
                        assert arena.allreduce(storage[1:], out[1:], *arguments) == 0
                        want = reduced(inputs, op, divisor, pre, post)
                        np.testing.assert_array_equal(out[1:], want.view(np.uint8))

    with np.errstate(all="ignore"):
        run(size, body)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_allreduce_in_a_region(size: int) -> None:
    stride = 200_000
    memory = mmap.mmap(-1, size * stride)

    def body(rank: int, arena: Any) -> None:
        assert arena.register(mmap.mmap(-1, size * 64), 64) == 1
        assert arena.register(memory, stride) == 2
        for offset in (0, 4, 60, 4096):
            for count in (1, 5, 300, 20_000, 40_001):
                inputs = [data_of(np.dtype(np.float32), count, r) for r in range(size)]
                out = np.frombuffer(memory, np.float32, count, rank * stride + offset)
                out[:] = inputs[rank]
                assert arena.allreduce(out, out, FLOAT32, SUM, 1.0, size, 1.0, 3) == 0
                same_bits(out, reduced(inputs, ReduceOp.AVERAGE, size))
        del out  # it keeps the mapping
        arena.unregister(2)
        with pytest.raises(ValueError, match="no region"):
            arena.unregister(2)
        assert arena.register(memory, stride) == 3

    run(size, body)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_region_on_some_ranks_only_takes_the_way_through_slots(size: int) -> None:
    stride = 200_000
    memory = mmap.mmap(-1, size * stride)

    def body(rank: int, arena: Any) -> None:
        arena.register(memory, stride)
        for count in (300, 40_001):
            inputs = [data_of(np.dtype(np.float32), count, r) for r in range(size)]
            for offsets in (
                [0] + [None] * (size - 1),
                [None] + [0] * (size - 1),
                list(range(0, 4 * size, 4)),
            ):
                offset = offsets[rank]
                if offset is None:
                    out = inputs[rank].copy()
                else:
                    out = np.frombuffer(memory, np.float32, count, rank * stride + offset)
                    out[:] = inputs[rank]
                assert arena.allreduce(out, out, FLOAT32, SUM, 1.0, 1, 1.0, 3) == 0
                same_bits(out, reduced(inputs, ReduceOp.SUM))
                assert arena.barrier(1) == 0

    run(size, body)


def test_results_do_not_depend_on_the_path() -> None:
    """An element's sum is the same in a message of one round, of many, and in a region."""
    size, count = 4, 30_000
    memory = mmap.mmap(-1, size * 4 * count)

    def body(rank: int, arena: Any) -> None:
        arena.register(memory, 4 * count)
        source = data_of(np.dtype(np.float16), count, rank)
        whole = source.copy()
        arena.allreduce(whole, whole, DTYPE_CODES[whole.dtype], SUM, 1.0, 4, 1.0, 1)
        direct = np.frombuffer(memory, np.float16, count, rank * 4 * count)
        direct[:] = source
        arena.allreduce(direct, direct, DTYPE_CODES[whole.dtype], SUM, 1.0, 4, 1.0, 1)
        same_bits(direct.copy(), whole)
        for start in range(0, count, 997):
            part = source[start : start + 997].copy()
            arena.allreduce(part, part, DTYPE_CODES[whole.dtype], SUM, 1.0, 4, 1.0, 1)
            same_bits(part, whole[start : start + 997])

    run(size, body)


def test_large_results_at_odd_addresses() -> None:
    """From 16 MiB on, an all-reduce out of place and an all-gather write past the caches."""
    size, count = 2, (16 << 20) + 1001

    def body(rank: int, arena: Any) -> None:
        inputs = [np.resize(np.arange(251 + r, dtype=np.uint8), count) for r in range(size)]
        out = np.zeros(count + 5, np.uint8)
        target = out[3:-2]
        assert arena.allreduce(inputs[rank], target, 1, SUM, 1.0, 1, 1.0, 3) == 0
        same_bits(target, inputs[0] + inputs[1])
        both = np.zeros(2 * count + 1, np.uint8)
        assert arena.allgather(inputs[rank], both[1:], (count, count), 4) == 0
        same_bits(both[1:], np.concatenate(inputs))
        assert not out[:3].any() and not out[-2:].any() and not both[:1].any()

    run(size, body)


# ------------------------------------------------------------------------------ other collectives


@pytest.mark.parametrize("spin", SPINS)
@pytest.mark.parametrize("size", SIZES)
def test_broadcast_from_every_root(size: int, spin: int) -> None:
    def body(rank: int, arena: Any) -> None:
        for root in range(size):
            for count in (0, 1, SLOT - 1, SLOT, SLOT + 1, 10 * SLOT + 3, 100_001):
                want = data_of(np.dtype(np.uint8), count, root)
                buffer = want.copy() if rank == root else np.zeros(count, np.uint8)
                assert arena.broadcast(buffer, root, 5) == 0
                same_bits(buffer, want)
        assert arena.broadcast(b"read-only" if rank == 0 else bytearray(9), 0, 5) == 0

    run(size, body, spin=spin)


@pytest.mark.parametrize("size", SIZES)
def test_allgather_of_unequal_lengths(size: int) -> None:
    def body(rank: int, arena: Any) -> None:
        for unit in (0, 1, 100, SLOT, 3 * SLOT + 1):
            counts = tuple(unit * ((r + 1) % 3) + r for r in range(size))
            inputs = [data_of(np.dtype(np.uint8), counts[r], r) for r in range(size)]
            out = np.zeros(sum(counts), np.uint8)
            assert arena.allgather(inputs[rank], out, counts, 5) == 0
            same_bits(out, np.concatenate(inputs))
            out[:] = 0
            start = sum(counts[:rank])
            out[start : start + counts[rank]] = inputs[rank]
            assert arena.allgather(out[start : start + counts[rank]], out, counts, 5) == 0
            same_bits(out, np.concatenate(inputs))

    run(size, body)


@pytest.mark.parametrize("size", SIZES)
def test_reducescatter_of_unequal_shares(size: int) -> None:
    def body(rank: int, arena: Any) -> None:
        for dtype in (np.dtype(np.int16), np.dtype(np.float16), np.dtype(np.float64)):
            for unit in (0, 1, 100, SLOT, SLOT + 1):
                counts = tuple(unit * ((r + 1) % 3) + r for r in range(size))
                inputs = [data_of(dtype, sum(counts), r) for r in range(size)]
                start = sum(counts[:rank])
                own = slice(start, start + counts[rank])
                want = reduced(inputs, ReduceOp.SUM, 1, 1.0, 0.5)[own]
                out = np.zeros(counts[rank], dtype)
                arguments = (counts, DTYPE_CODES[dtype], SUM, 1.0, 1, 0.5, 2)
                assert arena.reducescatter(inputs[rank], out, *arguments) == 0
                same_bits(out, want)
                source = inputs[rank].copy()
                assert arena.reducescatter(source, source[own], *arguments) == 0
                same_bits(source[own], want)

    run(size, body)


@pytest.mark.parametrize("size", SIZES)
def test_alltoall_of_unequal_parts(size: int) -> None:
    def body(rank: int, arena: Any) -> None:
        for unit in (0, 1, 100, SLOT, 2 * SLOT + 1):
            counts = [[unit * ((a + 2 * b) % 3) + a + b for b in range(size)] for a in range(size)]
            largest = max(map(max, counts))
            inputs = [data_of(np.dtype(np.uint8), sum(counts[a]), a) for a in range(size)]
            parts = [np.split(inputs[a], np.cumsum(counts[a])[:-1])[rank] for a in range(size)]
            received = tuple(counts[a][rank] for a in range(size))
            out = np.zeros(sum(received), np.uint8)
            status = arena.alltoall(inputs[rank], out, tuple(counts[rank]), received, largest, 5)
            assert status == 0
            same_bits(out, np.concatenate(parts))

    run(size, body)


@pytest.mark.parametrize("size", SIZES)
def test_exchange_of_byte_strings(size: int) -> None:
    def body(rank: int, arena: Any) -> None:
        for base in (b"", b"x", b"abc" * 1000):
            got = arena.exchange(base + bytes(rank), 4)
            assert got == [base + bytes(r) for r in range(size)]
        with pytest.raises(ValueError, match="does not fit"):
            arena.exchange(bytes(SLOT + 1), 4)
        assert arena.exchange(bytes(SLOT), 4) == [bytes(SLOT)] * size

    run(size, body)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_mismatch_is_seen_by_all_and_the_arena_stays_usable(size: int) -> None:
    def body(rank: int, arena: Any) -> None:
        odd = np.full(70_000, rank, np.float32)
        for count in (1, 70_000):
            for odd_rank in range(size):
                signature = 1 if rank == odd_rank else 2
                out = odd[: count + rank].copy()  # the lengths differ as well
                assert arena.allreduce(out, out, FLOAT32, SUM, 1.0, 1, 1.0, signature) == 1
                same_bits(out, odd[: count + rank])
                assert arena.broadcast(out, rank % 2, signature) == 1
                assert arena.allgather(out, out, _counts(size, rank, out.nbytes), signature) == 1
                assert arena.barrier(signature) == 1
                assert arena.exchange(b"?", signature) is None
                total = np.ones(count, np.float32)
                assert arena.allreduce(total, total, FLOAT32, SUM, 1.0, 1, 1.0, 7) == 0
                assert (total == size).all()

    run(size, body)


def _counts(size: int, rank: int, own: int) -> tuple[int, ...]:
    return tuple(own if r == rank else 0 for r in range(size))


@pytest.mark.parametrize("spin", SPINS)
def test_a_killed_peer_is_an_error_on_the_others(spin: int) -> None:
    def body(rank: int, arena: Any) -> None:
        assert arena.barrier(1) == 0
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(_native.ArenaError, match="local rank 1 died"):
            arena.allreduce(
                np.zeros(50_000, "f4"), np.zeros(50_000, "f4"), FLOAT32, SUM, 1.0, 1, 1.0, 7
            )
        assert arena.aborted
        with pytest.raises(_native.ArenaError, match="local rank 1 died"):
            arena.barrier(1)

    run(3, body, spin=spin, killed=(1,))


def test_a_peer_that_posted_and_then_died_has_done_its_part() -> None:
    def body(rank: int, arena: Any) -> None:
        if rank == 0:
            time.sleep(0.3)
        assert arena.exchange(bytes([rank]), 1) == [b"\0", b"\1"]
        if rank == 0:
            with pytest.raises(_native.ArenaError, match="died"):
                arena.barrier(1)

    run(2, body)


def test_a_forked_child_is_no_rank() -> None:
    """What it asks for is an error, and changes nothing for its parent."""

    def body(_rank: int, arena: Any) -> None:
        child = os.fork()
        if not child:
            try:
                arena.barrier(1)
            except RuntimeError as exc:
                arena.abort()
                os._exit("forked child" not in str(exc))
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        for number in range(3):
            assert arena.barrier(number) == 0

    run(2, body)


def test_a_zombie_counts_as_dead() -> None:
    memory = shared(2)
    pid = os.fork()
    if pid == 0:
        left_open = _native.Arena(memory, 1, 2, SLOT, 0)
        os._exit(left_open.rank - 1)
    arena = _native.Arena(memory, 0, 2, SLOT, 0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    with pytest.raises(_native.ArenaError, match="local rank 1 died"):
        arena.barrier(1)
    os.waitpid(pid, 0)


def test_a_peer_that_closed_is_an_error() -> None:
    def body(rank: int, arena: Any) -> None:
        if rank == 1:
            arena.close()
            with pytest.raises(_native.ArenaError, match="is closed"):
                arena.barrier(1)
            arena.close()
            time.sleep(0.5)
        else:
            with pytest.raises(_native.ArenaError, match="local rank 1 closed"):
                arena.barrier(1)

    run(3, body)


def test_an_abort_ends_the_waits_of_others() -> None:
    def body(rank: int, arena: Any) -> None:
        if rank == 2:
            time.sleep(0.2)
            arena.abort()
            time.sleep(0.5)
        with pytest.raises(_native.ArenaError, match="local rank 2 gave up"):
            arena.barrier(1)

    run(3, body)


@pytest.mark.parametrize("spin", SPINS)
def test_ctrl_c_ends_a_wait_and_aborts_the_others(spin: int) -> None:
    def body(rank: int, arena: Any) -> None:
        if rank == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                arena.barrier(1)
            time.sleep(0.5)
        elif rank == 1:
            with pytest.raises(_native.ArenaError, match="local rank 0 gave up"):
                arena.barrier(1)
        else:  # never calls, but lives
            time.sleep(1.0)

    run(3, body, spin=spin)


def test_signals_that_do_not_raise_do_not_end_a_wait() -> None:
    def body(rank: int, arena: Any) -> None:
        ticks: list[int] = []
        if rank == 0:
            signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        else:
            time.sleep(0.5)
        assert arena.barrier(1) == 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert rank != 0 or len(ticks) > 3

    run(2, body)


def test_a_fork_of_a_rank_does_not_close_it() -> None:
    def body(_rank: int, arena: Any) -> None:
        pid = os.fork()
        if pid == 0:
            arena.close()
            os._exit(0)
        os.waitpid(pid, 0)
        assert arena.barrier(1) == 0

    run(2, body)


def test_bad_arguments_raise_before_anything_is_published() -> None:
    def body(rank: int, arena: Any) -> None:
        if rank == 0:
            _try_bad_arguments(arena)
        assert arena.barrier(1) == 0

    run(2, body)


def _try_bad_arguments(arena: Any) -> None:
    x, y = np.zeros(10, np.float32), np.zeros(9, np.float32)
    recipe = (FLOAT32, SUM, 1.0, 1, 1.0, 1)
    bad: list[tuple[Any, tuple[Any, ...], type[Exception]]] = [
        (arena.allreduce, (x, y, *recipe), ValueError),
        (arena.allreduce, (x[1:], x[:-1], *recipe), ValueError),
        (arena.allreduce, (x, x, 99, SUM, 1.0, 1, 1.0, 1), ValueError),
        (arena.allreduce, (x, x, FLOAT32, 2, 1.0, 1, 1.0, 1), ValueError),
        (arena.allreduce, (x, x, FLOAT32, SUM, 1.0, 0, 1.0, 1), ValueError),
        (arena.allreduce, (x, x, 0, SUM, 2.0, 1, 1.0, 1), TypeError),
        (arena.allreduce, (x, x, 13, int(ReduceOp.MAX), 1.0, 1, 1.0, 1), TypeError),
        (arena.allreduce, (x, x, FLOAT32, SUM, 1.0, 1, 1.0, -1), (OverflowError)),
        (arena.allreduce, (x, b"0" * 40, *recipe), BufferError),
        (arena.allreduce, (x, x), TypeError),
        (arena.broadcast, (x, 2, 1), ValueError),
        (arena.broadcast, (x, -1, 1), ValueError),
        (arena.broadcast, (b"0", 1, 1), BufferError),
        (arena.allgather, (x, y, (40, 0), 1), ValueError),
        (arena.allgather, (x, y, (36, 0), 1), ValueError),
        (arena.allgather, (y, y, [36, 0], 1), TypeError),
        (arena.allgather, (y, y, (36,), 1), TypeError),
        (arena.reducescatter, (x, y, (9, 1, 0), *recipe), TypeError),
        (arena.reducescatter, (x, y, (8, 2), *recipe), ValueError),
        (arena.reducescatter, (x, x[:5], (6, 4), *recipe), ValueError),
        (arena.alltoall, (x, y, (20, 20), (16, 20), 20, 1), ValueError),
        (arena.alltoall, (x, x.copy(), (20, 20), (20, 20), 19, 1), ValueError),
        (arena.alltoall, (x, x, (20, 20), (20, 20), 20, 1), ValueError),
        (arena.register, (bytearray(127), 64), ValueError),
        (arena.register, (bytearray(127), 0), ValueError),
        (arena.unregister, (0,), ValueError),
    ]
    for function, arguments, error in bad:
        with pytest.raises(error):
            function(*arguments)


def test_bad_construction() -> None:
    memory = shared(2)
    for arguments in (
        (memory, 2, 2, SLOT, 0),
        (memory, 0, 0, SLOT, 0),
        (memory, 0, 3, SLOT, 0),
        (memory, 0, 2, 127, 0),
    ):
        with pytest.raises(ValueError):
            _native.Arena(*arguments)
    with memoryview(memory) as whole, whole[1:] as odd, pytest.raises(ValueError, match="aligned"):
        _native.Arena(odd, 0, 1, SLOT, 0)
    arena = _native.Arena(memory, 1, 2, SLOT, 9)
    assert (arena.rank, arena.size, arena.slot_bytes, arena.spin_iterations) == (1, 2, SLOT, 9)
    arena.spin_iterations = 0
    assert (arena.spin_iterations, arena.aborted) == (0, False)
    arena.close()
    memory.close()  # nothing is held any more


# ------------------------------------------------------------------------------------------ stress


@pytest.mark.parametrize("spin", SPINS)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_random_operations_with_delays_and_more_ranks_than_cores(size: int, spin: int) -> None:
    stride = 64_000
    memory = mmap.mmap(-1, size * stride)

    def body(rank: int, arena: Any) -> None:
        same, own = random.Random(17), random.Random(rank)
        arena.register(memory, stride)
        for step in range(400):
            kind, count = same.choice("rrrdbgme"), same.choice((1, 33, 500, 3000, 12_000))
            if own.random() < 0.05:
                time.sleep(own.random() * 0.003)
            inputs = [data_of(np.dtype(np.float32), count, r, step) for r in range(size)]
            out = inputs[rank].copy()
            if kind == "d":
                out = np.frombuffer(memory, np.float32, count, rank * stride)
                out[:] = inputs[rank]
            if kind in "rd":
                assert arena.allreduce(out, out, FLOAT32, SUM, 1.0, 1, 1.0, step) == 0
                same_bits(out, reduced(inputs, ReduceOp.SUM))
            elif kind == "b":
                assert arena.broadcast(out, step % size, step) == 0
                same_bits(out, inputs[step % size])
            elif kind == "g":
                everyones = np.zeros(count * size, np.float32)
                assert arena.allgather(out, everyones, (4 * count,) * size, step) == 0
                same_bits(everyones, np.concatenate(inputs))
            elif kind == "m":
                assert arena.barrier(step if rank else step + 1) == 1
            else:
                assert arena.exchange(bytes([rank]), step) == [bytes([r]) for r in range(size)]

    run(size, body, spin=spin)


def test_the_round_counter_wraps_around() -> None:
    """Rounds are compared modulo 2^32.  An arena goes on from the counters that it finds."""
    size = 3
    memory = shared(size)
    for rank in range(size):  # the first word of the rank's control line
        memory[128 * (1 + rank) : 128 * (1 + rank) + 4] = (2**32 - 50).to_bytes(4, sys.byteorder)

    def body(rank: int, arena: Any) -> None:
        for step in range(200):
            out = np.full(3000, rank, np.float32)
            assert arena.allreduce(out, out, FLOAT32, SUM, 1.0, 1, 1.0, step) == 0
            assert (out == 3).all()
            assert arena.broadcast(out, step % size, step) == 0

    run(size, body, memory=memory)
    assert int.from_bytes(memory[128:132], sys.byteorder) < 2**31
