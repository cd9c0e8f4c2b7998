"""Every interleaving of the arena's flag protocol is right, and planted faults are found."""

from __future__ import annotations

import pytest
from protocol_model import Body, Program, Rules, explore


def gathers(p: Program) -> None:
    for _ in range(3):
        p.gather()


def broadcasts(p: Program) -> None:
    """From one root after another, so that readers become fillers while others still read."""
    p.broadcast(0, pieces=3)
    p.broadcast(p.size - 1, pieces=2)
    p.broadcast(p.size - 1, pieces=3)
    p.gather()


def staged(p: Program) -> None:
    p.staged(pieces=3)
    p.broadcast(1, pieces=2)
    p.staged(pieces=1)


def regions(p: Program) -> None:
    p.in_region()
    p.in_region()
    p.gather()


def mixed(p: Program) -> None:
    p.gather()
    p.broadcast(1, pieces=3)
    p.in_region()
    p.staged(pieces=1)
    p.broadcast(0, pieces=2)
    p.in_region()


def barriers(p: Program) -> None:
    """Flags alone: what is read is no matter where the question is who sleeps and who wakes."""
    p.gather(read=False)
    p.gather(read=False)


def barrier_and_broadcast(p: Program) -> None:
    p.gather(read=False)
    p.broadcast(0, pieces=2)


PROGRAMS: dict[str, Body] = {
    body.__name__: body for body in (gathers, broadcasts, staged, regions, mixed)
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_reader_meets_a_writer_and_nobody_hangs(name: str, size: int) -> None:
    outcome = explore(size, PROGRAMS[name])
    assert not outcome.fault, outcome
    assert outcome.spread <= 2


@pytest.mark.parametrize("name", ["gathers", "broadcasts"])
def test_four_ranks(name: str) -> None:
    outcome = explore(4, PROGRAMS[name])
    assert not outcome.fault, outcome


def test_counters_are_apart_as_far_as_the_argument_says() -> None:
    """One round where all fill; two where the readers of a broadcast do not wait."""
    assert explore(3, gathers).spread == 1
    assert explore(3, broadcasts).spread == 2


def test_the_counters_may_wrap_around() -> None:
    """Three bits do, for counters that are two rounds apart; `mixed` has twelve rounds."""
    outcome = explore(3, mixed, Rules(modulus=8))
    assert not outcome.fault, outcome


@pytest.mark.parametrize(
    ("size", "body"),
    [(2, mixed), (2, broadcasts), (3, barriers), (3, barrier_and_broadcast)],
)
def test_no_wake_up_is_lost(size: int, body: Body) -> None:
    """Sleepers are woken without the help of a time limit, whatever signals come meanwhile."""
    outcome = explore(size, body, Rules(sleeps=True))
    assert not outcome.fault, outcome


# What is left out or turned round, in which program it shows, and as what.
FAULTS: list[tuple[str, Rules, Body, str]] = [
    ("[1] left out", Rules(begin_waits=False), broadcasts, "torn"),
    ("[2] post, then fill", Rules(fill_then_post=False), gathers, "torn"),
    ("[3] read without a wait", Rules(waits_for_post=False), gathers, "torn"),
    ("[4] posted a round too early", Rules(read_then_post=False), gathers, "torn"),
    ("[4] the same in a broadcast", Rules(read_then_post=False), broadcasts, "torn"),
    ("one slot buffer", Rules(buffers=1), gathers, "torn"),
    ("a region without its last round", Rules(region_has_last_round=False), regions, "torn"),
    ("a counter of two bits", Rules(modulus=4), broadcasts, "stuck"),
    ("look, then store", Rules(sleeps=True, store_then_look=False), barriers, "stuck"),
    ("a store that lingers", Rules(sleeps=True, store_waits=False), barriers, "stuck"),
    ("a sleep on whatever value", Rules(sleeps=True, sleep_compares=False), barriers, "stuck"),
    (
        "a sleep without any second look",
        Rules(sleeps=True, sleep_compares=False, looks_again=False),
        barriers,
        "stuck",
    ),
    ("one is woken of two", Rules(sleeps=True, wakes_all=False), barriers, "stuck"),
    ("waiters as a flag", Rules(sleeps=True, counts_waiters=False), barriers, "stuck"),
]


@pytest.mark.parametrize(
    ("rules", "body", "fault"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_a_planted_fault_is_found(rules: Rules, body: Body, fault: str) -> None:
    outcome = explore(3, body, rules)
    assert outcome.fault == fault, outcome
    assert outcome.trace


def test_the_comparison_of_the_futex_is_a_second_look_of_its_own() -> None:
    """Nothing is lost without the waiter's own: the kernel compares after the increment, too.

    The C code keeps its look nonetheless: it saves a system call, and compares with a fresh value.
    """
    outcome = explore(3, barriers, Rules(sleeps=True, looks_again=False))
    assert not outcome.fault, outcome
