"""The kernels, compiled (each variant that runs here) and in numpy, against numpy's own answers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdkit import native
from hvdkit.dtypes import DTYPE_CODES, DTYPES, ReduceOp, bfloat16
from hvdkit.native import Kernels, NumpyKernels

try:
    from hvdkit.native import _native
except ImportError:  # the numpy kernels are tested nonetheless
    _native = None

SIZES = (0, 1, 3, 7, 17, 63, 64, 255, 257, 1000, 40_001)
HALVES = (np.dtype(np.float16), bfloat16)
needs_native = pytest.mark.skipif(
    _native is None, reason=f"no native module: {native.why_unavailable()}"
)
PROVIDERS = ["numpy", *(_native.variants() if _native else [])]


@pytest.fixture(params=PROVIDERS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    if request.param == "numpy":
        yield NumpyKernels()
        return
    best = _native.cpu_features()
    _native.select_variant(request.param)
    yield native.load()
    _native.select_variant(best)


def random_array(dtype: np.dtype, size: int, seed: int = 0, special: bool = True) -> np.ndarray:
    """Return numbers of all magnitudes; among floats also NaN, infinities, zeros and subnormals."""
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.integers(0, 2, size).astype(bool)
    if dtype.kind in "iu":
        return np.frombuffer(rng.bytes(size * dtype.itemsize), dtype).copy()
    if dtype.kind == "c":
        part = np.dtype(f"f{dtype.itemsize // 2}")
        parts = [random_array(part, size, seed + k, special) for k in (0, 1)]
        result = np.empty(size, dtype)
        result.real, result.imag = parts
        return result
    scale = 10.0 ** rng.integers(-3, 3, size)
    values = (rng.standard_normal(size) * scale).astype(np.float32).astype(dtype)
    if special and size:
        tiny = float(np.finfo(np.float16).smallest_subnormal) if dtype in HALVES else 1e-310
        odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, tiny, -tiny]).astype(dtype)
        where = rng.integers(0, size, size // 3)
        values[where] = odd[rng.integers(0, odd.size, where.size)]
    return values


def expected(left: np.ndarray, right: np.ndarray, op: ReduceOp) -> np.ndarray:
    """Return numpy's answer."""
    with np.errstate(all="ignore"):
        if op in (ReduceOp.SUM, ReduceOp.AVERAGE):
            return np.add(left, right)
        if op is ReduceOp.PRODUCT:
            if left.dtype.kind == "c":  # numpy's own fuses operations on some CPUs
                result = np.empty_like(left)
                result.real = left.real * right.real - left.imag * right.imag
                result.imag = left.real * right.imag + left.imag * right.real
                return result
            return np.multiply(left, right)
        function = np.minimum if op is ReduceOp.MIN else np.maximum
        return function(left, right)


def bits(array: np.ndarray, *, any_nan: bool = True) -> np.ndarray:
    """Return the bits, with all NaNs alike unless their payload matters."""
    part = array.view(array.real.dtype) if array.dtype.kind == "c" else array
    if any_nan and part.dtype.kind not in "biu":
        with np.errstate(invalid="ignore"):  # signalling ones
            part = np.where(np.isnan(part), part.dtype.type(np.nan), part)
    return part.view(f"u{part.dtype.itemsize}")


def is_defined(dtype: np.dtype, op: ReduceOp) -> bool:
    if op is ReduceOp.ADASUM:  # no element-wise operation
        return False
    return dtype.kind != "c" or op not in (ReduceOp.MIN, ReduceOp.MAX)


CASES = [(dtype, op) for dtype in DTYPES for op in ReduceOp if is_defined(dtype, op)]


@pytest.mark.parametrize(("dtype", "op"), CASES, ids=str)
def test_reduce_is_numpys(kernels: Kernels, dtype: np.dtype, op: ReduceOp) -> None:
    for size in SIZES:
        for incoming_first in (False, True):
            out, incoming = random_array(dtype, size, 1), random_array(dtype, size, 2)
            left, right = (incoming, out) if incoming_first else (out, incoming)
            want = expected(left, right, op)
            untouched = incoming.copy()
            kernels.reduce(out, incoming, op, incoming_first=incoming_first)
            np.testing.assert_array_equal(bits(out), bits(want))
            np.testing.assert_array_equal(bits(incoming), bits(untouched))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.kind == "f" or d == bfloat16], ids=str)
def test_min_and_max_keep_numpys_choice_of_zero_and_nan(kernels: Kernels, dtype: np.dtype) -> None:
    """+0 and -0 are equal and NaNs differ in payload: which one is kept depends on the order."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    quiet = np.array([np.nan], dtype).view(unsigned)[0]
    odd = np.array([quiet, quiet | 1, quiet | 3], unsigned).view(dtype)
    odd = np.concatenate([odd, np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf]).astype(dtype)])
    left, right = (np.ascontiguousarray(x.ravel()) for x in np.meshgrid(odd, odd))
    for op in (ReduceOp.MIN, ReduceOp.MAX):
        want = expected(left, right, op)
        for repeat in (1, 7):  # in the vectorised part and in the remainder
            out = np.tile(left, repeat)
            kernels.reduce(out, np.tile(right, repeat), op, incoming_first=False)
            np.testing.assert_array_equal(
                bits(out, any_nan=False), bits(np.tile(want, repeat), any_nan=False)
            )


@needs_native
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("op, oracle", [(ReduceOp.SUM, np.add), (ReduceOp.PRODUCT, np.multiply)])
def test_any_two_halves_give_numpys_bits(half: np.dtype, op: ReduceOp, oracle: np.ufunc) -> None:
    """Of two NaNs a sum took the first or the second one's sign, as the compiler's order had it."""
    rng = np.random.default_rng(3)
    left, right = rng.integers(0, 1 << 16, (2, 300_001)).astype(np.uint16)
    exponent = 0x7C00 if half == np.float16 else 0x7F80
    left[::2] &= ~np.uint16(exponent)  # subnormals
    right[::3] = left[::3] ^ (right[::3] & np.uint16(0x80FF))  # neighbours, and ties
    left[::50] |= np.uint16(exponent)
    right[::100] |= np.uint16(exponent)
    with np.errstate(all="ignore"):
        wanted = oracle(left.view(half), right.view(half)).view(np.uint16)
    best = _native.cpu_features()
    try:
        for variant in _native.variants():
            _native.select_variant(variant)
            out = left.copy()
            _native.reduce(out, right, DTYPE_CODES[half], int(op), False)
            np.testing.assert_array_equal(out, wanted, err_msg=variant)
    finally:
        _native.select_variant(best)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_of_unaligned_views(kernels: Kernels, dtype: np.dtype) -> None:
    for offset in (1, 3, 5):
        storage = np.zeros(100 * dtype.itemsize + 8, np.uint8)
        out = storage[offset : offset + 100 * dtype.itemsize].view(dtype)
        out[:] = random_array(dtype, 100, 3)
        incoming = random_array(dtype, 100, 4)
        want = expected(out, incoming, ReduceOp.SUM)
        kernels.reduce(out, incoming, ReduceOp.SUM, incoming_first=False)
        np.testing.assert_array_equal(bits(out.copy()), bits(want))
        assert not storage[:offset].any()
        assert not storage[offset + 100 * dtype.itemsize :].any()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_all_providers_agree(data: st.DataObject) -> None:
    dtype, op = data.draw(st.sampled_from(CASES))
    size = data.draw(st.integers(0, 600))
    raw = st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize)
    left, right = (np.frombuffer(data.draw(raw), dtype).copy() for _ in range(2))
    if dtype.kind == "b":
        left, right = (array.view(np.uint8) % 2 == 1 for array in (left, right))
    want = left.copy()
    NumpyKernels().reduce(want, right, op, incoming_first=False)
    for variant in PROVIDERS[1:]:
        _native.select_variant(variant)
        out = left.copy()
        native.load().reduce(out, right, op, incoming_first=False)
        np.testing.assert_array_equal(bits(out), bits(want))


def scaled(array: np.ndarray, divisor: int, factor: float) -> np.ndarray:
    """Return the answer by Python's own exact integers, or by numpy in the dtype's precision."""
    if array.dtype.kind in "iu":
        limits = np.iinfo(array.dtype)
        result = []
        for value in array.tolist():
            quotient = abs(value) // divisor * (1 if value >= 0 else -1)
            if factor != 1.0:
                quotient = int(min(max(float(quotient) * factor, limits.min), float(limits.max)))
            result.append(min(max(quotient, limits.min), limits.max))
        return np.array(result, array.dtype)
    wide = array.astype(np.float32) if array.dtype in HALVES else array
    part = wide.view(wide.real.dtype) if wide.dtype.kind == "c" else wide
    with np.errstate(all="ignore"):
        part = part / part.dtype.type(divisor) if divisor != 1 else part
        part = part * part.dtype.type(factor) if factor != 1.0 else part
        return part.view(wide.dtype).astype(array.dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("divisor", "factor"),
    [(1, 1.0), (2, 1.0), (3, 1.0), (1, 0.3), (7, -2.5), (300, 1.0), (1, 1e30)],
)
def test_scale(kernels: Kernels, dtype: np.dtype, divisor: int, factor: float) -> None:
    for size in SIZES[:-1]:
        array = random_array(dtype, size, 5)
        if size > 2 and dtype.kind in "iu":
            array[:2] = np.iinfo(dtype).min, np.iinfo(dtype).max
        want = scaled(array, divisor, factor)
        kernels.scale(array, divisor=divisor, factor=factor)
        np.testing.assert_array_equal(bits(array), bits(want))


def test_integer_scale_by_nan_and_infinity(kernels: Kernels) -> None:
    for dtype in DTYPES[1:9]:
        limits = np.iinfo(dtype)
        for factor, want in ((np.nan, 0), (np.inf, limits.max), (-np.inf, limits.min)):
            array = np.full(33, 5, dtype)
            kernels.scale(array, factor=factor)
            assert (array == want).all()


def test_undefined_is_refused(kernels: Kernels) -> None:
    with pytest.raises(TypeError, match="bool"):
        kernels.scale(np.zeros(3, bool), divisor=2)
    with pytest.raises(TypeError, match="complex"):
        kernels.reduce(np.zeros(3, "c8"), np.zeros(3, "c8"), ReduceOp.MIN, incoming_first=False)
    with pytest.raises(ValueError, match="divisor"):
        kernels.scale(np.zeros(3), divisor=0)


@needs_native
@pytest.mark.parametrize("variant", PROVIDERS[1:])
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_every_half_converts_there_and_back(variant: str, half: np.dtype) -> None:
    best = _native.cpu_features()
    _native.select_variant(variant)
    source = np.arange(65536, dtype=np.uint16)
    wide, back = np.empty(65536, np.float32), np.empty(65536, np.uint16)
    code, single = DTYPE_CODES[half], DTYPE_CODES[np.dtype(np.float32)]
    _native.convert(wide, single, source, code)
    with np.errstate(all="ignore"):
        want = source.view(half).astype(np.float32)
    np.testing.assert_array_equal(bits(wide), bits(want))
    _native.convert(back, code, wide, single)
    np.testing.assert_array_equal(bits(back.view(half)), bits(source.view(half)))

    # Between two halves, exactly in the middle, and one bit to either side of it.
    finite = wide[np.isfinite(wide)].view(np.uint32)
    step = 1 << (13 if half == np.float16 else 16)
    for delta in (1, step // 2 - 1, step // 2, step // 2 + 1, step - 1):
        exact = (finite + np.uint32(delta)).view(np.float32)
        rounded = np.empty(exact.size, np.uint16)
        _native.convert(rounded, code, exact, single)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(bits(rounded.view(half)), bits(exact.astype(half)))
    _native.select_variant(best)


@needs_native
def test_random_floats_round_to_halves_as_in_numpy() -> None:
    best = _native.cpu_features()
    rng = np.random.default_rng(7)
    wide = np.frombuffer(rng.bytes(4 << 20), np.float32)
    for half in HALVES:
        with np.errstate(all="ignore"):
            want = wide.astype(half)
        for variant in _native.variants():
            _native.select_variant(variant)
            rounded = np.empty(wide.size, np.uint16)
            _native.convert(rounded, DTYPE_CODES[half], wide, DTYPE_CODES[wide.dtype])
            np.testing.assert_array_equal(bits(rounded.view(half)), bits(want))
    _native.select_variant(best)


@needs_native
def test_other_conversions_and_their_limits() -> None:
    double = random_array(np.dtype(np.float64), 1001)
    single, back = np.empty(1001, np.float32), np.empty(1001)
    _native.convert(single, 11, double, 12)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(single, double.astype(np.float32))
    _native.convert(back, 12, single, 11)
    np.testing.assert_array_equal(back, single.astype(np.float64))
    with pytest.raises(TypeError, match="no conversion"):
        _native.convert(single, 11, np.zeros(1001, np.int32), 6)
    with pytest.raises(ValueError, match="elements"):
        _native.convert(single, 11, double[1:], 12)


@pytest.mark.parametrize("to", [*HALVES, np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize("source", [*HALVES, np.dtype(np.float32), np.dtype(np.float64)], ids=str)
def test_convert_rounds_as_numpy_does(kernels: Kernels, source: np.dtype, to: np.dtype) -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.standard_normal(1001) * 10.0**k for k in (-8, -4, 0, 4, 8)])
    with np.errstate(all="ignore"):
        x = np.concatenate([values, [0.0, -0.0, np.inf, -np.inf]]).astype(source)
        wanted = x.astype(to)
    out = np.empty(x.shape, to)
    kernels.convert(out, x)
    assert out.tobytes() == wanted.tobytes()


@needs_native
@pytest.mark.parametrize("variant", PROVIDERS[1:])
def test_copy_at_every_offset(variant: str) -> None:
    best = _native.cpu_features()
    _native.select_variant(variant)
    source = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    for size in (0, 1, 15, 16, 127, 128, 129, 255, 511, 512, 513, 1023, 4001):
        for to, start in ((0, 0), (1, 0), (0, 7), (63, 64), (16, 3)):
            target = np.zeros(5000, np.uint8)
            _native.copy(target[to : to + size], source[start : start + size])
            np.testing.assert_array_equal(target[to : to + size], source[start : start + size])
            assert not target[:to].any()
            assert not target[to + size :].any()
    _native.select_variant(best)


@needs_native
def test_bad_arguments_of_the_module() -> None:
    data = np.zeros(4, np.float32)
    for arguments, error in (
        ((data, data[1:], 11, 1, False), ValueError),
        ((data, data, 15, 1, False), ValueError),
        ((data, data, 11, 2, False), ValueError),
        ((data, data, 11, 1), TypeError),
        ((b"1234", data[:1], 11, 1, False), BufferError),
        ((data[::2], data[::2], 11, 1, False), (ValueError, BufferError)),
        ((np.zeros(3, np.uint8), np.zeros(3, np.uint8), 11, 1, False), ValueError),
    ):
        with pytest.raises(error):
            _native.reduce(*arguments)
    with pytest.raises(ValueError, match="variant"):
        _native.select_variant("mmx")


def test_load_without_the_native_module() -> None:
    assert native.load(enabled=False).name == "numpy"
    reason = native.why_unavailable()
    assert (native.load().name == "numpy") == (reason is not None)
