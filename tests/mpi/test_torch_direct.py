"""Tensors in the MPI library's own hands: those of the CPU, taken for such as are on a device."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

import hvdkit.torch as hvd
from hvdkit.api import context

torch = pytest.importorskip("torch")

from hvdkit.torch import direct  # noqa: E402  (torch may be missing)

RANK, SIZE = hvd.rank(), hvd.size()
LENGTHS = (0, 1, 1000)

pytestmark = pytest.mark.skipif(context().kind != "mpi", reason="the ranks are not MPI processes")


@pytest.fixture
def on_device(monkeypatch):
    """Take tensors of the CPU for such as are on a device; return how often it was waited for."""
    waits = []
    stream = SimpleNamespace(synchronize=lambda: waits.append(None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(direct, "on_stream", lambda _: nullcontext())
    return waits


HOW = (hvd.Average, "x", 1.0, 1.0, "mpi")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average, hvd.Min, hvd.Max, hvd.Product])
def test_allreduce(on_device, dtype, in_place, op):
    for length in LENGTHS:
        mine = torch.full((length,), RANK + 1.0, dtype=dtype)
        how = (op, None, 2.0, 0.5, "mpi")
        result = direct.allreduce(context().world, mine, how, in_place=in_place)
        given = 2.0 * torch.arange(1.0, SIZE + 1)
        totals = {
            hvd.Sum: given.sum(),
            hvd.Average: given.mean(),
            hvd.Min: given.min(),
            hvd.Max: given.max(),
            hvd.Product: given.prod(),
        }
        wanted = torch.full((length,), float(totals[op]) / 2)
        torch.testing.assert_close(result, wanted.to(dtype))
        assert (result is mine) == in_place
        if not in_place:
            assert torch.all(mine == RANK + 1)
    assert len(on_device) == len(LENGTHS)


@pytest.mark.usefixtures("on_device")
def test_tensors_of_any_strides():
    whole = torch.full((4, 6), float(RANK))
    part = whole[:, ::2]
    assert direct.allreduce(context().world, part, HOW, in_place=True) is part
    assert torch.all(part == (SIZE - 1) / 2)
    assert torch.all(whole[:, 1::2] == RANK)
    assert direct.broadcast_(context().world, whole.t()[1:2], SIZE - 1, "b") is not None
    assert torch.all(whole[:, 1] == SIZE - 1)
    assert torch.all(whole[:, 3::2] == RANK)
    rows = torch.full((3, RANK + 1), float(RANK)).t()
    gathered = direct.allgather(context().world, rows, "g")
    wanted = [torch.full((rank + 1, 3), float(rank)) for rank in range(SIZE)]
    torch.testing.assert_close(gathered, torch.cat(wanted))


@pytest.mark.usefixtures("on_device")
def test_ranks_that_stage_make_the_same_calls():
    """One rank hands over the memory of its tensor, the others copies on the host."""
    tensor = torch.full((10,), RANK + 1.0, dtype=torch.bfloat16)
    rows = torch.full((RANK, 2), RANK)
    if RANK == SIZE - 1:
        mean = direct.allreduce(context().world, tensor, HOW, in_place=False)
        gathered = direct.allgather(context().world, rows, "g")
        direct.broadcast_(context().world, tensor, 0, "b")
    else:
        mean = hvd.allreduce(tensor, name="x", algorithm="mpi")
        gathered = hvd.allgather(rows, name="g", algorithm="mpi")
        hvd.broadcast_(tensor, 0, name="b", algorithm="mpi")
    assert torch.all(mean == (SIZE + 1) / 2)
    assert torch.equal(gathered, torch.cat([torch.full((r, 2), r) for r in range(SIZE)]))
    assert torch.all(tensor == 1)


@pytest.mark.usefixtures("on_device")
@pytest.mark.skipif(SIZE == 1, reason="one rank agrees with itself")
def test_a_tensor_of_which_ranks_disagree_stays_as_it_is():
    mine = torch.full((RANK + 1,), 3.0)
    with pytest.raises(hvd.MismatchError, match="disagree on the shape"):
        direct.allreduce(context().world, mine, (hvd.Sum, None, 2.0, 1.0, "mpi"), in_place=True)
    assert torch.all(mine == 3)


def test_what_the_library_is_trusted_with(monkeypatch):
    def on_gpu(dtype):
        return SimpleNamespace(is_cuda=True, is_floating_point=lambda: dtype.is_floating_point)

    aware = SimpleNamespace(cuda_aware=lambda: True)
    monkeypatch.setattr(direct, "load_mpi", lambda: aware)
    tensor = on_gpu(torch.float32)
    assert direct.moves(tensor, "mpi")
    assert not direct.moves(tensor, "auto")
    assert not direct.moves(torch.zeros(1), "mpi")
    assert direct.reduces(tensor, hvd.Sum, "mpi")
    assert not direct.reduces(on_gpu(torch.int32), hvd.Sum, "mpi")
    assert not direct.reduces(tensor, hvd.Adasum, "mpi")
    assert not direct.reduces(tensor, "no operation", "mpi")
    told = SimpleNamespace(kind="mpi", config=SimpleNamespace(cuda_aware=False))
    monkeypatch.setattr(direct, "context", lambda: told)
    assert not direct.moves(tensor, "mpi")
    aware.cuda_aware = lambda: False
    told.config.cuda_aware = True
    assert direct.moves(tensor, "mpi")
    told.kind = "tcp"
    assert not direct.moves(tensor, "mpi")
