"""Run by mpirun or tests/tcp_jobs.py: all ranks run the same tests; one failure ends them all."""

import os
import sys
import time

import pytest

import hvdkit as hvd
from hvdkit.api import context

hvd.init()

RANK, SIZE = hvd.rank(), hvd.size()
SECONDS_TO_FORWARD = 0.5  # what the launcher may need to pass a rank's last words on


def fail(where: str, why: str) -> None:
    """Say which rank failed and why, and end the job: the others would wait for this rank."""
    capture.suspend_global_capture(in_=True)
    sys.stderr.write(f"\n*** rank {RANK} of {SIZE} failed: {where}\n{why}\n")
    sys.stderr.flush()
    time.sleep(SECONDS_TO_FORWARD)
    context().abort(1)
    os._exit(1)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    global capture  # noqa: PLW0603
    capture = config.pluginmanager.getplugin("capturemanager")
    if RANK != 0:  # all ranks would print the same
        config.pluginmanager.unregister(name="terminalreporter")


def pytest_runtest_setup(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    missing = {
        "shm": context().group.arena is None,
        "hierarchical": context().group.hierarchy is None,
        "mpi": context().kind != "mpi",
    }
    if missing.get(parameters.get("algorithm")):
        pytest.skip("this algorithm cannot be had here")


def pytest_collectreport(report):
    if report.failed:
        fail(report.nodeid, str(report.longrepr))


def pytest_runtest_logreport(report):
    if report.failed and SIZE > 1:
        fail(report.nodeid, str(report.longrepr))
