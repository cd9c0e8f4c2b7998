"""Packing: several all-reduces in one message, with the results of each by itself."""

import numpy as np
import pytest

from core.worlds import in_group
from hvdkit.dtypes import Adasum, Average, Max, Min, Product, Sum, bfloat16
from hvdkit.engine import fusion
from hvdkit.engine.bucketing import ALIGNMENT
from hvdkit.engine.fusion import Packer

SHAPES = [(3,), (2, 5), (), (0, 4), (1,), (16,), (17,), (300,)]
DTYPES = ["f4", "f8", "f2", bfloat16, "i4", "u1", "?", "c8"]


class Counting:
    """Notes what is all-reduced."""

    def __init__(self, monkeypatch):
        self.sizes = []
        allreduce = fusion.allreduce

        def noting(group, source, target, **how):
            if group.rank == 0:
                self.sizes.append(source.size)
            return allreduce(group, source, target, **how)

        monkeypatch.setattr(fusion, "allreduce", noting)


def how(op=Sum, **changes):
    return {"op": op, "prescale": 1.0, "postscale": 1.0, "algorithm": "auto"} | changes


def pairs_of(rank, dtypes, shapes=SHAPES, *, in_place=False, start=1):
    sources = [
        np.array(np.arange(np.prod(shape, dtype=int)).reshape(shape) % 5 + rank + start, dtype)
        for dtype in dtypes
        for shape in shapes
    ]
    return [(source, source if in_place else np.full_like(source, 99)) for source in sources]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("limit", [0, 64, 1 << 20])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_results_are_those_of_each_array_by_itself(size, limit, in_place, monkeypatch):
    monkeypatch.setattr(fusion, "PACKED_OVER_MESSAGES", limit)

    def body(group):
        packer = Packer(group)
        for start in (1, 5):
            pairs = pairs_of(group.rank, DTYPES, in_place=in_place, start=start)
            packer.allreduce(pairs, **how())
            each = [pairs_of(rank, DTYPES, start=start) for rank in range(size)]
            for place, (_, target) in enumerate(pairs):
                if target.dtype == bool:
                    wanted = np.logical_or.reduce([theirs[place][0] for theirs in each])
                else:
                    wanted = sum(theirs[place][0].astype("c8") for theirs in each)
                np.testing.assert_array_equal(target.astype("c8"), wanted)

    in_group(size, body)


@pytest.mark.parametrize(
    ("op", "wanted"), [(Sum, 6.0), (Average, 2.0), (Min, 1.0), (Max, 3.0), (Product, 6.0)], ids=str
)
def test_ops_and_factors(op, wanted):
    def body(group):
        pairs = [(np.full(n, 2.0 * (group.rank + 1)), np.empty(n)) for n in (3, 5)]
        Packer(group).allreduce(pairs, **how(op, prescale=0.5, postscale=10.0))
        assert all(np.all(target == 10 * wanted) for _, target in pairs)

    in_group(3, body)


def test_sources_stay_as_they_are():
    def body(group):
        pairs = pairs_of(group.rank, ["f4"])
        before = [source.copy() for source, _ in pairs]
        Packer(group).allreduce(pairs, **how())
        for (source, _), copy in zip(pairs, before, strict=True):
            np.testing.assert_array_equal(source, copy)

    in_group(2, body)


def test_small_arrays_are_packed_by_dtype_and_large_ones_go_alone(monkeypatch):
    counting = Counting(monkeypatch)
    monkeypatch.setattr(fusion, "PACKED_OVER_MESSAGES", 80)

    def body(group):
        shapes = [("f4", 20), ("f8", 2), ("f4", 21), ("f4", 1), ("f8", 11), ("f4", 3), ("i4", 4)]
        pairs = [(np.ones(n, dtype), np.empty(n, dtype)) for dtype, n in shapes]
        Packer(group).allreduce(pairs, **how())
        assert all(np.all(target == 2) for _, target in pairs)

    in_group(2, body)
    # Two that are large; f4 of 20, 1 and 3 elements, each at a multiple of 64 bytes; one f8; one i4
    assert counting.sizes == [21, 11, 32 + 16 + 16, 2, 4]


def test_buffers_are_kept_and_grow():
    def body(group):
        packer = Packer(group)

        def packed(*sizes):
            pairs = [(np.full(n, 1.0), np.empty(n)) for n in sizes]
            packer.allreduce(pairs, **how())
            assert all(np.all(target == 2.0) for _, target in pairs)
            return packer._buffers[np.dtype(float)]

        first = packed(3, 5)
        assert packed(100, 7) is first
        larger = packed(4000, 4000)
        assert larger.size > first.size
        assert packed(1, 1) is larger
        assert list(packer._buffers) == [np.dtype(float)]

    in_group(2, body)


def test_what_lies_between_the_arrays_does_no_harm():
    """Gaps hold what earlier messages left there; they may overflow, but nobody looks at them."""

    def body(group):
        packer = Packer(group)
        big = [(np.full(n, 3e38, "f4"), np.empty(n, "f4")) for n in (16, 16)]
        packer.allreduce(big, **how(Max))
        with np.errstate(all="raise"):
            for _ in range(4):
                pairs = [(np.ones(n, "f4"), np.empty(n, "f4")) for n in (1, 3)]
                packer.allreduce(pairs, **how())
                assert all(np.all(target == 2) for _, target in pairs)

    in_group(2, body)


def test_places_are_aligned(monkeypatch):
    seen = []
    allreduce = fusion.allreduce

    def noting(group, source, target, **more):
        seen.append(source.copy())
        return allreduce(group, source, target, **more)

    monkeypatch.setattr(fusion, "allreduce", noting)

    def body(group):
        Packer(group).allreduce([(np.full(n, n, "f8"),) * 2 for n in (1, 9, 8)], **how())

    in_group(1, body)
    step = ALIGNMENT // 8
    (buffer,) = seen
    assert buffer.size == 4 * step
    assert buffer[:1].tolist() == [1]
    assert buffer[step : step + 9].tolist() == [9] * 9
    assert buffer[3 * step :].tolist() == [8] * 8


def test_adasum_takes_every_array_by_itself():
    """Parallel ones are averaged, orthogonal ones added; packed as one they would be neither."""

    def body(group):
        parallel, orthogonal = np.array([1.0, 2.0]), np.eye(2)[group.rank]
        pairs = [(parallel, np.empty(2)), (orthogonal, np.empty(2))]
        Packer(group).allreduce(pairs, **how(Adasum))
        np.testing.assert_allclose(pairs[0][1], [1, 2])
        np.testing.assert_allclose(pairs[1][1], [1, 1])
        assert orthogonal.tolist() == np.eye(2)[group.rank].tolist()

    in_group(2, body)


def test_a_recorder_sees_what_packing_costs():
    class Recorder:
        tracing = True

        def __init__(self):
            self.steps = []

        def operation(self, *_, **__):
            pass

        def step(self, name, began, nbytes):
            assert began > 0
            self.steps.append((name, nbytes))

    def body(group):
        group.recorder = recorder = Recorder()
        Packer(group).allreduce([(np.ones(8), np.empty(8)) for _ in range(3)], **how())
        return [step for step in recorder.steps if "pack" in step[0]]

    assert in_group(1, body) == [[("pack 3 arrays", 192), ("unpack 3 arrays", 192)]]
