"""Compressed all-reduces: off by no more than the method promises, and what is lost comes later."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.worlds import every_kernels, in_group, outcomes
from hvdkit.dtypes import Average, Max, Sum, bfloat16
from hvdkit.engine.bucketing import Bucket, Gradient, plan_buckets
from hvdkit.engine.compression import Cast, Int8, NoCompression, PowerSGD, TopK
from hvdkit.engine.compression.powersgd import orthonormalise
from hvdkit.engine.compression.topk import _candidates
from hvdkit.errors import ArgumentError, MismatchError, UnsupportedError

F2, F4, F8 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
FLOATS = [F2, bfloat16, F4, F8]
#: Units in the last place of 1.
EPS = {F2: 2.0**-10, bfloat16: 2.0**-7, F4: 2.0**-23, F8: 2.0**-52}
LOSSY = [Int8(block=32), TopK(0.1), PowerSGD(2)]
EVERY = [NoCompression(), Cast(F2), Cast(bfloat16), *LOSSY]
SIZES = [1, 2, 3, 4, 5]
#: A convolution, a bias, a large and a small matrix, a scalar, and nothing.
SHAPES = [(16, 4, 3, 3), (16,), (40, 30), (3, 4), (), (0, 7)]


def gradients_of(shapes, dtype=F4):
    return [Gradient(f"g{i}", shape, dtype) for i, shape in enumerate(shapes)]


def draw(shapes, dtype, size, *, seed=0, scale=1.0):
    """Return gradients by rank."""
    rng = np.random.default_rng(seed)
    return [
        [(scale * rng.standard_normal(shape)).astype(dtype) for shape in shapes]
        for _ in range(size)
    ]


def run(compressor, steps, *, op=Average, prescale=1.0, postscale=1.0, kernels=None, in_gaps=0):
    """Return each step's reduced gradients, the same bits on all ranks.

    Args:
        steps: for each step, for each rank, the gradients.
        op, prescale, postscale: for all steps, or a list of one a step.
        kernels: which.
        in_gaps: times the rank, what is between the gradients at the start.
    """
    gradients = gradients_of([g.shape for g in steps[0][0]], steps[0][0][0].dtype)
    (bucket,) = plan_buckets(gradients, 1 << 40)
    places = dict(zip(bucket.members, bucket.offsets, strict=True))
    options = [
        list(x) if isinstance(x, list) else [x] * len(steps) for x in (op, prescale, postscale)
    ]

    def body(group):
        codec = compressor.bind(bucket, gradients, np.zeros)
        results = []
        buffer = np.full(bucket.count, group.rank * in_gaps).astype(bucket.dtype)
        for everyone, how, before, after in zip(steps, *options, strict=True):
            views = [
                buffer[places[i] : places[i] + g.count].reshape(g.shape)
                for i, g in enumerate(gradients)
            ]
            for view, mine in zip(views, everyone[group.rank], strict=True):
                view[...] = mine
            codec.allreduce(group, buffer, op=how, name="b", prescale=before, postscale=after)
            results.append(([view.copy() for view in views], buffer.tobytes()))
        return results

    by_rank = in_group(len(steps[0]), body, kernels=kernels)
    for same_step in zip(*by_rank, strict=True):
        assert len({whole for _, whole in same_step}) == 1
    return [views for views, _ in by_rank[0]]


def exact(everyone, *, op=Average, factor=1.0):
    """Return numpy's answer for each gradient, in float64."""
    divisor = len(everyone) if op is Average else 1
    with np.errstate(invalid="ignore"):
        return [
            sum(np.asarray(g, np.float64) for g in same) * factor / divisor
            for same in zip(*everyone, strict=True)
        ]


def flat(arrays):
    return np.concatenate([np.asarray(a, np.float64).reshape(-1) for a in arrays])


# All of them


@pytest.mark.parametrize("compressor", EVERY, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_get_the_same_bits_in_every_step(compressor, dtype, size):
    steps = [draw(SHAPES, dtype, size, seed=step) for step in range(2)]
    for everyone, result in zip(steps, run(compressor, steps, in_gaps=1), strict=True):
        assert [r.dtype for r in result] == [dtype] * len(SHAPES)
        assert np.isfinite(flat(result)).all()
        if size == 1:
            assert np.array_equal(flat(result), flat(everyone[0]))


@pytest.mark.parametrize("compressor", EVERY, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (3, 0), (5,), (1, 1)], ids=str)
def test_empty_and_tiny_buckets(compressor, shape):
    everyone = draw([shape], F4, 3)
    (result,) = run(compressor, [everyone])
    if not isinstance(compressor, TopK) or np.prod(shape) <= 1:  # it sends one element
        assert np.allclose(result[0], exact(everyone)[0], rtol=0.02, atol=0.03)


@pytest.mark.parametrize("compressor", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.complex64], ids=str)
def test_what_is_no_float_travels_as_it_is(compressor, dtype):
    everyone = [[np.arange(40).reshape(8, 5).astype(dtype) + r] for r in range(3)]
    (result,) = run(compressor, [everyone], op=Sum)
    assert np.array_equal(result[0], sum(mine[0] for mine in everyone))


@pytest.mark.parametrize("compressor", EVERY, ids=str)
@pytest.mark.parametrize("op", [Sum, Average], ids=str)
@pytest.mark.parametrize(("prescale", "postscale"), [(0.5, 8.0), (0.25, 1.0), (1.0, 3.0)])
def test_ops_and_factors_scale_the_result(compressor, op, prescale, postscale):
    """The loss does not depend on them: what comes out is the sum of contributions, scaled."""
    everyone = draw(SHAPES, F4, 2)
    (plain,) = run(compressor, [everyone], op=Sum)
    (scaled,) = run(compressor, [everyone], op=op, prescale=prescale, postscale=postscale)
    factor = prescale * postscale / (2 if op is Average else 1)
    assert np.allclose(flat(scaled), flat(plain) * factor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compressor", LOSSY, ids=str)
def test_residuals_do_not_depend_on_op_and_factors(compressor):
    steps = [draw(SHAPES, F4, 3, seed=step) for step in range(4)]
    plain = run(compressor, steps, op=Sum)
    ops, before, after = [Sum, Average, Sum, Average], [1.0, 2.0, 0.5, 1.0], [1.0, 1.0, 4.0, 0.5]
    scaled = run(compressor, steps, op=ops, prescale=before, postscale=after)
    for step in range(4):
        factor = before[step] * after[step] / (3 if ops[step] is Average else 1)
        assert np.allclose(flat(scaled[step]), flat(plain[step]) * factor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("compressor", "dtype"), [*zip(LOSSY, [F4, F8, F4], strict=True)], ids=str)
def test_error_feedback_a_constant_gradient_comes_through_in_sum(compressor, dtype):
    """The sum of the results lacks a bounded residual, so that their mean converges."""
    everyone = draw(SHAPES, dtype, 3)
    wanted = flat(exact(everyone))
    results = np.cumsum([flat(r) for r in run(compressor, [everyone] * 80)], axis=0)
    missing = [np.abs(results[t - 1] - t * wanted).max() for t in (20, 80)]
    assert missing[1] < 3 * missing[0]  # without feedback: four times, but for what comes exact
    assert missing[1] / 80 < 0.2 * np.abs(wanted).max()
    assert np.abs(results[79] - results[39] - 40 * wanted).max() / 40 < 0.35 * np.abs(wanted).max()


@pytest.mark.parametrize("compressor", EVERY, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", [F2, F4], ids=str)
def test_what_is_not_finite_shows_at_once_and_is_gone_in_the_next_step(compressor, bad, dtype):
    steps = [draw(SHAPES, dtype, 3, seed=step) for step in range(3)]
    steps[1][2][2][7, 5] = bad
    before, broken, after = run(compressor, steps)
    assert not np.isfinite(broken[2][7, 5])
    for finite in (flat(before), flat(after)):
        assert np.isfinite(finite).all()
        assert np.abs(finite).max() < 20
    for untouched in (0, 1, 3):  # other gradients, of other blocks
        assert np.isfinite(broken[untouched]).all()


@pytest.mark.parametrize("compressor", LOSSY, ids=str)
def test_ops_without_a_sum_are_refused_on_all_ranks(compressor):
    gradients = gradients_of([(64, 64)])
    (bucket,) = plan_buckets(gradients, 1 << 40)

    def body(group, ops):
        codec = compressor.bind(bucket, gradients, np.zeros)
        buffer = np.ones(bucket.count, F4)
        op = ops[group.rank]
        codec.allreduce(group, buffer, op=op, name="b", prescale=1.0, postscale=1.0)

    for error in outcomes(2, lambda group: body(group, [Max, Max])):
        assert isinstance(error, ArgumentError)
        assert "has Sum and Average, not Max" in str(error)
    errors = outcomes(2, lambda group: body(group, [Max, Sum]))
    assert [type(error) for error in errors] == [ArgumentError, MismatchError]
    assert "rank 0:  ArgumentError" in str(errors[1])
    for error in outcomes(2, lambda group: body(group, [Sum, Average])):
        assert isinstance(error, MismatchError)


def test_ranks_with_different_compressors_get_an_error_not_a_wrong_result():
    gradients = gradients_of([(64, 64)])
    (bucket,) = plan_buckets(gradients, 1 << 40)
    pairs = [(Int8(64), Int8(32)), (TopK(0.1), TopK(0.2)), (Int8(), TopK()), (Cast(F2), PowerSGD())]
    for pair in pairs:

        def body(group, pair=pair):
            codec = pair[group.rank].bind(bucket, gradients, np.zeros)
            buffer = np.ones(bucket.count, F4)
            codec.allreduce(group, buffer, op=Sum, name="b", prescale=1.0, postscale=1.0)

        assert [type(error) for error in outcomes(2, body)] == [MismatchError] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((lambda d=d: Cast(d), "float16 or bfloat16") for d in (F4, "int8", None, "no such")),
        *((lambda r=r: TopK(r), "above 0 and at most 1") for r in (0, -0.1, 1.01, np.nan, "x")),
        *((lambda n=n: PowerSGD(n), "rank must be") for n in (0, -1, 1.5, "x", None)),
        *((lambda n=n: Int8(n), "block must be") for n in (0, -8, 2.0, None)),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_compressors_can_be_compared_between_ranks():
    assert [str(c) for c in (NoCompression(), Cast("float16"), Cast(bfloat16))] == [
        *("NoCompression()", "Cast(float16)", "Cast(bfloat16)")
    ]
    assert str(Int8(np.int64(64))) == str(Int8(64)) == "Int8(block=64)"
    assert str(TopK(np.float64(0.5))) == "TopK(ratio=0.5)"
    assert str(PowerSGD(2)) == "PowerSGD(rank=2)"
    assert Cast(F2) == Cast(np.float16) != Cast(bfloat16)
    assert len({*EVERY, *EVERY, Int8(block=32)}) == len(EVERY)


def test_wire_bytes():
    """1024 x 1024 float32 and 1024 more, among four ranks."""
    gradients = gradients_of([(1024, 1024), (1024,)])
    (bucket,) = plan_buckets(gradients, 1 << 40)
    count = 1024 * 1025

    def sent(compressor, size=4):
        return compressor.bind(bucket, gradients, np.zeros).wire_bytes(size)

    assert sent(NoCompression()) == 4 * count * 2 * 3 // 4
    assert sent(Cast(F2)) == 2 * count * 2 * 3 // 4
    assert sent(Int8(256)) == (count + 4 * count // 256) * 2 * 3 // 4
    assert sent(TopK(0.01)) == 8 * round(0.01 * count) * 3
    assert sent(PowerSGD(4)) == 4 * (2 * 4 * 1024 + 1024) * 2 * 3 // 4
    assert [sent(compressor, 1) for compressor in EVERY] == [0] * len(EVERY)


# Casts


@pytest.mark.parametrize("half", [F2, bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("kernels", every_kernels(), ids=lambda kernels: kernels.name)
def test_a_cast_rounds_each_contribution_and_each_addition_once(half, dtype, size, kernels):
    everyone = draw([(1000,)], dtype, size)
    (result,) = run(Cast(half), [everyone], op=Sum, kernels=kernels)
    most = sum(np.abs(mine[0]) for mine in everyone) * 1.1
    bound = EPS[half] / 2 * most * size + 2.0**-25 * size
    assert (np.abs(result[0] - exact(everyone, op=Sum)[0]) <= bound).all()


def test_a_cast_of_halves_that_cannot_be_told_apart_is_exact():
    everyone = [[np.arange(100, dtype=F4) * (rank + 1)] for rank in range(3)]
    (result,) = run(Cast(F2), [everyone], op=Average, postscale=3.0)
    assert np.array_equal(result[0], np.arange(100) * 6)


def test_float16_overflows_to_infinity_unless_scaled_before():
    everyone = [[np.array([40000.0, -40000.0, 70000.0, 1.0], F4)] for _ in range(2)]
    (result,) = run(Cast(F2), [everyone], op=Average)
    assert result[0].tolist() == [np.inf, -np.inf, np.inf, 1.0]
    (result,) = run(Cast(F2), [everyone], op=Sum, prescale=0.25, postscale=2.0)
    assert np.allclose(result[0], everyone[0][0], rtol=1e-3)
    (result,) = run(Cast(bfloat16), [everyone], op=Average)
    assert np.allclose(result[0], everyone[0][0], rtol=1e-2)


@pytest.mark.parametrize("dtype", [F2, bfloat16], ids=str)
def test_halves_are_not_cast_to_the_other_kind(dtype):
    everyone = draw(SHAPES, dtype, 3)
    (cast,) = run(Cast(F2 if dtype == bfloat16 else bfloat16), [everyone])
    (plain,) = run(NoCompression(), [everyone])
    assert np.array_equal(flat(cast), flat(plain))


# Int8


@pytest.mark.parametrize(("count", "block"), [(1000, 32), (1000, 7), (64, 1), (5, 256), (3, 2)])
@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("dtype", [F4, F8, F2], ids=str)
def test_int8_is_off_by_half_a_step_of_each_block(count, block, size, dtype):
    rng = np.random.default_rng(count)
    spread = np.exp(rng.uniform(-5, 5, count))  # blocks far apart in scale
    everyone = [[(spread * rng.standard_normal(count)).astype(dtype)] for _ in range(size)]
    (result,) = run(Int8(block), [everyone], op=Sum)

    def half_steps(values):
        padded = np.zeros((-(-count // block), block))
        padded.reshape(-1)[:count] = np.abs(np.asarray(values, np.float64))
        return (padded.max(axis=1, keepdims=True) / 254 + 0 * padded).reshape(-1)[:count]

    wanted = exact(everyone, op=Sum)[0]
    contributions = sum(half_steps(mine[0]) for mine in everyone)
    bound = contributions + half_steps(np.abs(wanted) + contributions)
    rounding = 2 * EPS[dtype if dtype == F2 else F4] * (np.abs(wanted) + 127 * bound)
    assert (np.abs(result[0] - wanted) <= bound + rounding).all()


def test_int8_more_elements_than_are_worked_on_at_once():
    everyone = draw([(150_001,)], F4, 3)
    first, second = run(Int8(256), [everyone] * 2)
    wanted = exact(everyone)[0]
    assert np.abs(first[0] - wanted).max() < 0.05
    assert np.abs((first[0] + second[0]) / 2 - wanted).max() < 0.03


def test_int8_of_blocks_of_zeros_and_of_the_smallest_numbers():
    """A block without enough bits for its steps travels as zeros, but is not forgotten."""
    tiny = np.float32(3e-38)
    gradient = np.repeat(np.array([0.0, tiny, 1e-44, 1.0], F4), 8)
    results = run(Int8(8), [[[gradient]] * 2] * 200, op=Sum)
    first = results[0][0].reshape(4, 8)
    assert not first[:3].any()
    assert np.allclose(first[3], 2.0)
    total = sum(np.asarray(r[0], np.float64) for r in results).reshape(4, 8)
    assert not total[0].any()
    assert np.allclose(total[1], 400 * float(tiny), rtol=0.3)


def test_int8_survives_the_largest_numbers():
    everyone = [[np.full(16, np.finfo(F4).max, F4)] for _ in range(2)]
    (result,) = run(Int8(8), [everyone], op=Average)
    assert not np.isfinite(result[0]).any()  # the sum is beyond float32, as without compression
    everyone = [[np.full(16, np.finfo(F4).max / 4, F4)] for _ in range(2)]
    (result,) = run(Int8(8), [everyone], op=Average)
    assert np.allclose(result[0], np.finfo(F4).max / 4)


# TopK


@pytest.mark.parametrize(("dtype", "size"), [*zip(FLOATS, SIZES[1:], strict=True)], ids=str)
def test_topk_of_everything_is_exact(dtype, size):
    everyone = [
        [np.random.default_rng(r).integers(-9, 9, shape).astype(dtype) for shape in SHAPES]
        for r in range(size)
    ]
    results = run(TopK(1.0), [everyone] * 2, op=Sum)
    for result in results:
        assert np.array_equal(flat(result), flat(exact(everyone, op=Sum)))


def test_topk_sends_the_largest_and_keeps_the_rest():
    """Two ranks, one of four elements a step."""
    first = [[np.array([1, -8, 3, 2], F4)], [np.array([5, 1, -6, 0], F4)]]
    nothing = [[np.zeros(4, F4)]] * 2
    steps = run(TopK(1 / 16), [first, *[nothing] * 4], op=Sum)
    assert [step[0].tolist() for step in steps] == [
        [0, -8, -6, 0],
        [5, 0, 3, 0],
        [0, 1, 0, 2],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_topk_more_that_is_not_finite_than_fits_is_dropped():
    bad = [[np.full(160, np.nan, F4)], [np.ones(160, F4)]]
    good = [[np.ones(160, F4)]] * 2
    broken, clean = run(TopK(0.1), [bad, good])
    assert np.isnan(broken[0]).sum() == 16
    assert np.isfinite(clean[0]).all()


@given(
    st.integers(1, 20_000),
    st.floats(0, 1),
    st.sampled_from(["random", "clustered", "zeros", "unsampled", "sampled", "few values"]),
)
@settings(max_examples=150, deadline=None)
def test_candidates_include_the_largest_whatever_the_sample_says(count, part, kind):
    rng = np.random.default_rng(count)
    magnitudes = rng.integers(0, 1 << 31, count).astype(np.int32)
    if kind == "clustered":
        magnitudes.sort()
    elif kind == "zeros":
        magnitudes[:] = 0
    elif kind == "unsampled":
        magnitudes[::61] = 0
    elif kind == "sampled":
        magnitudes[np.arange(count) % 61 != 0] = 0
    elif kind == "few values":
        magnitudes %= 3
    chosen = max(1, round(part * count))
    candidates = _candidates(magnitudes, chosen)
    assert len(np.unique(candidates)) == len(candidates) >= chosen
    largest = np.sort(magnitudes)[count - chosen :]
    assert np.array_equal(np.sort(magnitudes[candidates])[len(candidates) - chosen :], largest)


def test_candidates_are_few_where_the_sample_can_tell():
    magnitudes = np.random.default_rng(0).integers(0, 1 << 31, 1_000_000).astype(np.int32)
    assert 10_000 <= len(_candidates(magnitudes, 10_000)) < 20_000


def test_topk_refuses_more_elements_than_indices_can_name():
    count = (1 << 32) + 1
    with pytest.raises(UnsupportedError, match="indices of 32 bits"):
        TopK().bind(Bucket(F4, (0,), (0,), count), [Gradient("g", (count,), F4)], np.zeros)


# PowerSGD


def low_rank(rng, rows, columns, rank):
    return (rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))).astype(F4)


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_powersgd_of_a_sum_of_that_rank_is_exact_up_to_rounding(size, rank):
    """Each rank's part of it has a higher rank: what differs between ranks cancels in the sum."""
    rng = np.random.default_rng(rank)
    noise = [rng.standard_normal((40, 50)).astype(F4) for _ in range(size)]
    shift = np.roll(np.arange(size), 1)
    everyone = [[mine - noise[other]] for mine, other in zip(noise, shift, strict=True)]
    everyone[0][0] += low_rank(rng, 40, 50, rank)
    for result in run(PowerSGD(rank), [everyone] * 3, op=Sum):
        wanted = exact(everyone, op=Sum)[0]
        assert np.abs(result[0] - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_powersgd_comes_close_to_the_best_approximation_of_its_rank():
    """The warm start makes the steps of training those of subspace iteration."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (60, 80))
    matrix = (left * 0.7 ** np.arange(60)) @ right[:60]
    steps = [[[matrix.astype(F4)]] * 2] + [[[np.zeros((60, 80), F4)]] * 2] * 40
    results = run(PowerSGD(3), steps)
    best = np.sqrt(np.sum(0.49 ** np.arange(3, 60)))
    assert np.linalg.norm(results[0][0] - matrix) < 2.5 * best
    # Deflated by feedback, the rest follows: after some steps it is all there.
    assert np.linalg.norm(sum(r[0] for r in results) - matrix) < 1e-3


def test_powersgd_leaves_vectors_and_small_matrices_as_they_are():
    shapes = [(64, 64), (64,), (6, 6), (), (2, 3, 2)]
    everyone = draw(shapes, F4, 3)
    (compressed,) = run(PowerSGD(2), [everyone])
    (plain,) = run(NoCompression(), [everyone])
    assert not np.allclose(compressed[0], plain[0], atol=0.1)
    for index in range(1, 5):
        assert compressed[index].tobytes() == plain[index].tobytes()


def test_powersgd_wakes_up_after_steps_without_gradients():
    """Zeros make P, then Q, zeros, which without new columns would stay so for ever."""
    rng = np.random.default_rng(0)
    nothing = [[np.zeros((40, 40), F4)]] * 2
    gradient = [[low_rank(rng, 40, 40, 2)]] * 2
    *_, result = run(PowerSGD(2), [nothing, nothing, gradient])
    assert np.allclose(result[0], gradient[0][0], atol=1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_powersgd_at_any_scale(scale):
    rng = np.random.default_rng(0)
    everyone = [[low_rank(rng, 40, 40, 2) * np.float32(scale)]] * 2
    for result in run(PowerSGD(4), [everyone] * 4):
        assert np.allclose(result[0] / scale, everyone[0][0] / scale, atol=1e-4)


def test_powersgd_more_elements_than_are_worked_on_at_once():
    rng = np.random.default_rng(0)
    for shape in [(300, 500), (2, 70_000)]:
        everyone = [[low_rank(rng, *shape, 1)]] * 2
        for result in run(PowerSGD(1), [everyone] * 2):
            assert np.allclose(result[0], everyone[0][0], atol=1e-4)


@pytest.mark.parametrize("size_of_all", [3e38, 3e37])
def test_powersgd_an_overflow_in_p_or_in_q_leaves_nothing_behind(size_of_all):
    big = [[np.full((40, 40), size_of_all, F4)]] * 2
    good = [[np.ones((40, 40), F4)]] * 2
    broken, clean = run(PowerSGD(1), [big, good])
    assert not np.isfinite(broken[0]).all()
    assert np.allclose(clean[0], 1.0, atol=1e-5)


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 3), st.floats(-30, 30))
@settings(max_examples=80, deadline=None)
def test_orthonormalised_rows_span_the_same_or_are_zeros(count, length, dependent, magnitude):
    rng = np.random.default_rng(length)
    rows = (rng.standard_normal((count, length)) * 10.0**magnitude).astype(F4)
    for k in range(1, min(dependent, count - 1) + 1):
        rows[k] = rows[0] * k
    basis = rows.copy()
    orthonormalise(basis)
    gram = basis.astype(F8) @ basis.T.astype(F8)
    expected = np.diag((np.abs(basis).max(axis=1) > 0).astype(F8))
    assert np.allclose(gram, expected, atol=1e-5)
    projected = rows @ basis.T @ basis
    assert np.allclose(projected, rows, rtol=0, atol=1e-3 * np.abs(rows).max())


def test_rows_that_are_nearly_the_same_become_orthogonal():
    """One pass of Gram-Schmidt leaves them at an angle that shows."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal(50) + 5e-6 * rng.standard_normal((6, 50))
    basis = rows.astype(F4)
    orthonormalise(basis)
    assert np.abs(basis @ basis.T - np.eye(6)).max() < 5e-7
