"""The counters: nothing is lost, whoever counts, and what is shown can be printed and stored."""

import json
import threading

import numpy as np

from hvdkit.engine.stats import Stats


def counted(operations, nbytes, seconds):
    return {"operations": operations, "bytes": nbytes, "seconds": seconds}


def test_nothing_counted():
    assert Stats().snapshot() == {}


def test_sums_by_kind_dtype_and_algorithm():
    stats = Stats()
    stats.add("allreduce", "float32", "shm", operations=1, nbytes=4, seconds=0.25)
    stats.add("allreduce", "float32", "shm", operations=2, nbytes=8, seconds=0.5)
    stats.add("allreduce", "float32", "ring", operations=1, nbytes=1000, seconds=1.0)
    stats.add("allreduce", "bfloat16", "ring", operations=5, nbytes=10, seconds=0.125)
    stats.add("barrier", "none", "shm", operations=7, nbytes=0, seconds=2.0)
    assert stats.snapshot() == {
        "allreduce": {
            "total": counted(9, 1022, 1.875),
            "bfloat16": {"ring": counted(5, 10, 0.125)},
            "float32": {"ring": counted(1, 1000, 1.0), "shm": counted(3, 12, 0.75)},
        },
        "barrier": {"total": counted(7, 0, 2.0), "none": {"shm": counted(7, 0, 2.0)}},
    }


def test_order_does_not_depend_on_what_came_first():
    stats = Stats()
    for kind, dtype, algorithm in [
        ("b", "z", "y"),
        ("a", "z", "x"),
        ("b", "d", "y"),
        ("b", "z", "a"),
    ]:
        stats.add(kind, dtype, algorithm, operations=1, nbytes=1, seconds=0.0)
    shown = stats.snapshot()
    assert list(shown) == ["a", "b"]
    assert list(shown["b"]) == ["total", "d", "z"]
    assert list(shown["b"]["z"]) == ["a", "y"]


def test_a_snapshot_is_json_whatever_numbers_were_added():
    stats = Stats()
    stats.add(
        "allgather",
        "int64",
        "bruck",
        operations=np.int64(1),
        nbytes=np.uint64(2**40),
        seconds=np.float32(0.5),
    )
    shown = stats.snapshot()
    assert json.loads(json.dumps(shown)) == shown
    assert shown["allgather"]["total"] == counted(1, 2**40, 0.5)


def test_a_snapshot_stays_as_it_was():
    stats = Stats()
    stats.add("allreduce", "float32", "shm", operations=1, nbytes=4, seconds=0.0)
    shown = stats.snapshot()
    stats.add("allreduce", "float32", "shm", operations=1, nbytes=4, seconds=0.0)
    shown["allreduce"]["total"]["operations"] = 99
    assert shown["allreduce"]["float32"]["shm"] == counted(1, 4, 0.0)
    assert stats.snapshot()["allreduce"]["total"] == counted(2, 8, 0.0)


def test_threads_lose_nothing():
    stats = Stats()

    def work():
        for _ in range(2000):
            stats.add("allreduce", "float32", "shm", operations=1, nbytes=3, seconds=0.5)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats.snapshot()["allreduce"]["total"] == counted(8000, 24000, 4000.0)


class Elsewhere:
    """Counters that another module keeps."""

    def __init__(self, *counts):
        self.counts = list(counts)

    def __call__(self):
        return iter(self.counts)


def test_sources_are_folded_in():
    stats = Stats()
    stats.add("allreduce", "float32", "ring", operations=1, nbytes=4, seconds=1.0)
    one = Elsewhere(
        ("allreduce", "float32", "shm", 3, 12, 0.5), ("barrier", "none", "shm", 2, 0, 0.5)
    )
    two = Elsewhere(("allreduce", "float32", "shm", 1, 100, 0.25))
    stats.register(one)
    stats.register(two)
    shown = stats.snapshot()
    assert shown["allreduce"]["float32"]["shm"] == counted(4, 112, 0.75)
    assert shown["allreduce"]["total"] == counted(5, 116, 1.75)
    assert shown["barrier"]["total"] == counted(2, 0, 0.5)
    two.counts = [("allreduce", "float32", "shm", 2, 200, 0.5)]
    assert stats.snapshot()["allreduce"]["float32"]["shm"] == counted(5, 212, 1.0)


def test_a_source_that_goes_leaves_what_it_has_counted():
    stats = Stats()
    source = Elsewhere(("allreduce", "float32", "shm", 3, 12, 0.25))
    other = Elsewhere(("allreduce", "float32", "shm", 1, 4, 0.5))
    stats.register(source)
    stats.register(other)
    stats.unregister(source)
    source.counts = [("allreduce", "float32", "shm", 100, 400, 9.0)]
    assert stats.snapshot()["allreduce"]["float32"]["shm"] == counted(4, 16, 0.75)
    other.counts = [("allreduce", "float32", "shm", 2, 8, 1.0)]
    assert stats.snapshot()["allreduce"]["float32"]["shm"] == counted(5, 20, 1.25)
