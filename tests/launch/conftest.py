import tempfile
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def source_on_path(monkeypatch):
    """Jobs import the source beside these tests."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


@pytest.fixture
def shm_dir(monkeypatch):
    """A directory of its own for a job's shared memory, in a tmpfs."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no /dev/shm")
    with tempfile.TemporaryDirectory(prefix="hvdkit-test-", dir="/dev/shm") as directory:
        monkeypatch.setenv("HVDKIT_SHM_DIR", directory)
        yield Path(directory)
