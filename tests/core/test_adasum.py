"""Adasum over ranks that are threads, against the same tree in plain numpy."""

import inspect
import re
from fractions import Fraction

import numpy as np
import pytest

from hvdkit import collectives
from hvdkit.collectives.adasum import adasum
from hvdkit.collectives.calls import Call
from hvdkit.dtypes import ReduceOp, bfloat16
from hvdkit.errors import ArgumentError, MismatchError, UnsupportedError
from hvdkit.schedules.adasum import vector_halving
from hvdkit.schedules.cost import Cost, log2_floor, lower_bound
from hvdkit.schedules.draw import draw_text
from hvdkit.schedules.registry import Algorithm
from hvdkit.schedules.steps import chunk_indices
from hvdkit.schedules.verify import verify

from .worlds import every_kernels, in_group

PLAIN = {"name": None, "prescale": 1.0, "postscale": 1.0}
EPSILON = {np.float16: 2e-3, bfloat16.type: 2e-2, np.float32: 1e-6, np.float64: 1e-14}

every_size = pytest.mark.parametrize("size", range(1, 9))
every_dtype = pytest.mark.parametrize("dtype", EPSILON, ids=lambda dtype: dtype.__name__)


def combined(a, b):
    """Adasum of two vectors as the paper has it, rounded to their dtype."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    of_a = 1 - x @ y / (2 * x @ x) if x.any() else 1.0
    of_b = 1 - x @ y / (2 * y @ y) if y.any() else 1.0
    return (of_a * x + of_b * y).astype(a.dtype)


def expected(vectors):
    """The tree: surplus ranks first, then neighbours, then neighbouring pairs."""
    core_size = 2 ** int(np.log2(len(vectors)))
    level = list(vectors[:core_size])
    for i, surplus in enumerate(vectors[core_size:]):
        level[i] = combined(level[i], surplus)
    while len(level) > 1:
        level = [combined(a, b) for a, b in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def gradients(size, count, dtype=np.float32, seed=0):
    """What each rank contributes: partly alike, as gradients are, of different lengths."""
    rng = np.random.default_rng([seed, size, count])
    common = rng.standard_normal(count)
    return [(common * r + rng.standard_normal(count)).astype(dtype) for r in range(1, size + 1)]


def run(contributions, *, segment_bytes=64, kernels=None, **changes):
    """Adasum of `contributions`, a list of parts for each rank; what each rank ends with."""

    def body(group):
        parts = [part.copy() for part in contributions[group.rank]]
        adasum(group, parts, **(PLAIN | changes))
        return parts

    return in_group(len(contributions), body, segment_bytes=segment_bytes, kernels=kernels)


def assert_as_expected(results, contributions):
    """Every rank has the bits of rank 0, and each part is the tree's, up to rounding."""
    __tracebackhide__ = True
    for parts in results:
        assert [part.tobytes() for part in parts] == [part.tobytes() for part in results[0]]
    for number, part in enumerate(results[0]):
        vectors = [theirs[number] for theirs in contributions]
        assert part.dtype == vectors[0].dtype
        assert part.shape == vectors[0].shape
        wanted = expected([vector.reshape(-1) for vector in vectors])
        largest = max((np.abs(v.astype(np.float64)).max(initial=0) for v in vectors), default=0)
        np.testing.assert_allclose(
            part.reshape(-1).astype(np.float64),
            wanted.astype(np.float64),
            rtol=0,
            atol=4 * len(vectors) * EPSILON[part.dtype.type] * largest,
        )


# The schedule


def algorithm():
    """The schedule as the registry would have it."""

    def cost(size, _chunks):
        k, folded = log2_floor(size), size != 1 << log2_floor(size)
        return Cost(2 * k + 2 * folded, Fraction(2 * (2**k - 1), 2**k) + folded)

    return Algorithm(
        collective="allreduce",
        name="vector_halving",
        steps=vector_halving,
        chunks=lambda size, _segments: 1 << log2_floor(size),
        cost=cost,
        source="Maleki et al. 2021",
    )


def test_the_schedule_is_an_allreduce_and_costs_what_it_says():
    known = algorithm()
    for size in range(1, 65):
        chunks = known.chunks(size, 1)
        report = verify(known.steps, size, chunks, "allreduce")
        measured = Cost(report.rounds, Fraction(report.max_chunks_sent, chunks))
        assert measured == known.cost(size, chunks), size
        if size == chunks:
            assert measured.sent_fraction == lower_bound("allreduce", size).sent_fraction


def test_the_trace_in_the_docstring_is_what_happens():
    doc = inspect.getdoc(vector_halving)
    drawn = draw_text(algorithm(), 3).split("\n\n")[1]
    assert inspect.cleandoc(doc[re.search(r"p = 3::\n\n", doc).end() :]) == drawn


def test_aligned_groups_hold_a_whole_vector_between_them():
    """What the sums of dot products rely on: each element counts once."""
    size = 8
    for level in range(3):
        for first in range(0, size, 2 << level):
            blocks = [
                [s for s in vector_halving(r, size, size) if s.reduce][level].reduce[1]
                for r in range(first, first + (2 << level))
            ]
            assert sorted(c for block in blocks for c in chunk_indices(block)) == [*range(size)]


# Against numpy


@every_size
def test_sizes_about_the_number_of_ranks(size):
    for count in sorted({0, 1, size - 1, size, size + 1, 333}):
        contributions = [[vector] for vector in gradients(size, count)]
        assert_as_expected(run(contributions), contributions)


@every_size
def test_a_long_vector_in_many_segments(size):
    contributions = [[vector] for vector in gradients(size, 100_000)]
    assert_as_expected(run(contributions, segment_bytes=8192), contributions)


@every_dtype
@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_dtype(dtype, size):
    contributions = [[vector] for vector in gradients(size, 20_001, dtype)]
    assert_as_expected(run(contributions, segment_bytes=4096), contributions)


@every_size
def test_each_part_is_combined_by_itself(size):
    shapes = [(3, 5), (), (0, 4), (700,), (1,), (2, 3, 4)]
    vectors = [gradients(size, int(np.prod(shape)), seed=i) for i, shape in enumerate(shapes)]
    contributions = [
        [vectors[i][rank].reshape(shape) for i, shape in enumerate(shapes)] for rank in range(size)
    ]
    together = run(contributions)
    assert_as_expected(together, contributions)
    for number in range(len(shapes)):
        alone = [[parts[number]] for parts in contributions]
        assert_as_expected(run(alone), alone)


def test_parts_that_are_views_of_one_buffer():
    """Only the views change, not what lies between them."""
    before = gradients(3, 64, np.float64)

    def body(group):
        buffer = before[group.rank].copy()
        adasum(group, [buffer[:10], buffer[16:40].reshape(4, 6)], **PLAIN)
        return buffer

    results = in_group(3, body)
    for rank, buffer in enumerate(results):
        between = np.r_[10:16, 40:64]
        np.testing.assert_array_equal(buffer[between], before[rank][between])
    for part in (slice(10), slice(16, 40)):
        assert_as_expected([[b[part]] for b in results], [[b[part]] for b in before])


def test_many_more_parts_than_elements_in_a_segment():
    contributions = [[np.array([r + i], np.float64) for i in range(50)] for r in range(1, 5)]
    assert_as_expected(run(contributions), contributions)


def test_kernels_make_no_difference():
    contributions = [[vector] for vector in gradients(5, 500)]
    bits = {
        run(contributions, kernels=kernels, prescale=0.3, postscale=1.7)[0][0].tobytes()
        for kernels in every_kernels()
    }
    assert len(bits) == 1


# What Adasum is for


@every_size
def test_orthogonal_gradients_add(size):
    contributions = [[np.eye(size, dtype=np.float32)[rank] * (rank + 1)] for rank in range(size)]
    for (result,) in run(contributions):
        np.testing.assert_array_equal(result, np.arange(1, size + 1))


@every_size
def test_equal_gradients_average(size):
    vector = np.array([3.0, -1.5, 0.25], np.float32)
    for (result,) in run([[vector]] * size):
        np.testing.assert_array_equal(result, vector)


@every_dtype
def test_zeros_leave_the_others_as_they_are(dtype):
    vector = np.array([3.0, -1.5, 0.25], dtype)
    for contributor in range(5):
        contributions = [[vector * (rank == contributor)] for rank in range(5)]
        for (result,) in run(contributions):
            np.testing.assert_array_equal(result.astype(np.float64), vector.astype(np.float64))
    for (result,) in run([[vector * 0]] * 5):
        assert not result.any()


def test_the_scales():
    contributions = [[vector] for vector in gradients(3, 40, np.float64)]
    (plain,) = run(contributions)[0]
    for (result,) in run(contributions, prescale=2.0, postscale=0.25):
        np.testing.assert_array_equal(result, plain / 2)
    for (result,) in run(contributions[:1], prescale=2.0, postscale=0.25):
        np.testing.assert_array_equal(result, contributions[0][0] / 2)


# The range of the numbers


def test_dot_products_do_not_overflow_where_the_vectors_do_not():
    contributions = [[np.full(1000, 60_000.0, np.float16)] for _ in range(2)]
    for (result,) in run(contributions):
        np.testing.assert_array_equal(result, contributions[0][0])
    contributions = [[np.full(1000, 1e38, np.float32)] for _ in range(2)]
    for (result,) in run(contributions):
        np.testing.assert_array_equal(result, contributions[0][0])


@pytest.mark.parametrize("dtype", [np.float32, bfloat16.type])
def test_a_vector_of_subnormal_numbers(dtype):
    """Beside a parallel one its weight is beyond float32, yet the result is not."""
    contributions = [[np.full(9, 1e-40, dtype)], [np.ones(9, dtype)]]
    for (result,) in run(contributions):
        np.testing.assert_allclose(result.astype(np.float64), 0.5, rtol=1e-3)


def test_squares_that_underflow_count_as_zero():
    contributions = [[np.full(9, 1e-160)], [np.ones(9)]]
    for (result,) in run(contributions):
        np.testing.assert_array_equal(result, 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_part_and_no_other(bad):
    contributions = [[np.ones(20, np.float32), np.ones(7, np.float32)] for _ in range(5)]
    contributions[3][0][11] = bad
    for spoilt, sound in run(contributions):
        assert not np.isfinite(spoilt).any()
        np.testing.assert_array_equal(sound, 1.0)


# Wrong calls: the rank at fault gets its own error, the others learn why, and all go on


def assert_in_step(group):
    assert group.agree(Call("next", None), [group.rank]).ravel().tolist() == [*range(group.size)]


def assert_all_disagree(parts_of, message, **changes):
    def body(group):
        own = {key: of(group.rank) for key, of in changes.items()}
        with pytest.raises(MismatchError, match=message):
            adasum(group, parts_of(group.rank), **(PLAIN | own))
        assert_in_step(group)

    in_group(3, body)


def test_ranks_that_disagree():
    assert_all_disagree(
        lambda r: [np.zeros((4, 2 + (r == 1)))],
        r"allreduce: ranks disagree on the shape\n  ranks 0, 2:  float64 \(4, 2\)\n",
    )
    assert_all_disagree(lambda r: [np.zeros(2)] * (1 + (r == 1)), r"rank 1: .*\(2,\), \(2,\)")
    assert_all_disagree(lambda r: [np.zeros(2, "f4" if r else "f8")], "disagree on the dtype")
    assert_all_disagree(lambda _: [np.zeros(2)], "different names", name=lambda r: f"x{r}")
    assert_all_disagree(
        lambda _: [np.zeros(2)], "disagree on the postscale_factor", postscale=lambda r: 1.0 + r
    )


def test_one_rank_sums():
    """The labels are those of `allreduce`, or this could not be told."""

    def body(group):
        x = np.zeros(3)
        with pytest.raises(MismatchError, match=r"disagree on the op\n[\s\S]*op=Adasum"):
            if group.rank:
                adasum(group, [x], **PLAIN)
            else:
                collectives.allreduce(group, x, x, op=ReduceOp.SUM, algorithm="auto", **PLAIN)
        assert_in_step(group)

    in_group(2, body)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ([np.zeros(3, np.int32)], UnsupportedError, "not defined for int32, only for float16, "),
        ([np.zeros(3, np.complex64)], UnsupportedError, "not defined for complex64"),
        ([np.zeros(3, "datetime64[s]")], UnsupportedError, "datetime64"),
        ([np.zeros(3), np.zeros(3, "f4")], ArgumentError, "one dtype, not of float64, float32"),
        ([], ArgumentError, "at least one array"),
    ],
)
def test_one_rank_has_what_cannot_be_combined(wrong, error, message):
    def body(group):
        at_fault = group.rank == 1
        with pytest.raises(error if at_fault else MismatchError, match=message) as caught:
            adasum(group, wrong if at_fault else [np.zeros(3)], **PLAIN)
        if not at_fault:
            assert f"rank 1:      {error.__name__}" in str(caught.value)
        assert_in_step(group)

    in_group(3, body)


def test_one_rank_gives_nonsense_for_a_factor():
    def body(group):
        at_fault = group.rank == 1
        with pytest.raises(ArgumentError if at_fault else MismatchError, match="'half' is not a"):
            adasum(group, [np.zeros(3)], **(PLAIN | {"prescale": "half" if at_fault else 1.0}))
        assert_in_step(group)

    in_group(3, body)


def test_a_kept_plan_is_checked_again_each_time():
    def body(group):
        for turn in range(3):
            x = np.full(3, 1.0 + turn)
            adasum(group, [x], **PLAIN)
            assert (x == 1.0 + turn).all()
        with pytest.raises(MismatchError, match="disagree on the shape"):
            adasum(group, [np.zeros(3 + group.rank)], **PLAIN)
        assert_in_step(group)

    in_group(2, body)
