"""Too little shared memory, or none, is a warning and the slower way; not a crash."""

import ctypes
import os
import re
import subprocess

import pytest
from launching import run

from hvdkit import native

pytestmark = pytest.mark.skipif(
    native.why_unavailable() is not None, reason="without the native module there is no arena"
)

SUMS = """
    import numpy as np
    import hvdkit as hvd
    hvd.init()
    size = hvd.size()
    others = [hvd.empty((500, 7)) for _ in range(2)]
    buffer = hvd.empty((500, 7))
    buffer[...] = hvd.rank() + np.arange(7)
    hvd.allreduce_(buffer, op=hvd.Sum)
    assert (buffer == sum(range(size)) + size * np.arange(7)).all()
    x = np.arange(300_000.0) + hvd.rank()
    assert (hvd.allreduce(x, op=hvd.Sum) == size * np.arange(300_000.0) + sum(range(size))).all()
    assert hvd.allgather(np.array([hvd.rank()])).tolist() == list(range(size))
    hvd.barrier()
    print(f"[rank {hvd.rank()} is right]")
"""


def run_sums(directory, ranks=2, **environment):
    outcome = run(SUMS, ranks, environment={"HVDKIT_SHM_DIR": str(directory)} | environment)
    assert outcome.status == 0, outcome.stderr
    assert len(re.findall(r"\[rank \d is right\]", outcome.stdout)) == ranks
    return outcome


@pytest.fixture
def little_tmpfs(tmp_path):
    """A tmpfs of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a tmpfs")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    try:
        yield tmp_path
        assert list(tmp_path.iterdir()) == []
    finally:
        detach = 2
        ctypes.CDLL(None).umount2(os.fsencode(tmp_path), detach)


def test_too_little_is_one_warning_and_right_results(little_tmpfs):
    outcome = run_sums(little_tmpfs)
    assert outcome.stderr.count("no shared memory: ") == 1
    assert f"cannot be had in {little_tmpfs}" in outcome.stderr
    assert "exchange messages instead" in outcome.stderr
    assert "--shm-size" in outcome.stderr


def test_enough_for_the_arena_but_not_for_a_buffer(little_tmpfs):
    """The arena of four-KiB slots fits in, buffers of 2 x 14 kB besides do not for long."""
    outcome = run_sums(little_tmpfs, HVDKIT_SHM_SLOT="4096")
    assert "a buffer is in private memory instead" in outcome.stderr
    assert "no shared memory" not in outcome.stderr


def test_a_directory_that_does_not_exist(tmp_path):
    outcome = run_sums(tmp_path / "nowhere")
    assert outcome.stderr.count("no shared memory: ") == 1
    assert "No such file or directory" in outcome.stderr


def test_shared_memory_turned_off_is_no_warning(tmp_path):
    outcome = run_sums(tmp_path / "nowhere", HVDKIT_SHM="0")
    assert "no shared memory" not in outcome.stderr
