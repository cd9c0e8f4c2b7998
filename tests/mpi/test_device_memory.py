"""What a CUDA-aware MPI library is given, with addresses of CPU memory, which it takes too."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.transport.device import DeviceArray
from hvdkit.transport.opening import load_mpi

RANK, SIZE = hvd.rank(), hvd.size()
LENGTHS = (0, 1, 1000)

pytestmark = pytest.mark.skipif(context().kind != "mpi", reason="the ranks are not MPI processes")


# Whether the library can do it


def library_with(monkeypatch, **functions):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(**functions))


def test_the_library_at_hand_can_be_asked():
    assert load_mpi().cuda_aware() in (True, False)


@pytest.mark.parametrize("answer", [0, 1])
def test_open_mpi_and_mpich_say_so(monkeypatch, answer):
    library_with(monkeypatch, MPIX_Query_cuda_support=lambda: answer)
    assert load_mpi().cuda_aware() is bool(answer)


@pytest.mark.parametrize("answer", [0, 1])
def test_an_older_mpich_is_asked_for_a_kind(monkeypatch, answer):
    def query(kind, found):
        assert kind == 0  # CUDA, of what MPICH knows
        found._obj.value = answer

    library_with(monkeypatch, MPIX_GPU_query_support=query)
    assert load_mpi().cuda_aware() is bool(answer)


def test_a_library_that_cannot_be_asked(monkeypatch):
    library_with(monkeypatch)
    assert load_mpi().cuda_aware() is False


# What it is given


def memory(array):
    return DeviceArray(array.ctypes.data, array.shape, array.dtype)


def test_a_device_array_has_an_arrays_ways():
    array = np.arange(12, dtype="f4").reshape(3, 4)
    device = memory(array)
    assert (device.ndim, device.size, device.itemsize, device.nbytes) == (2, 12, 4, 48)
    assert device.reshape(-1) == memory(array.reshape(-1))
    assert device.view(np.uint8) == memory(array.reshape(-1).view(np.uint8))
    assert device.reshape(-1)[2:5] == memory(array.reshape(-1)[2:5])
    assert device.reshape(-1)[8:99] == memory(array.reshape(-1)[8:])
    assert device.__cuda_array_interface__ == {
        "shape": (3, 4),
        "typestr": "<f4",
        "data": (array.ctypes.data, False),
        "version": 3,
    }


@pytest.mark.parametrize("length", LENGTHS)
def test_broadcast_and_allgather(length):
    among = context().world
    data = np.full(length, RANK, "f8")
    root = SIZE - 1

    def broadcast(group):
        return hvd.collectives.broadcast(group, memory(data), root=root, name="b", algorithm="mpi")

    among.call(broadcast)
    np.testing.assert_array_equal(data, np.full(length, root))

    mine, made = np.full((length + RANK, 2), RANK, "i2"), []

    def allocate(shape, dtype):
        made.append(np.empty(shape, dtype))
        return memory(made[-1])

    def allgather(group):
        return hvd.collectives.allgather(
            group, memory(mine), name="g", algorithm="mpi", allocate=allocate
        )

    for _ in range(2):
        found = among.call(allgather)
        assert found == memory(made[-1])
        wanted = [np.full((length + rank, 2), rank) for rank in range(SIZE)]
        np.testing.assert_array_equal(made[-1], np.concatenate(wanted))
