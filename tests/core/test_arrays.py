"""What counts as an array."""

import array

import numpy as np
import pytest

from hvdkit.arrays import Results, as_array, writable
from hvdkit.errors import UnsupportedError


class OnlyDLPack:
    """An array that shows its memory by DLPack and by nothing else."""

    def __init__(self, data):
        self._data = data

    def __dlpack__(self, **options):
        return self._data.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._data.__dlpack_device__()


def test_a_numpy_array_is_itself():
    data = np.arange(3)
    assert as_array(data) is data


def test_dlpack_is_read_in_place():
    data = np.arange(6.0).reshape(2, 3)
    seen = as_array(OnlyDLPack(data))
    np.testing.assert_array_equal(seen, data)
    assert np.shares_memory(seen, data)


@pytest.mark.parametrize("kind", [memoryview, lambda b: b])
def test_the_buffer_protocol_is_read_in_place(kind):
    data = array.array("f", [1, 2, 3])
    seen = as_array(kind(data))
    assert seen.dtype == np.float32
    assert seen.tolist() == [1, 2, 3]
    data[1] = 9
    assert seen[1] == 9


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        (2.5, np.array(2.5)),
        (True, np.array(True)),
        (3 + 4j, np.array(3 + 4j)),
        ([1, 2], np.array([1, 2])),
        ([[1.0], [2.0]], np.array([[1.0], [2.0]])),
        (np.float16(3), np.array(3, np.float16)),
        (range(3), np.arange(3)),
        ([], np.array([])),
    ],
)
def test_what_numpy_reads(x, wanted):
    seen = as_array(x)
    assert (seen.dtype, seen.shape) == (wanted.dtype, wanted.shape)
    np.testing.assert_array_equal(seen, wanted)


class OnAGPU:
    @property
    def __cuda_array_interface__(self):
        return {"shape": (3,), "typestr": "<f4", "data": (4096, False), "version": 3}


class OnAGPUByDLPack:
    def __dlpack__(self, **_options):
        raise BufferError("cannot be moved")

    def __dlpack_device__(self):
        return (2, 0)


def test_memory_of_a_gpu_is_refused_with_what_to_do():
    with pytest.raises(UnsupportedError, match="copy it to the host"):
        as_array(OnAGPU())
    with pytest.raises(UnsupportedError, match="OnAGPUByDLPack cannot be read as an array"):
        as_array(OnAGPUByDLPack())


@pytest.mark.parametrize("x", [None, object(), {"a": 1}, [object()], {1, 2}, len])
def test_what_is_no_array_of_numbers(x):
    with pytest.raises(UnsupportedError, match=f"{type(x).__name__} is not an array of numbers"):
        as_array(x)


def test_an_array_of_objects():
    with pytest.raises(UnsupportedError, match="not an array of numbers"):
        as_array([1, None])


def test_ragged_lists():
    with pytest.raises(UnsupportedError, match="list cannot be read as an array"):
        as_array([[1, 2], [3]])


class Stubborn:
    def __array__(self, *_, **__):
        raise TypeError("can't convert")


def test_an_error_of_the_arrays_own_is_the_cause():
    with pytest.raises(UnsupportedError, match="can't convert") as error:
        as_array(Stubborn())
    assert isinstance(error.value.__cause__, TypeError)


def test_writable_is_the_array_itself_whatever_its_strides():
    for data in (np.zeros(3), np.zeros((4, 4))[::2, 1:], np.zeros(0)):
        assert writable(data) is data


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (np.broadcast_to(0.0, 3), "read-only array"),
        ([1, 2], "list"),
        (2.5, "float"),
        (memoryview(bytearray(4)), "memoryview"),
        (np.float32(1), "float32"),
    ],
)
def test_what_cannot_be_changed_in_place(x, what):
    with pytest.raises(UnsupportedError, match=f"writable numpy array, not a {what}"):
        writable(x)


def test_a_large_results_memory_is_used_again_when_all_views_are_gone():
    results, dtype = Results(), np.dtype(np.float64)
    shape = (Results.LARGE // 64, 8)
    first = results.empty(shape, dtype)
    assert (first.shape, first.dtype) == (shape, dtype)
    address, part = first.ctypes.data, first[3:5].T
    del first
    second = results.empty(shape, dtype)
    assert not np.shares_memory(second, part)
    del part
    assert results.empty(shape, dtype).ctypes.data == address
    assert results.empty((shape[0] + 1, 8), dtype).ctypes.data != second.ctypes.data


def test_small_results_are_numpys():
    assert Results().empty((3, 0), np.dtype(np.int8)).base is None
