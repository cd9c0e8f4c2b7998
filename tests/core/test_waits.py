"""Waits: who is late is named, who can never go on is found, and nobody else is accused."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdkit.collectives.calls import JOIN, Call
from hvdkit.engine.channel import Stage
from hvdkit.engine.waits import (
    Report,
    Wait,
    describe,
    describe_deadlock,
    find_deadlock,
    find_waits,
)

WORLD = "all ranks"
X = (0, "x")


def stage(operations, seconds=0.0, title="allreduce 'loss'", ranks=(0, 1, 2), awaited=True):
    return Stage(operations, title, seconds, awaited, ranks)


def report(stages=None, pending=None, awaited=(), idle=True, last=""):
    marks = dict.fromkeys(awaited, 77.0)
    return Report(stages or {}, pending or {}, marks, idle, last)


def a_wait(where=WORLD, title="allreduce 'loss'", seconds=5.0, **who):
    """Return a wait of the ranks `waiting` for those that are `late`."""
    who = {"blocked": who["waiting"], "certain": who["late"], "which": 0} | who
    ranks = tuple(sorted({*who["waiting"], *who["late"]}))
    return Wait(where=where, title=title, seconds=seconds, **{"ranks": ranks} | who)


# Who waits for whom


def test_nobody_waits():
    assert find_waits({}, {}) == []
    assert find_waits({rank: report({WORLD: stage(4)}) for rank in range(3)}, {}) == []


def test_ranks_in_a_call_wait_for_those_that_have_begun_fewer():
    reports = {
        0: report({WORLD: stage(5, 3.0)}),
        1: report({WORLD: stage(4, title="broadcast 'w'")}),
        2: report({WORLD: stage(5, 7.0)}),
    }
    assert find_waits(reports, {}) == [
        a_wait(waiting=(0, 2), late=(1,), ranks=(0, 1, 2), which=5, seconds=7.0),
    ]


def test_a_rank_that_is_still_in_the_call_before_is_late():
    """It has been told its last message, and has yet to look."""
    reports = {
        0: report({WORLD: stage(5, 3.0)}),
        1: report({WORLD: stage(4, 3.1)}),
        2: report({WORLD: stage(5, 2.9)}),
    }
    (wait,) = find_waits(reports, {})
    assert (wait.waiting, wait.late) == ((0, 2), (1,))


def test_a_rank_that_has_joined_waits_with_those_that_it_serves():
    """The call is theirs, and its name is worth more than that of joining."""
    reports = {
        0: report({WORLD: stage(5, 90.0, title=JOIN)}),
        1: report({WORLD: stage(5, 7.0)}),
        2: report({WORLD: stage(4)}),
    }
    (wait,) = find_waits(reports, {})
    assert (wait.title, wait.waiting, wait.seconds) == ("allreduce 'loss'", (1,), 7.0)
    assert (wait.blocked, wait.late) == ((0, 1), (2,))
    del reports[1]
    (wait,) = find_waits(reports, {})
    assert (wait.title, wait.waiting) == (JOIN, (0,))


def test_all_in_the_same_call_wait_for_nobody():
    """They are in its transfer, however long that takes."""
    (wait,) = find_waits({rank: report({WORLD: stage(5, 100.0)}) for rank in range(3)}, {})
    assert (wait.waiting, wait.late) == ((0, 1, 2), ())


def test_who_has_not_answered_or_does_not_know_the_channel_is_late():
    reports = {0: report({WORLD: stage(2, 9.0, ranks=(0, 1, 2, 3))}), 2: report()}
    (wait,) = find_waits(reports, {})
    assert wait.late == (1, 2, 3)
    assert wait.certain == ()  # one may have done its part and let go of the channel


def test_what_travels_while_nobody_waits_for_it_blocks_nobody():
    """A bucket of gradients, while the rank still computes the next one."""
    reports = {0: report({WORLD: stage(5, 3.0, awaited=False)}), 1: report({WORLD: stage(4)})}
    (wait,) = find_waits(reports, {})
    assert (wait.waiting, wait.blocked, wait.late) == ((0,), (), (1, 2))


def test_another_use_of_a_name_is_another_wait():
    first, second = (
        find_waits(
            {0: Report({}, {X: 3.0}, {X: mark}, True)}, {X: (Call("barrier", "x"), (0,), (1,))}
        )
        for mark in (55.0, 56.0)
    )
    assert first != second


def test_each_channel_is_by_itself():
    reports = {
        0: report({WORLD: stage(5, 1.0), "set 1": stage(9, ranks=(0, 2))}),
        1: report({WORLD: stage(4)}),
        2: report({WORLD: stage(4), "set 1": stage(10, 4.0, ranks=(0, 2))}),
    }
    waits = {wait.where: wait for wait in find_waits(reports, {})}
    assert (waits[WORLD].waiting, waits[WORLD].late) == ((0,), (1, 2))
    assert (waits["set 1"].waiting, waits["set 1"].late) == ((2,), (0,))


def test_named_operations_wait_for_who_has_not_announced_them():
    reports = {
        0: report(pending={X: 4.0, (0, "other"): 90.0}, awaited=[X]),
        1: report(),
        2: report(pending={X: 6.0}),
    }
    assert find_waits(reports, {X: (Call("allreduce", "x"), (0, 2), (1,))}) == [
        a_wait(X, "allreduce 'x'", 6.0, waiting=(0, 2), blocked=(0,), late=(1,), which=(77.0,))
    ]


def test_a_named_operation_of_ranks_that_have_not_answered():
    (wait,) = find_waits({0: report()}, {X: (Call("allreduce", "x"), (1, 2), (0,))})
    assert (wait.waiting, wait.blocked, wait.seconds) == ((1, 2), (), 0.0)


# Deadlock


def waiting(where, blocked, late):
    return a_wait(where, waiting=tuple(blocked), late=tuple(late))


def idle(*ranks):
    return {rank: report(idle=rank in ranks) for rank in range(4)}


@pytest.mark.parametrize(
    ("waits", "stuck"),
    [
        ([], []),
        ([waiting("a", [0], [1])], []),
        ([waiting("a", [0], [1]), waiting("b", [1], [0])], [0, 1]),
        ([waiting("a", [0, 1], [2]), waiting("b", [2], [3])], []),
        ([waiting("a", [0, 1], [2]), waiting("b", [2], [0])], [0, 1, 2]),
        ([waiting("a", [0], [1]), waiting("b", [1], [2]), waiting("c", [2], [0])], [0, 1, 2]),
        # Rank 3 waits for the circle and is in no circle itself; nor will it ever go on.
        ([waiting("a", [0, 3], [1]), waiting("b", [1], [0])], [0, 1, 3]),
        # One of rank 1's two waits may yet end: another thread of it goes on then.
        ([waiting("a", [0], [1]), waiting("b", [1], [0]), waiting("c", [1], [3])], []),
        # Both of rank 1's waits are hopeless.
        ([waiting("a", [0], [1]), waiting("b", [1], [0]), waiting("c", [1], [0])], [0, 1]),
        # Of those that are late, one alone is stuck: that is enough.
        ([waiting("a", [0], [1, 3]), waiting("b", [1], [0])], [0, 1]),
        ([waiting("a", [0, 1, 2], [])], []),
    ],
)
def test_who_can_never_go_on(waits, stuck):
    assert find_deadlock(idle(0, 1, 2, 3), waits) == stuck


def test_a_rank_in_its_own_code_may_yet_come():
    waits = [waiting("a", [0], [1]), waiting("b", [1], [0])]
    assert find_deadlock(idle(0, 2, 3), waits) == []


def test_a_rank_that_does_not_answer_may_yet_come():
    waits = [waiting("a", [0], [1]), waiting("b", [1], [0])]
    assert find_deadlock({0: report()}, waits) == []


ranks_of = st.sets(st.integers(0, 3), max_size=3)


@given(
    st.sets(st.integers(0, 3)),
    st.lists(st.tuples(ranks_of, ranks_of), max_size=6),
)
def test_it_is_the_largest_set_none_of_which_can_go_on(here, drawn):
    """By trying all sets: every wait of every rank in it is for somebody in it."""
    waits = [waiting(f"{i}", blocked, late) for i, (blocked, late) in enumerate(drawn)]
    found = set()
    for size in range(1, 5):
        for some in map(set, itertools.combinations(sorted(here), size)):
            theirs = [[wait for wait in waits if rank in wait.blocked] for rank in some]
            if all(mine and all(some & set(wait.late) for wait in mine) for mine in theirs):
                found |= some
    assert find_deadlock(idle(*here), waits) == sorted(found)


# Words


def test_a_stall_names_the_late_and_what_each_is_at():
    reports = {
        0: report({WORLD: stage(9, 63.2)}),
        1: report({WORLD: stage(8, title="broadcast 'w'")}, idle=False),
        2: report({WORLD: stage(8, title="broadcast 'w'"), "set 1": stage(3, 61.0, "barrier")}),
        3: report({WORLD: stage(8, title="broadcast 'w'")}, {X: 60.0}, [X]),
        5: report(),
    }
    wait = a_wait(seconds=63.2, waiting=(0,), late=(1, 2, 3, 4, 5))
    assert describe(wait, reports) == (
        "allreduce 'loss' is stalled: rank 0 waited 63 s for ranks 1-5\n"
        "  rank 1:  last did broadcast 'w' (operation 8 there); is in its own code\n"
        "  rank 2:  last did broadcast 'w' (operation 8 there); waits for barrier\n"
        "  rank 3:  last did broadcast 'w' (operation 8 there); waits for 'x'\n"
        "  rank 4:  does not answer\n"
        "  rank 5:  takes no part there any more; is in hvdkit\n"
        "Every rank must make the same calls; a rank with less data than the others calls join()."
    )


def test_ranks_that_do_the_same_share_a_line():
    reports = {rank: report(idle=False) for rank in range(4)}
    wait = a_wait(X, "allreduce 'x'", waiting=(0,), late=(1, 2, 3))
    shown = "\n  ranks 1-3:  has done nothing by name yet; is in its own code\n"
    assert shown in describe(wait, reports)


def test_what_a_late_rank_did_last_is_of_the_kind_that_is_waited_for():
    stages = {WORLD: stage(8, title="broadcast 'w'"), "gradients 0.1": stage(0)}
    reports = {1: report(stages, idle=False, last="allgather 'metrics'")}
    named = a_wait(X, "allreduce 'x'", waiting=(0,), late=(1,))
    assert "rank 1:  last did allgather 'metrics'; is in its" in describe(named, reports)
    in_channel = a_wait(waiting=(0,), late=(1,))
    assert "rank 1:  last did broadcast 'w' (operation 8 there); is" in describe(
        in_channel, reports
    )
    bucket = a_wait("gradients 0.1", "allreduce 'bucket.0'", waiting=(0,), late=(1,))
    assert "rank 1:  has done nothing there yet; is in its" in describe(bucket, reports)


def test_a_deadlock_shows_for_what_and_for_whom_each_waits():
    waits = [
        a_wait(WORLD, "allreduce 'a'", waiting=(0,), late=(1,)),
        a_wait((2, "b"), "allgather 'b'", waiting=(1,), late=(0,)),
        a_wait("set 3", "barrier", waiting=(1,), late=(0,)),
        a_wait("set 4", "barrier", waiting=(3,), late=(2,)),
    ]
    text = describe_deadlock([0, 1], waits)
    assert text.startswith(
        "deadlock: ranks 0-1 wait for each other in different calls\n"
        "  rank 0:  allreduce 'a' (all ranks), for rank 1\n"
        "  rank 1:  allgather 'b' (asynchronous, process set 2), for rank 0 and "
        "barrier (set 3), for rank 0\n"
    )
    assert "set 4" not in text
