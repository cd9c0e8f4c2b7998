"""Whether each rank of a node has a core of its own."""

import threading

import pytest

from hvdkit.transport import cores
from hvdkit.transport.cores import cpu_quota, have_own_cores

from .worlds import on_ranks

INFINITE = float("inf")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("max 100000\n", INFINITE), ("150000 100000\n", 1.5), ("400000 100000", 4), ("rubbish", None)],
)
def test_control_groups_version_2(tmp_path, text, wanted):
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path) == (INFINITE if wanted is None else wanted)


@pytest.mark.parametrize(
    ("quota", "period", "wanted"),
    [
        ("-1\n", "100000\n", INFINITE),
        ("200000\n", "100000\n", 2),
        ("50000", "100000", 0.5),
        ("50000", "0", INFINITE),
        ("x", "100000", INFINITE),
        ("50000", None, INFINITE),
    ],
)
def test_control_groups_version_1(tmp_path, quota, period, wanted):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    if period is not None:
        (tmp_path / "cpu/cpu.cfs_period_us").write_text(period)
    assert cpu_quota(tmp_path) == wanted


def test_no_control_group(tmp_path):
    assert cpu_quota(tmp_path) == INFINITE
    assert cpu_quota(tmp_path / "nowhere") == INFINITE


def own_cores(monkeypatch, bindings, quotas):
    """What the ranks find, where rank r may use the cores ``bindings[r]``."""
    here = threading.local()
    monkeypatch.setattr(
        cores.os, "sched_getaffinity", lambda _: set(bindings[here.rank]), raising=False
    )
    monkeypatch.setattr(cores, "cpu_quota", lambda: quotas[here.rank])

    def body(transport):
        here.rank = transport.rank
        return have_own_cores(transport)

    found = on_ranks(len(bindings), body)
    assert len(set(found)) == 1, "ranks must not come to different conclusions"
    return found[0]


@pytest.mark.parametrize(
    ("bindings", "quotas", "wanted"),
    [
        ([{0}], [INFINITE], True),
        ([{0, 1}, {0, 1}], [INFINITE] * 2, True),
        ([{0}, {1}], [INFINITE] * 2, True),
        ([{1}, {1}], [INFINITE] * 2, False),
        ([{0, 1}] * 3, [INFINITE] * 3, False),
        ([{0, 1}, {0, 1}, {2}], [INFINITE] * 3, True),
        ([{0, 1, 2, 3}] * 2, [1.5, 1.5], False),
        ([{0, 1, 2, 3}] * 2, [2.0, 2.0], True),
        ([{0, 1}] * 2, [INFINITE, 1.0], False),
    ],
)
def test_have_own_cores(monkeypatch, bindings, quotas, wanted):
    assert own_cores(monkeypatch, bindings, quotas) is wanted


def test_without_affinity_all_cores_count(monkeypatch):
    monkeypatch.delattr(cores.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(cores, "cpu_quota", lambda: INFINITE)
    assert on_ranks(3, have_own_cores) == [True] * 3
    assert on_ranks(4, have_own_cores) == [False] * 4
