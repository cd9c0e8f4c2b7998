"""Every collective against numpy, on ranks that are on several hosts.

    collectives_job.py SLOTS       such as alpha:2,beta:1, in the order of the ranks

Prints "[rank 2 on beta is right]" and the all-reduce's algorithms; a wrong rank ends the job.
"""

import os
import sys

import numpy as np

import hvdkit as hvd
from hvdkit.collectives.pick import known_algorithms
from hvdkit.collectives.reducescatter import rows_per_rank
from hvdkit.dtypes import bfloat16

#: Elements: none, fewer than ranks, odd numbers, and with float32 1 MiB.
COUNTS = (0, 1, 2, 1001, 16_384, 262_144)
DTYPES = (np.float32, np.float16, bfloat16, np.int64, np.uint8)
OPS = {hvd.Sum: np.sum, hvd.Min: np.min, hvd.Max: np.max, hvd.Product: np.prod}


def data_of(rank, count, dtype):
    """Return what `rank` gives: small whole numbers, exact in every dtype."""
    return ((np.arange(count) + 3 * rank) % 5 + (rank == 1)).astype(dtype)


def same(actual, wanted):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(wanted))


def algorithms(kind):
    """Return the names of those that can be had between these ranks."""
    return [name for name in known_algorithms(kind) if is_available(kind, name)]


def is_available(kind, name):
    given = () if kind == "barrier" else (np.zeros((hvd.size(), 1), np.float32),)
    try:
        getattr(hvd, kind)(*given, algorithm=name)
    except hvd.HvdkitError as exc:
        assert "cannot be had" in str(exc) or name == "mpi", exc
        return False
    return True


def check_places(slots):
    """Rank, size, local and cross ranks are those that the hosts' slots say."""
    places = [(host, local) for host, count in slots.items() for local in range(count)]
    host, local = places[hvd.rank()]
    alike = [other for other, count in slots.items() if count > local]
    assert os.uname().nodename == host, (os.uname().nodename, host)
    assert (hvd.size(), hvd.local_rank(), hvd.local_size()) == (len(places), local, slots[host])
    assert (hvd.cross_rank(), hvd.cross_size()) == (alike.index(host), len(alike))


def check_allreduce():
    for algorithm in algorithms("allreduce"):
        for dtype in DTYPES:
            for count in COUNTS:
                given = [data_of(rank, count, dtype) for rank in range(hvd.size())]
                for op, fold in OPS.items():
                    if op is not hvd.Sum and (count > 1001 or dtype is not np.float32):
                        continue
                    wanted = fold(np.stack(given).astype(np.float64), 0).astype(dtype)
                    same(hvd.allreduce(given[hvd.rank()], op=op, algorithm=algorithm), wanted)
    same(hvd.allreduce(np.arange(3.0) * hvd.rank()), np.arange(3.0) * (hvd.size() - 1) / 2)


def check_memory_that_ranks_share():
    x = hvd.empty(200_001, np.float32)
    for step in range(3):
        x[:] = hvd.rank() + step
        hvd.allreduce_(x, op=hvd.Sum)
        same(x, np.full(x.size, sum(range(hvd.size())) + step * hvd.size(), np.float32))


def check_others():
    size, rank = hvd.size(), hvd.rank()
    for algorithm in algorithms("broadcast"):
        for root in range(size):
            for count in COUNTS:
                mine = data_of(rank, count, np.float32)
                wanted = data_of(root, count, np.float32)
                same(hvd.broadcast(mine, root, algorithm=algorithm), wanted)
    for algorithm in algorithms("allgather"):
        for count in COUNTS:
            given = [data_of(other, count + other, np.int64) for other in range(size)]
            same(hvd.allgather(given[rank], algorithm=algorithm), np.concatenate(given))
    for algorithm in algorithms("reducescatter"):
        for count in COUNTS:
            total = sum(data_of(other, count, np.float32) for other in range(size))
            rows = rows_per_rank(count, size)
            start = sum(rows[:rank])
            mine = data_of(rank, count, np.float32)
            result = hvd.reducescatter(mine, op=hvd.Sum, algorithm=algorithm)
            same(result, total[start : start + rows[rank]])
    for algorithm in algorithms("alltoall"):
        for unit in (0, 1, 40_000):  # rank r sends unit x (r + s) elements to rank s
            sent = [[unit * (r + s) for s in range(size)] for r in range(size)]
            given = [data_of(r, sum(sent[r]), np.float32) for r in range(size)]
            parts = [np.split(given[r], np.cumsum(sent[r])[:-1]) for r in range(size)]
            received, counts = hvd.alltoall(given[rank], splits=sent[rank], algorithm=algorithm)
            same(received, np.concatenate([parts[r][rank] for r in range(size)]))
            same(counts, [sent[r][rank] for r in range(size)])
    for algorithm in algorithms("barrier"):
        hvd.barrier(algorithm=algorithm)


def check_names_sets_and_objects():
    """What is negotiated, with the ranks in different orders; sets of ranks; pickled objects."""
    size, rank = hvd.size(), hvd.rank()
    for name in ("a", "b", "c"):
        same(hvd.allreduce(np.full(9, float(rank)), name=name, op=hvd.Sum), [sum(range(size))] * 9)
    ends = hvd.add_process_set([0, size - 1] if size > 2 else [size - 1])
    if ends.included():
        result = hvd.allreduce(np.full(70_000, float(rank)), op=hvd.Sum, process_set=ends)
        same(result, np.full(70_000, size - 1.0))
    hvd.barrier()
    hvd.remove_process_set(ends)
    assert hvd.broadcast_object({"rank": rank}, size - 1) == {"rank": size - 1}
    names = hvd.allgather_object(os.uname().nodename)
    assert len(set(names)) == hvd.cross_size() or hvd.local_rank() > 0
    for _ in range(rank):  # ragged ends
        hvd.allreduce(np.ones(5), name="ragged", op=hvd.Sum)
    hvd.join()


def main():
    slots = {host: int(count) for host, count in (s.split(":") for s in sys.argv[1].split(","))}
    hvd.init()
    check_places(slots)
    result = hvd.allreduce(np.ones(2**18, np.float32), op=hvd.Sum)
    same(result, np.full(2**18, hvd.size()))
    picked = sorted(hvd.stats()["allreduce"]["float32"])
    check_allreduce()
    check_memory_that_ranks_share()
    check_others()
    check_names_sets_and_objects()
    sys.stdout.write(f"[rank {hvd.rank()} on {os.uname().nodename} is right: {' '.join(picked)}]\n")
    sys.stdout.flush()
    hvd.shutdown()


if __name__ == "__main__":
    main()
