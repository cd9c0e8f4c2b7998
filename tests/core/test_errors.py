"""How ranks are named in messages."""

import pytest

import hvdkit as hvd
from hvdkit.errors import describe_by_rank, format_ranks


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([0], "rank 0"),
        ([17], "rank 17"),
        ([0, 1], "ranks 0-1"),
        ([0, 2], "ranks 0, 2"),
        ([0, 2, 3, 4], "ranks 0, 2-4"),
        ([7, 0, 6, 2, 5, 4, 3], "ranks 0, 2-7"),
        (range(4096), "ranks 0-4095"),
        ([1, 3, 5], "ranks 1, 3, 5"),
    ],
)
def test_format_ranks(ranks, text):
    assert format_ranks(ranks) == text


def test_describe_by_rank_groups_equal_values_and_aligns_them():
    shown = describe_by_rank({2: "b", 0: "a", 1: "b", 3: "a"})
    assert shown == "  ranks 0, 3:  a\n  ranks 1-2:   b"


def test_describe_by_rank_puts_the_first_rank_first():
    lines = describe_by_rank({1: "one", 0: "zero", 2: "one"}).splitlines()
    assert lines == ["  rank 0:     zero", "  ranks 1-2:  one"]


def test_describe_nothing():
    assert describe_by_rank({}) == ""


def test_one_family():
    """A script that catches `HvdkitError`, or the builtin of that meaning, catches each."""
    for error, builtin in [
        (hvd.NotInitializedError, RuntimeError),
        (hvd.LauncherError, RuntimeError),
        (hvd.PeerError, RuntimeError),
        (hvd.ConfigError, ValueError),
        (hvd.ArgumentError, ValueError),
        (hvd.MismatchError, ValueError),
        (hvd.ScheduleError, ValueError),
        (hvd.UnsupportedError, TypeError),
    ]:
        assert issubclass(error, hvd.HvdkitError)
        assert issubclass(error, builtin)
