"""Named operations in an order of its own on every rank: exact results, or the right error.

Everything follows from one seed, which stands in the name of each test; TEST_SEED=... runs the same
again.  Values are small whole numbers, exact in every dtype, so that each rank can compute what
every rank must get.
"""

import os
import random
import threading
import time
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

import hvdkit as hvd
from hvdkit import collectives
from hvdkit.api import communicator, context
from hvdkit.collectives.reducescatter import rows_per_rank
from hvdkit.dtypes import bfloat16

RANK, SIZE = hvd.rank(), hvd.size()
SEED = hvd.broadcast_object(int(os.environ.get("TEST_SEED", random.randrange(10**6))))
pytestmark = pytest.mark.parametrize("seed", [SEED])
several = pytest.mark.skipif(SIZE == 1, reason="one rank has nobody to wait for")

DTYPES = [np.uint8, np.int32, np.int64, np.float16, bfloat16, np.float32, np.float64, np.complex64]
KINDS = ["allreduce", "grouped", "allgather", "broadcast", "alltoall", "reducescatter", "barrier"]
COLUMNS = 3
DIVISIBLE = 60  # by every number of ranks up to 6; four times and more of it fit into any mantissa

try:
    import torch

    import hvdkit.torch as hvd_torch
except ImportError:
    torch = None


@dataclass(frozen=True)
class Task:
    """An operation as all ranks of a set start it.

    Args:
        name: under which it is matched.
        kind: one of `KINDS`.
        members: of all ranks, those that take part.
        rows: of the array on each of the members.
        op: of reductions.
        root: among all ranks.
        through_torch: whether tensors are given to `hvdkit.torch`.
        data: seed of the contents.
    """

    name: str
    kind: str
    members: tuple[int, ...]
    dtype: type
    rows: tuple[int, ...]
    op: str = "Sum"
    root: int = 0
    through_torch: bool = False
    data: int = 0

    def given(self, rank):
        """Return the arrays with which `rank` takes part: one, or three if grouped."""
        place = self.members.index(rank)
        shape = (self.rows[place], COLUMNS)
        base = np.arange(shape[0] * COLUMNS).reshape(shape)
        count = 3 if self.kind == "grouped" else 1
        factors = (1, 3, 2)[:count]
        unit = DIVISIBLE if self.op == "Average" else 1
        return [((base * f + self.data + rank) % 4 * unit).astype(self.dtype) for f in factors]

    def splits(self, rank):
        """Return how many rows `rank` sends to each of the members."""
        place, size = self.members.index(rank), len(self.members)
        counts = [self.rows[place] // size] * size
        counts[(place + self.data) % size] += self.rows[place] % size
        return counts

    def wanted(self, rank):
        """Return what `rank` must get: arrays as a list."""
        everyone = [self.given(member) for member in self.members]
        if self.kind in ("allreduce", "grouped"):
            return [combined(self.op, theirs) for theirs in zip(*everyone, strict=True)]
        firsts = [theirs[0] for theirs in everyone]
        place = self.members.index(rank)
        if self.kind == "allgather":
            return [np.concatenate(firsts)]
        if self.kind == "broadcast":
            return [firsts[self.members.index(self.root)]]
        if self.kind == "alltoall":
            pieces = []
            for member, theirs in zip(self.members, firsts, strict=True):
                ends = np.cumsum(self.splits(member))
                pieces.append(theirs[ends[place] - self.splits(member)[place] : ends[place]])
            return [np.concatenate(pieces)]
        if self.kind == "reducescatter":
            ends = np.cumsum(rows_per_rank(self.rows[0], len(self.members)))
            begin = ends[place - 1] if place else 0
            return [combined(self.op, firsts)[begin : ends[place]]]
        return []


def combined(op, arrays, *, divisor=None):
    """Return what `op` makes of `arrays`, one a rank; an average is over `divisor` ranks."""
    stacked = np.stack(arrays)
    if op == "Average":
        return (stacked.sum(0) / (divisor or len(arrays))).astype(arrays[0].dtype)
    function = {"Sum": np.add, "Min": np.minimum, "Max": np.maximum}[op]
    return function.reduce(stacked, dtype=arrays[0].dtype)


@pytest.fixture(scope="module")
def sets():
    """Process sets by their ranks: disjoint, overlapping, of one rank; all ranks is None."""
    wanted = [tuple(range(0, SIZE, 2)), tuple(range(1, SIZE, 2)), (0, 1), tuple(range(1, SIZE))]
    chosen = [ranks for ranks in dict.fromkeys(wanted) if 0 < len(ranks) < SIZE]
    known = {ranks: hvd.add_process_set(list(ranks)) for ranks in chosen if SIZE > 2}
    yield {tuple(range(SIZE)): None} | known
    for process_set in known.values():
        assert hvd.remove_process_set(process_set)


def draw(rng, name, members, kinds=KINDS):
    """Draw a task of the members."""
    kind = rng.choice(kinds)
    most = rng.choice([3, 40, 40, 400, 8000])  # up to some 100 KiB
    rows = rng.choice([0, 1, len(members), rng.randrange(most)])
    if kind == "alltoall" or kind == "allgather":
        each = tuple(rng.choice([rows, rng.randrange(most)]) for _ in members)
    else:
        each = (rows,) * len(members)
    dtype = rng.choice(DTYPES)
    ops = ["Sum"]
    ops += ["Average"] if dtype is not np.uint8 else []
    ops += ["Min", "Max"] if dtype is not np.complex64 else []
    return Task(
        name=name,
        kind=kind,
        members=members,
        dtype=dtype,
        rows=each,
        op=rng.choice(ops),
        root=rng.choice(members),
        through_torch=torch is not None and kind != "barrier" and rng.random() < 0.4,
        data=rng.randrange(100),
    )


class Started:
    """An operation of this rank under way."""

    def __init__(self, task, sets):
        self.task = task
        self.process_set = sets[task.members]
        self.given = [] if task.kind == "barrier" else task.given(RANK)
        self.before = [array.copy() for array in self.given]
        self.targets = [np.empty_like(array) for array in self.given]
        self.handle = self._with_torch() if task.through_torch else self._with_numpy()

    def _with_numpy(self):
        task, among = self.task, communicator(self.process_set)
        name, how = task.name, {"name": task.name, "algorithm": "auto"}
        if task.kind in ("allreduce", "grouped"):
            pairs = list(zip(self.given, self.targets, strict=True))
            return among.allreduce_async(pairs, name=name, op=task.op, result=self.targets)
        array = self.given[0] if self.given else None

        def work(group):
            if task.kind == "barrier":
                return collectives.barrier(group, **how)
            if task.kind == "allgather":
                return [collectives.allgather(group, array, **how)]
            if task.kind == "alltoall":
                return [collectives.alltoall(group, array, task.splits(RANK), **how)[0]]
            if task.kind == "reducescatter":
                scale = {"prescale": 1.0, "postscale": 1.0}
                return [collectives.reducescatter(group, array, op=task.op, **scale, **how)]
            target = array.copy()
            root = task.members.index(task.root)
            collectives.broadcast(group, target, root=root, **how)
            return [target]

        ragged = task.kind in ("allgather", "alltoall")
        parts = [("root_rank", str(task.root))] if task.kind == "broadcast" else []
        if task.kind == "reducescatter":
            parts = [("op", task.op)]
        return among.start(task.kind, self.given, work, name=name, parts=parts, ragged=ragged)

    def _with_torch(self):
        task, tensors = self.task, [tensor_of(array) for array in self.given]
        how = {"name": task.name} | ({"process_set": self.process_set} if self.process_set else {})
        if task.kind == "grouped":
            return hvd_torch.grouped_allreduce_async(tensors, op=reduction(task.op), **how)
        if task.kind in ("allreduce", "reducescatter"):
            function = getattr(hvd_torch, f"{task.kind}_async")
            return function(tensors[0], op=reduction(task.op), **how)
        if task.kind == "broadcast":
            return hvd_torch.broadcast_async(tensors[0], task.root, **how)
        if task.kind == "alltoall":
            return hvd_torch.alltoall_async(tensors[0], task.splits(RANK), **how)
        return hvd_torch.allgather_async(tensors[0], **how)

    def finish(self):
        """Wait for the operation, and check its result and that the input is as it was."""
        found = self.handle.wait(60)
        if found is None:
            found = []
        if self.task.through_torch:
            if self.task.kind == "alltoall":
                found = found[0]
            found = [array_of(t) for t in (found if isinstance(found, list) else [found])]
        wanted = self.task.wanted(RANK)
        assert len(found) == len(wanted), self.task
        for mine, right in zip(found, wanted, strict=True):
            assert mine.dtype == right.dtype, self.task
            np.testing.assert_array_equal(mine, right, err_msg=str(self.task))
        for now, then in zip(self.given, self.before, strict=True):
            np.testing.assert_array_equal(now, then)


def reduction(op):
    return getattr(hvd, op)


def tensor_of(array):
    if array.dtype == bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_of(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(bfloat16)
    return tensor.numpy()


@cache
def mine():
    """Return this rank's own randomness: orders and delays."""
    return random.Random(SEED * 1000 + RANK)


def dawdle():
    if mine().random() < 0.05:
        time.sleep(mine().random() * 0.004)


def shuffled(items):
    return mine().sample(items, len(items))


def synchronous(number):
    """Make a synchronous call, the same on all ranks, and check it."""
    kind = number % 4
    if kind == 0:
        x = np.full(1 + 700 * (number % 50), RANK + number)
        total = hvd.allreduce(x, op=hvd.Sum, name=f"sync.{number}")
        assert (total == sum(range(SIZE)) + number * SIZE).all()
    elif kind == 1:
        assert hvd.allgather(np.arange(RANK + 1)).size == SIZE * (SIZE + 1) // 2
    elif kind == 2:
        assert hvd.broadcast(np.array([RANK]), number % SIZE).tolist() == [number % SIZE]
    else:
        hvd.barrier()


def test_every_rank_in_its_own_order(seed, sets):
    """Names are used again in every round, while other ranks may still be in the one before."""
    rng = random.Random(seed)
    synchronous_calls = 0
    for _ in range(16):
        tasks = [
            draw(rng, f"task.{number}", members)
            for members in sets
            for number in range(60 if len(members) == SIZE else 20)
        ]
        here = shuffled([task for task in tasks if RANK in task.members])
        calls = set(mine().sample(range(len(here)), 5))
        started = []
        for number, task in enumerate(here):
            started.append(Started(task, sets))
            dawdle()
            if number in calls:
                synchronous(synchronous_calls)
                synchronous_calls += 1
        for each in shuffled(started):
            dawdle()
            each.finish()


def test_several_threads_start_operations(seed, sets):
    """Each thread waits for its own, and the main thread makes synchronous calls meanwhile."""
    rng = random.Random(seed + 1)
    batches = [
        [draw(rng, f"thread.{t}.{n}", tuple(range(SIZE))) for n in range(15)] for t in range(3)
    ]
    failures = []

    def run(tasks):
        try:
            for each in shuffled([Started(task, sets) for task in tasks]):
                each.finish()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(shuffled(batch),)) for batch in shuffled(batches)]
    for thread in threads:
        thread.start()
    for number in range(20):
        synchronous(number)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures, failures


def test_uneven_numbers_of_allreduces_and_join(seed, sets):
    """A rank that has joined adds nothing, in whatever process set and of whatever kind."""
    rng = random.Random(seed + 2)
    for turn in range(4):
        # Only one of the two kinds may need somebody to join: a rank that waits for one of the
        # first kind does not join, for which another may wait in one of the second.
        counts = [rng.randrange(12) if turn % 2 else 12 for _ in range(SIZE)]
        in_order = [5 if turn % 2 else rng.randrange(6) for _ in range(SIZE)]
        tasks = []
        for members in sets:
            for number in range(12):
                task = draw(rng, f"uneven.{number}", members, ["allreduce", "grouped"])
                tasks.append(task)
        by_set = {members: [t for t in tasks if t.members == members] for members in sets}
        here = [t for m in sets if RANK in m for t in by_set[m][: counts[RANK]]]
        started = [Started(task, sets) for task in shuffled(here)]
        for number in range(in_order[RANK]):
            there = [rank for rank in range(SIZE) if in_order[rank] > number]
            total = hvd.allreduce(np.full(500 * number, RANK), op=hvd.Sum)
            assert (total == sum(there)).all()
        for each in shuffled(started):
            number = int(each.task.name.split(".")[1])
            there = [rank for rank in each.task.members if counts[rank] > number]
            found = each.handle.wait(60)
            if each.task.through_torch:
                found = [array_of(t) for t in (found if isinstance(found, list) else [found])]
            everyone = zip(*[each.task.given(rank) for rank in there], strict=True)
            for result, theirs in zip(found, everyone, strict=True):
                wanted = combined(each.task.op, theirs, divisor=len(each.task.members))
                np.testing.assert_array_equal(result, wanted, f"{each.task} {counts}")
            dawdle()
        last = hvd.join()
        assert (hvd.allgather(np.array([last])) == last).all()
        assert 0 <= last < SIZE


# Errors among operations that are all right


def changed(rng, task, how):
    """Return `task` with what one rank does differently."""
    if how in ("shape", "shapes"):
        return replace(task, rows=(task.rows[0] + 1,) * len(task.rows))
    if how == "dtype":
        return replace(task, dtype=np.float32 if task.dtype is np.float64 else np.float64)
    if how == "op":
        return replace(task, op="Sum" if task.op == "Average" else "Average")
    if how == "root":
        return replace(task, root=(task.root + 1) % SIZE)
    if how == "kind":
        others = [kind for kind in ("allreduce", "allgather", "broadcast") if kind != task.kind]
        return replace(task, kind=rng.choice(others))
    assert how == "grouped"
    return replace(task, kind="grouped")


MISTAKES = {
    "shape": (
        ["allreduce", "grouped", "broadcast", "reducescatter"],
        "disagree on the (shape|ten)",
    ),
    "dtype": (["allreduce", "allgather", "alltoall"], "disagree on the dtype"),
    "op": (["allreduce", "reducescatter"], "disagree on the op"),
    "root": (["broadcast"], "disagree on the root_rank"),
    "grouped": (["allreduce"], "disagree on the "),
    "kind": (["allreduce", "allgather", "broadcast", "barrier"], "different collectives"),
}


@several
@pytest.mark.parametrize("how", MISTAKES)
def test_one_mistake_among_many(seed, sets, how):
    """All ranks of the set get the error, and nothing else is touched by it."""
    rng = random.Random(seed + 3)
    kinds, message = MISTAKES[how]
    for turn in range(4):
        members = rng.choice([ranks for ranks in sets if len(ranks) > 1])
        tasks = [draw(rng, f"right.{n}", ranks) for ranks in sets for n in range(5)]
        wrong = draw(rng, "wrong", members if how != "root" else tuple(range(SIZE)), kinds)
        wrong = replace(wrong, through_torch=False)
        odd = rng.choice(wrong.members)
        other = changed(rng, wrong, how)
        here = [task for task in tasks if RANK in task.members]
        here += [other if odd == RANK else wrong] if RANK in wrong.members else []
        started = [Started(task, sets) for task in shuffled(here)]
        for each in shuffled(started):
            if each.task.name == "wrong":
                with pytest.raises(hvd.MismatchError, match=message) as error:
                    each.handle.wait(60)
                assert "'wrong'" in str(error.value)
                assert f"rank {odd}:" in str(error.value), turn
            else:
                each.finish()
        synchronous(turn)


@several
def test_calls_that_one_rank_cannot_make(seed, sets):
    """At once an error there, and what it says on the others; then the name is free again."""
    everyone = tuple(range(SIZE))
    odd = random.Random(seed + 4).randrange(SIZE)
    ordinary = Task("x", "allreduce", everyone, np.float32, (4,) * SIZE)

    def refused(start, error):
        handle = None
        with pytest.raises(error if odd == RANK else hvd.MismatchError) as raised:
            handle = start()
            handle.wait(60)
        assert (handle is None) == (odd == RANK)
        return str(raised.value)

    dates = np.zeros(3, "datetime64[s]") if odd == RANK else np.zeros(3, np.float32)
    message = refused(
        lambda: communicator().allreduce_async([(dates, dates)], name="x"), hvd.UnsupportedError
    )
    assert "datetime64" in message
    Started(ordinary, sets).finish()
    message = refused(
        lambda: communicator().allreduce_async(
            [(np.zeros(3), np.zeros(3))], name="x", op="median" if odd == RANK else "Sum"
        ),
        hvd.ArgumentError,
    )
    assert "median" in message
    Started(ordinary, sets).finish()


@several
def test_splits_that_do_not_fit(seed, sets):
    """Seen only once the operation has begun, and still by all."""
    odd = random.Random(seed + 5).randrange(SIZE)
    x = np.zeros((SIZE, 2), np.float32)
    splits = [2, *[1] * (SIZE - 1)] if odd == RANK else [1] * SIZE
    for turn in range(3):
        task = Task(f"right.{turn}", "alltoall", tuple(range(SIZE)), np.float32, (5,) * SIZE)
        handle = communicator().start(
            "alltoall",
            [x],
            lambda group: collectives.alltoall(group, x, splits, name="x", algorithm="auto"),
            name="x",
            ragged=True,
        )
        other = Started(task, sets)
        with pytest.raises(hvd.ArgumentError if odd == RANK else hvd.MismatchError) as error:
            handle.wait(60)
        assert f"sum up to {SIZE + 1}, but the array has {SIZE} rows" in str(error.value)
        other.finish()


@several
def test_a_name_that_is_used_twice(seed, sets):
    """The first use is all right everywhere, the second is refused, and then the name is free."""
    everyone = tuple(range(SIZE))
    odd = random.Random(seed + 6).randrange(SIZE)
    for turn in range(5):
        task = Task("twice", "allreduce", everyone, np.int64, (turn,) * SIZE, data=turn)
        if odd == RANK:
            first = Started(task, sets)
            with pytest.raises(hvd.ArgumentError, match="'twice': the name is in use"):
                Started(task, sets)
            hvd.barrier()  # until here nobody else had started the first
            first.finish()
        else:
            hvd.barrier()
            Started(task, sets).finish()
            with pytest.raises(hvd.MismatchError, match="the name is in use") as error:
                Started(task, sets).handle.wait(60)
            assert f"rank {odd}:" in str(error.value)
        Started(replace(task, data=turn + 1), sets).finish()


# Process sets and channels that come and go


@pytest.mark.skipif(SIZE < 3, reason="there are process sets from three ranks on")
def test_a_process_set_goes_only_when_nothing_is_under_way_in_it(seed, sets):
    """Whoever had started something in it would wait for ever.  (In the end, `sets` removes it.)"""
    odd = seed % 2
    process_set, x = sets[0, 1], np.ones(3)
    if odd == RANK:
        handle = communicator(process_set).allreduce_async([(x, x)], name="x")
    hvd.barrier()
    with pytest.raises(hvd.ArgumentError, match=f"are under way in it on rank {odd};"):
        hvd.remove_process_set(process_set)
    if process_set.included():
        if odd != RANK:
            handle = communicator(process_set).allreduce_async([(x, x)], name="x")
        handle.wait(60)


def test_a_channel_has_one_key_on_all_its_ranks_and_no_other_has_it(seed, sets):
    """However many other channels a rank is in: by the key the watch tells who is late where."""
    rng = random.Random(seed + 8)
    keys = []
    for _ in range(6):
        members = rng.choice(list(sets))
        if RANK in members:
            channel = context().channels.beside(communicator(sets[members]), "gradients")
            keys.append((channel.key, members))
            if rng.random() < 0.5:
                context().channels.release(channel)
        else:
            rng.random()
    by_key = {}
    for rank, theirs in enumerate(hvd.allgather_object(keys)):
        for key, members in theirs:
            assert by_key.setdefault(key, {"members": members, "ranks": []})["members"] == members
            by_key[key]["ranks"].append(rank)
    assert all(tuple(found["ranks"]) == found["members"] for found in by_key.values()), by_key
