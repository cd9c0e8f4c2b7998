"""What would hang elsewhere is an error on every rank, which shows what each rank had."""

import numpy as np
import pytest

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.engine.bucketing import Gradient

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="one rank cannot disagree with itself")

ALGORITHMS = ["auto", "ring", "tree", "mpi"]


def assert_still_works():
    """The ranks are in step after an error, and the next call is right."""
    result = hvd.allreduce(np.arange(5.0), op=hvd.Sum)
    np.testing.assert_array_equal(result, np.arange(5.0) * SIZE)


@several
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_shape(algorithm):
    mine = np.zeros((512, 32 if RANK == 1 else 64), np.float32)
    with pytest.raises(hvd.MismatchError) as error:
        hvd.allreduce(mine, name="grad.fc1.weight", algorithm=algorithm)
    message = str(error.value)
    assert "allreduce 'grad.fc1.weight': ranks disagree on the shape" in message
    assert "float32 (512, 64)" in message
    assert "rank 1:" in message
    assert "float32 (512, 32)" in message
    assert_still_works()


@several
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_dtype(algorithm):
    with pytest.raises(hvd.MismatchError, match="disagree on the dtype"):
        hvd.allreduce(np.zeros(4, np.float64 if RANK == 0 else np.float32), algorithm=algorithm)
    assert_still_works()


@several
def test_op_and_scale_and_algorithm():
    with pytest.raises(hvd.MismatchError, match="disagree on the op"):
        hvd.allreduce(np.zeros(4), op=hvd.Sum if RANK else hvd.Max)
    with pytest.raises(hvd.MismatchError, match="disagree on the postscale_factor"):
        hvd.allreduce(np.zeros(4), postscale_factor=1.0 + RANK)
    with pytest.raises(hvd.MismatchError, match="disagree on the algorithm"):
        hvd.allreduce(np.zeros(4), algorithm="ring" if RANK else "tree")
    assert_still_works()


@several
def test_names():
    with pytest.raises(hvd.MismatchError, match="different names"):
        hvd.allreduce(np.zeros(4), name=f"tensor.{RANK}")
    assert_still_works()


@several
def test_different_collectives():
    with pytest.raises(hvd.MismatchError, match="different collectives") as error:
        if RANK == 0:
            hvd.barrier()
        elif RANK == 1:
            hvd.allgather(np.zeros(3))
        else:
            hvd.allreduce(np.zeros(3))
    assert "rank 0" in str(error.value)
    assert "barrier" in str(error.value)
    assert_still_works()


@several
def test_root():
    with pytest.raises(hvd.MismatchError, match="disagree on the root_rank"):
        hvd.broadcast(np.zeros(4), root_rank=min(RANK, 1))
    assert_still_works()


@several
@pytest.mark.parametrize("algorithm", ["auto", "ring", "mpi"])
def test_trailing_dimensions_of_allgather(algorithm):
    with pytest.raises(hvd.MismatchError, match=r"disagree on the shape[\s\S]*\(any, 3\)"):
        hvd.allgather(np.zeros((RANK, 3 + (RANK == SIZE - 1))), algorithm=algorithm)
    assert_still_works()


@several
def test_one_rank_cannot_make_the_call():
    """The rank at fault gets its own error; the others learn why they need not wait."""
    x = np.zeros(2 * SIZE)
    splits = [3, *[2] * (SIZE - 1)] if RANK == 1 else [2] * SIZE
    with pytest.raises(hvd.ArgumentError if RANK == 1 else hvd.MismatchError) as error:
        hvd.alltoall(x, splits)
    assert f"sum up to {2 * SIZE + 1}, but the array has {2 * SIZE} rows" in str(error.value)
    with pytest.raises(hvd.UnsupportedError if RANK == 0 else hvd.MismatchError, match="datetime"):
        hvd.allreduce(np.zeros(3, "datetime64[s]" if RANK == 0 else "f4"))
    assert_still_works()


@several
def test_models_that_differ():
    width = 4 if RANK == 1 else 8
    with pytest.raises(hvd.MismatchError) as error:
        context().gradient_reducer(
            [
                Gradient("fc1.weight", (3, 5), np.dtype("f4")),
                Gradient("fc2.weight", (width, 3), np.dtype("f4")),
            ]
        )
    assert "differ at gradient fc2.weight" in str(error.value)
    assert "float32 (4, 3)" in str(error.value)
    assert_still_works()


def test_arguments():
    x = np.zeros(4)
    with pytest.raises(hvd.ArgumentError, match="Average, Sum, Adasum, Min, Max, Product"):
        hvd.allreduce(x, op="median")
    with pytest.raises(hvd.ArgumentError, match=r"unknown allreduce algorithm 'rnig'.*auto.*ring"):
        hvd.allreduce(x, algorithm="rnig")
    with pytest.raises(hvd.ArgumentError, match=f"ranks are 0 to {SIZE - 1}"):
        hvd.broadcast(x, root_rank=SIZE)
    with pytest.raises(hvd.ArgumentError, match="ranks are"):
        hvd.broadcast(x, root_rank=-1)
    with pytest.raises(hvd.ArgumentError, match="entries for"):
        hvd.alltoall(x, [4] * (SIZE + 1))
    with pytest.raises(hvd.ArgumentError, match="negative"):
        hvd.alltoall(np.zeros(SIZE), [*[1] * (SIZE - 1), -1])
    with pytest.raises(hvd.ArgumentError, match="at least one dimension"):
        hvd.alltoall(np.float32(1))
    with pytest.raises(hvd.ArgumentError, match="at least one dimension"):
        hvd.reducescatter(np.float32(1))
    if SIZE > 1:
        with pytest.raises(hvd.ArgumentError, match="cannot be shared equally"):
            hvd.alltoall(np.zeros(SIZE + 1))
    assert_still_works()


@pytest.mark.parametrize("dtype", ["datetime64[s]", "S3", ">f4", "longdouble"])
def test_dtypes_that_are_not_supported(dtype):
    with pytest.raises(hvd.UnsupportedError, match="is not supported; supported are bool"):
        hvd.allreduce(np.zeros(3, dtype))
    assert_still_works()


def test_operations_that_are_not_defined():
    with pytest.raises(hvd.UnsupportedError, match="no order"):
        hvd.allreduce(np.zeros(3, np.complex64), op=hvd.Max)
    with pytest.raises(hvd.UnsupportedError, match="Average is not defined for bool"):
        hvd.allreduce(np.zeros(3, bool))
    with pytest.raises(hvd.UnsupportedError, match="not an array of numbers"):
        hvd.allreduce(object())
    with pytest.raises(hvd.UnsupportedError, match="writable"):
        hvd.allreduce_(np.broadcast_to(0.0, 3))
    with pytest.raises(hvd.UnsupportedError, match="writable numpy array, not a list"):
        hvd.broadcast_([1, 2])
    assert_still_works()


def test_shm_that_cannot_be_had():
    if context().group.arena is not None:
        pytest.skip("there is shared memory")
    why = "HVDKIT_(NATIVE|SHM)=0|the ranks are on several nodes"
    with pytest.raises(hvd.ArgumentError, match=f"'shm' cannot be had here: ({why})"):
        hvd.allreduce(np.zeros(3), algorithm="shm")
    assert_still_works()


def test_init_again():
    hvd.init()
    assert hvd.is_initialized()
    with pytest.raises(hvd.ArgumentError, match="initialised already"):
        hvd.init(comm=object())
