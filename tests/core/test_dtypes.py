"""What is defined for what."""

import numpy as np
import pytest

import hvdkit as hvd
from hvdkit.dtypes import DTYPE_CODES, DTYPES, FLOATS, ReduceOp, as_op, bfloat16, check_supported
from hvdkit.errors import ArgumentError, UnsupportedError

NAMES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
]


def test_the_codes_are_the_positions():
    """The native module has the same order compiled in."""
    assert [dtype.name for dtype in DTYPES] == NAMES
    assert [DTYPE_CODES[dtype] for dtype in DTYPES] == list(range(len(NAMES)))


def test_the_numbers_are_horovods():
    ops = (hvd.Average, hvd.Sum, hvd.Adasum, hvd.Min, hvd.Max, hvd.Product)
    assert [int(op) for op in ops] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("op", list(ReduceOp))
def test_an_op_may_be_a_member_its_number_or_its_name(op):
    assert as_op(op) is op
    assert as_op(int(op)) is op
    assert as_op(str(op)) is op
    assert as_op(op.name.lower()) is op


@pytest.mark.parametrize("op", ["median", "", 6, 99, None, 1.5, [], object()])
def test_an_unknown_op_lists_the_known_ones(op):
    with pytest.raises(ArgumentError, match="known are Average, Sum, Adasum, Min, Max, Product"):
        as_op(op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [None, *ReduceOp], ids=str)
def test_what_is_defined(dtype, op):
    undefined = (
        (dtype.kind == "b" and op is hvd.Average)
        or (dtype.kind == "c" and op in (hvd.Min, hvd.Max))
        or (op is hvd.Adasum and dtype not in FLOATS)
    )
    if undefined:
        with pytest.raises(UnsupportedError, match=r"is (not )?defined for"):
            check_supported(dtype, op)
    else:
        check_supported(dtype, op)


@pytest.mark.parametrize("dtype", ["S3", "U2", "O", "datetime64[s]", ">f4", "longdouble", "V2"])
def test_a_dtype_that_is_not_carried_lists_those_that_are(dtype):
    with pytest.raises(UnsupportedError, match=r"not supported; supported are bool.*bfloat16"):
        check_supported(np.dtype(dtype))


def test_structured_dtypes_are_refused():
    with pytest.raises(UnsupportedError):
        check_supported(np.dtype([("a", "f4"), ("b", "i4")]))


def test_bfloat16_is_ml_dtypes_own():
    assert bfloat16.itemsize == 2
    assert np.ones(1, bfloat16).dtype == bfloat16
