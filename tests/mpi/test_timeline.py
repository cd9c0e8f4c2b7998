"""The timeline and the statistics of a job: what was done is there, on one clock, once."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

import hvdkit as hvd
from hvdkit.api import communicator

RANK, SIZE = hvd.rank(), hvd.size()


@pytest.fixture
def path():
    """A file name that all ranks share; rank 0 removes the folder."""
    folder = hvd.broadcast_object(tempfile.mkdtemp() if RANK == 0 else "")
    yield Path(folder, "trace.json")
    hvd.barrier()
    if RANK == 0:
        for file in Path(folder).iterdir():
            file.unlink()
        Path(folder).rmdir()


def busy_step():
    x = np.ones(1000, np.float32)
    handles = [
        communicator().allreduce_async([(x, np.empty_like(x))], name=f"part.{number}")
        for number in range(3)
    ]
    for handle in handles:
        handle.wait(20)
    hvd.allreduce(x, name="whole")
    hvd.allreduce(x, name="around", algorithm="ring")
    hvd.barrier()


def test_every_rank_is_in_one_file(path):
    busy_step()  # calls that were made before go the short way, and must show all the same
    hvd.start_timeline(path)
    busy_step()
    hvd.stop_timeline()
    busy_step()
    if RANK:
        return
    events = json.loads(path.read_text())
    events = events["traceEvents"] if isinstance(events, dict) else events
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in spans} == set(range(SIZE))
    for rank in range(SIZE):
        mine = [event for event in spans if event["pid"] == rank]
        names = [event["name"] for event in mine]
        assert names.count("allreduce 'whole'") == names.count("allreduce 'around'") == 1
        for number in range(3):
            assert names.count(f"negotiate allreduce 'part.{number}'") == 1
            assert names.count(f"queue allreduce 'part.{number}'") == 1
        (around,) = [event for event in mine if event["name"] == "allreduce 'around'"]
        steps = [
            event
            for event in mine
            if event["name"].startswith("step ")
            and around["ts"] <= event["ts"] <= around["ts"] + around["dur"]
        ]
        assert len(steps) == 2 * (SIZE - 1)
        (whole,) = [event for event in mine if event["name"] == "allreduce 'whole'"]
        assert whole["args"]["bytes"] == 4000
        assert whole["args"]["dtype"] == "float32"
        assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in mine)
    if SIZE > 1:
        # Nobody leaves an all-reduce before all have come: on one clock, the spans overlap.
        whole = [event for event in spans if event["name"] == "allreduce 'whole'"]
        latest = max(event["ts"] for event in whole)
        assert all(event["ts"] + event["dur"] >= latest - 500 for event in whole)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_twice_or_never(path):
    with pytest.raises(hvd.ArgumentError, match="no timeline"):
        hvd.stop_timeline()
    hvd.start_timeline(path)
    with pytest.raises(hvd.ArgumentError, match="already"):
        hvd.start_timeline(path)
    hvd.stop_timeline()
    with pytest.raises(hvd.ArgumentError, match="nowhere"):
        hvd.start_timeline("/nowhere/at/all.json")
    hvd.start_timeline(path)
    hvd.stop_timeline()


def test_statistics_count_each_call_once():
    def count(kind, dtype):
        by_algorithm = hvd.stats().get(kind, {}).get(dtype, {})
        return [
            sum(entry[what] for entry in by_algorithm.values()) for what in ("operations", "bytes")
        ]

    x = np.ones(7, np.int16)
    before = count("allreduce", "int16")
    for _ in range(5):
        hvd.allreduce(x, op=hvd.Sum)
        hvd.allreduce_(x.copy(), op=hvd.Sum, name="in place")
    after = count("allreduce", "int16")
    assert [b - a for a, b in zip(before, after, strict=True)] == [10, 140]
    before = count("broadcast", "int16")
    hvd.broadcast(x, 0)
    assert count("broadcast", "int16")[0] == before[0] + 1
    assert hvd.stats()["allreduce"]["total"]["seconds"] > 0
