"""The plan of the buckets: a pure function, held to its promises over whatever models there are."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdkit.dtypes import bfloat16
from hvdkit.engine.bucketing import ALIGNMENT, Gradient, plan_buckets, plan_groups

DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), bfloat16]
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@st.composite
def models(draw):
    drawn = draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=25))
    return [Gradient(f"g{i}", shape, dtype) for i, (shape, dtype) in enumerate(drawn)]


limits = st.integers(1, 60_000)


def of_dtype(buckets, dtype):
    return [bucket for bucket in buckets if bucket.dtype == dtype]


@given(models(), limits)
def test_every_gradient_travels_exactly_once(gradients, limit):
    members = [i for bucket in plan_buckets(gradients, limit) for i in bucket.members]
    assert sorted(members) == list(range(len(gradients)))


@given(models(), limits)
def test_places_are_aligned_apart_and_inside_the_buffer(gradients, limit):
    for bucket in plan_buckets(gradients, limit):
        assert len(bucket.members) == len(bucket.offsets) > 0
        assert all(o * bucket.dtype.itemsize % ALIGNMENT == 0 for o in bucket.offsets)
        ends = [
            offset + gradients[i].count
            for i, offset in zip(bucket.members, bucket.offsets, strict=True)
        ]
        for end, following in zip(ends, [*bucket.offsets[1:], bucket.count], strict=True):
            assert end <= following


@given(models(), limits)
def test_a_bucket_is_no_larger_than_asked_unless_one_gradient_is(gradients, limit):
    for bucket in plan_buckets(gradients, limit):
        nbytes = bucket.count * bucket.dtype.itemsize
        assert nbytes <= limit or len(bucket.members) == 1
        padding = ALIGNMENT * len(bucket.members)
        assert nbytes <= sum(gradients[i].count for i in bucket.members) * 8 + padding


@given(models(), limits)
def test_buckets_are_as_full_as_they_can_be(gradients, limit):
    """The first gradient of a bucket would not have fitted into the one before."""
    for dtype in DTYPES:
        for full, following in itertools.pairwise(of_dtype(plan_buckets(gradients, limit), dtype)):
            one = plan_buckets([gradients[following.members[0]]], limit)[0]
            assert (full.count + one.count) * dtype.itemsize > limit


@given(models(), limits)
def test_one_dtype_a_bucket_in_reverse_order_of_creation(gradients, limit):
    buckets = plan_buckets(gradients, limit)
    for bucket in buckets:
        assert {gradients[i].dtype for i in bucket.members} == {bucket.dtype}
    for dtype in DTYPES:
        members = [i for bucket in of_dtype(buckets, dtype) for i in bucket.members]
        assert members == sorted(members, reverse=True)


@given(models(), limits)
def test_buckets_stand_in_the_order_in_which_their_last_gradient_is_expected(gradients, limit):
    last = [bucket.members[-1] for bucket in plan_buckets(gradients, limit)]
    assert last == sorted(last, reverse=True)


@given(models(), limits)
def test_the_plan_depends_on_nothing_else(gradients, limit):
    assert plan_buckets(gradients, limit) == plan_buckets(list(gradients), limit)


@st.composite
def models_in_an_order(draw):
    """A model, and some of its gradients in whatever order they came."""
    gradients = draw(models())
    order = draw(st.permutations(range(len(gradients))))
    return gradients, order[: draw(st.integers(0, len(gradients)))]


@given(models_in_an_order(), limits)
def test_an_order_that_was_seen_is_followed(model, limit):
    gradients, order = model
    buckets = plan_buckets(gradients, limit, order)
    for dtype in DTYPES:
        members = [i for bucket in of_dtype(buckets, dtype) for i in bucket.members]
        assert members == [i for i in order if gradients[i].dtype == dtype]
    last = [order.index(bucket.members[-1]) for bucket in buckets]
    assert last == sorted(last)


@given(models_in_an_order(), st.data())
def test_groups_have_a_bucket_a_dtype_and_every_other_gradient_has_its_own(model, data):
    gradients, order = model
    cut = data.draw(st.integers(0, len(gradients)))
    shuffled = data.draw(st.permutations(range(len(gradients))))
    groups = [shuffled[:cut][::2], shuffled[:cut][1::2]]
    buckets = plan_groups(gradients, groups, order)
    wanted = [
        {i for i in group if i in order and gradients[i].dtype == dtype}
        for group in [*groups, *([i] for i in shuffled[cut:])]
        for dtype in DTYPES
    ]
    assert sorted(sorted(bucket.members) for bucket in buckets) == sorted(
        sorted(members) for members in wanted if members
    )
    for bucket in buckets:
        assert {gradients[i].dtype for i in bucket.members} == {bucket.dtype}
        assert all(o * bucket.dtype.itemsize % ALIGNMENT == 0 for o in bucket.offsets)
    last = [max(order.index(i) for i in bucket.members) for bucket in buckets]
    assert last == sorted(last)


def test_an_example():
    """Four gradients of 64 bytes at 128 bytes a bucket: the last two travel first."""
    gradients = [Gradient(f"g{i}", (16,), np.dtype("f4")) for i in range(4)]
    first, second = plan_buckets(gradients, 128)
    assert (first.members, first.offsets, first.count) == ((3, 2), (0, 16), 32)
    assert (second.members, second.offsets, second.count) == ((1, 0), (0, 16), 32)


def test_no_gradients():
    assert plan_buckets([], 100) == ()


@pytest.mark.parametrize(("shape", "count"), [((), 1), ((0,), 0), ((3, 0, 5), 0), ((2, 3), 6)])
def test_counts(shape, count):
    assert Gradient("g", shape, np.dtype("f4")).count == count


def test_a_gradient_is_shown_as_dtype_and_shape():
    assert str(Gradient("g", (512, 64), bfloat16)) == "bfloat16 (512, 64)"
