"""What HVDKIT_LOG_LEVEL lets one read, without a word of Python's logging in the script."""

import re

import pytest
from launching import run

SCRIPT = """
import logging
import sys
import numpy as np
import hvdkit as hvd

{before}
hvd.init()
{after}
for _ in range(2):
    hvd.allreduce(np.ones(1000, np.float32), name="loss")
hvd.shutdown()
print(len(logging.getLogger("hvdkit").handlers), "left")
"""
OWN = 'logging.basicConfig(format="mine: %(message)s")'


def logged(level, *, before="", after=""):
    """Return the lines of a job of two ranks, and check how it ended."""
    script = SCRIPT.format(before=before, after=after)
    outcome = run(script, 2, environment={"HVDKIT_LOG_LEVEL": level, "HVDKIT_TUNING_FILE": "off"})
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout == "0 left\n" * 2
    return [line for line in outcome.stderr.splitlines() if "hvdkit" in line or "mine" in line]


def test_by_default_nothing_is_said():
    assert logged("warning") == []


def test_at_info_rank_0_tells_of_the_job():
    lines = logged("info")
    assert all(line.startswith("INFO:hvdkit: rank 0: ") for line in lines)
    said = "\n".join(line.removeprefix("INFO:hvdkit: rank 0: ") for line in lines)
    assert re.match(r"2 ranks on one node, over MPI \(.+\): ", said)
    assert "\nkernels: " in said
    assert re.search(r"^they share (memory in /|no memory: )", said, re.MULTILINE)
    assert "\nalgorithms are picked by the defaults: " in said
    assert re.search(r"^segments of \d+ bytes, buckets of 26214400$", said, re.MULTILINE)


def test_at_debug_each_rank_tells_its_place_and_an_algorithm_is_told_once():
    lines = logged("debug")
    for rank in range(2):
        place = rf"DEBUG:hvdkit: rank {rank}: process \d+ on \S+, local rank {rank} of 2, "
        assert sum(re.match(place, line) is not None for line in lines) == 1
    picked = [line for line in lines if "allreduce 'loss'" in line]
    assert len(picked) == 1
    assert re.match(r"DEBUG:hvdkit: rank 0: allreduce 'loss' of 4000 bytes runs by \w+$", picked[0])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_script_with_handlers_of_its_own_hears_everything_once(when):
    lines = logged("debug", **{when: OWN})
    assert [line for line in lines if "allreduce" in line] == [
        next(line for line in lines if line.startswith("mine: allreduce 'loss' of 4000 bytes"))
    ]
    assert any(line.startswith("mine: kernels") for line in lines) == (when == "before")
