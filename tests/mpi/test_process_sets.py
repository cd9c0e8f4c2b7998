"""Process sets between processes: every collective, sets that overlap, errors on every rank."""

import pickle

import numpy as np
import pytest

import hvdkit as hvd
from hvdkit.process_sets import global_process_set

RANK, SIZE = hvd.rank(), hvd.size()


@pytest.fixture
def sets():
    """The even ranks, the ranks but the last, and each rank alone, where these differ."""
    wanted = [tuple(range(0, SIZE, 2)), tuple(range(SIZE - 1)), *((rank,) for rank in range(SIZE))]
    distinct = [ranks for ranks in dict.fromkeys(wanted) if 0 < len(ranks) < SIZE]
    known = [hvd.add_process_set(ranks) for ranks in distinct]
    yield known
    for process_set in known:
        assert hvd.remove_process_set(process_set)
        assert process_set.process_set_id is None


def test_every_collective(sets):
    for process_set in sets:
        ranks = process_set.ranks
        assert process_set.included() == (RANK in ranks)
        assert process_set.size() == len(ranks)
        if RANK not in ranks:
            assert process_set.rank() is None
            with pytest.raises(hvd.ArgumentError, match=r"not in the process set of ranks? "):
                hvd.allreduce(np.ones(2), process_set=process_set)
            continue
        assert ranks[process_set.rank()] == RANK
        x = np.arange(5.0) + RANK
        everyone = np.stack([np.arange(5.0) + rank for rank in ranks])
        assert np.allclose(hvd.allreduce(x, process_set=process_set), everyone.mean(0))
        assert np.allclose(
            hvd.allreduce(x, op=hvd.Sum, algorithm="ring", process_set=process_set), everyone.sum(0)
        )
        mine = x.copy()
        hvd.allreduce_(mine, op=hvd.Max, process_set=process_set)
        assert np.array_equal(mine, everyone.max(0))
        assert np.array_equal(hvd.allgather(x, process_set=process_set), everyone.ravel())
        root = ranks[-1]
        assert np.array_equal(hvd.broadcast(x, root, process_set=process_set), everyone[-1])
        rows = np.repeat(x[:1], len(ranks))
        received = hvd.alltoall(rows, process_set=process_set)
        assert np.array_equal(received, everyone[:, 0])
        part = hvd.reducescatter(np.full(len(ranks), RANK), op=hvd.Sum, process_set=process_set)
        assert part.tolist() == [sum(ranks)]
        hvd.barrier(process_set=process_set)
        assert hvd.broadcast_object(RANK, ranks[0], process_set=process_set) == ranks[0]
        assert hvd.allgather_object({RANK}, process_set=process_set) == [{r} for r in ranks]


def test_a_root_outside_of_the_set(sets):
    for process_set in sets:
        if process_set.included():
            outside = next(rank for rank in range(SIZE) if rank not in process_set.ranks)
            with pytest.raises(hvd.ArgumentError, match=f"root_rank {outside} is not in"):
                hvd.broadcast(np.ones(2), outside, process_set=process_set)


def test_mismatches_stay_within_the_set(sets):
    for process_set in sets:
        if process_set.included() and process_set.size() > 1:
            with pytest.raises(hvd.MismatchError, match="shape"):
                hvd.allreduce(np.ones(2 + process_set.rank()), process_set=process_set)
    assert hvd.allreduce(np.ones(3), op=hvd.Sum).tolist() == [SIZE] * 3


def test_what_is_no_process_set():
    with pytest.raises(hvd.ArgumentError, match="ranks are 0 to"):
        hvd.add_process_set([0, SIZE])
    with pytest.raises(hvd.ArgumentError, match="is no process set"):
        hvd.add_process_set([])
    with pytest.raises(hvd.ArgumentError, match="there is a process set of ranks"):
        hvd.add_process_set(range(SIZE))
    with pytest.raises(hvd.ArgumentError, match="each rank once"):
        hvd.add_process_set([0, 0])
    assert not hvd.remove_process_set(global_process_set)
    assert not hvd.remove_process_set(hvd.ProcessSet([0]))
    with pytest.raises(hvd.ArgumentError, match="add_process_set"):
        hvd.allreduce(np.ones(1), process_set=hvd.ProcessSet([0]))


@pytest.mark.skipif(SIZE < 3, reason="needs three ranks")
def test_ranks_that_give_different_sets():
    with pytest.raises(hvd.MismatchError, match="ranks disagree on the ranks"):
        hvd.add_process_set([0, 1] if RANK else [0, 2])


def test_a_set_comes_back_after_it_was_removed():
    if SIZE == 1:
        return
    for _ in range(3):
        process_set = hvd.add_process_set([SIZE - 1])
        if process_set.included():
            assert hvd.allreduce(np.ones(1), process_set=process_set) == 1
        assert hvd.remove_process_set(process_set)


def test_all_ranks():
    assert global_process_set.ranks == list(range(SIZE))
    assert global_process_set.rank() == RANK
    assert hvd.allreduce(np.ones(1), op=hvd.Sum, process_set=global_process_set) == SIZE
    assert pickle.loads(pickle.dumps(global_process_set)) is global_process_set
