"""Run under mpirun where there is a GPU, which ranks may share; elsewhere all is skipped.

As in tests/mpi, every rank runs the same tests, and one rank's failure ends them all.
"""

import pytest

try:
    import torch

    HAVE_GPU = torch.cuda.is_available()
except ImportError:
    HAVE_GPU = False

if HAVE_GPU:
    from mpi.conftest import (  # noqa: F401  (pytest finds them here)
        pytest_collectreport,
        pytest_configure,
        pytest_runtest_logreport,
    )

    import hvdkit as hvd

    torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())


def pytest_sessionfinish(session, exitstatus):
    """Nothing to do is no failure here."""
    if not HAVE_GPU and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture(autouse=True)
def no_wait_for_the_whole_device(monkeypatch):
    """Let hvdkit, and the tests, do without."""

    def refuse(*_):
        raise AssertionError("a wait for the whole device")

    if HAVE_GPU:
        monkeypatch.setattr(torch.cuda, "synchronize", refuse)
