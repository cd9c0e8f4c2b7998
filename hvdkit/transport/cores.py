"""Find out whether each rank of a node has a core of its own, so that waiting may spin."""

from __future__ import annotations

import os
from pathlib import Path

from hvdkit.transport.base import Transport


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return how many cores the control group grants, infinity if it sets no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        old = root / "cpu"
        micros = int((old / "cpu.cfs_quota_us").read_text())
        return micros / int((old / "cpu.cfs_period_us").read_text()) if micros > 0 else float("inf")
    except (OSError, ValueError, ZeroDivisionError):
        return float("inf")


def have_own_cores(local: Transport) -> bool:
    """Return whether the ranks of this node, bound as they are, can all run at once.  Collective.

    Args:
        local: the ranks of this node.
    """
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    everyone = local.allgather_object((mine or list(range(os.cpu_count() or 1)), cpu_quota()))
    cores = set().union(*(cores for cores, _ in everyone))
    return min(len(cores), *(quota for _, quota in everyone)) >= local.size
