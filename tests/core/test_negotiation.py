"""Decisions: one order for the whole job, and nobody left waiting for an answer."""

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdkit.collectives.calls import Call
from hvdkit.engine import negotiation
from hvdkit.engine.negotiation import AllJoined, Announcement, Coordinator, Fail, Left, Run, keep
from hvdkit.engine.requests import Request
from hvdkit.errors import ArgumentError, MismatchError, PeerError, StallError, UnsupportedError

ALL = 0


def request(name="x", *, kind="allreduce", shape="(3,)", op="Sum", nbytes=12, fusion="like"):
    parts = (("op", op), ("dtype", "float32"), ("shape", shape))
    arguments = {"op": op} if kind == "allreduce" else None
    return Request(Call(kind, name, parts, arguments), nbytes, fusion)


def refusal(name="x", text="no such op"):
    return Request(Call.refused("allreduce", name, ArgumentError(text)))


class Rank:
    """Announces as the progress thread of a rank does."""

    def __init__(self, coordinator, number):
        self.coordinator, self.number = coordinator, number
        self.told = {}

    def announce(self, *items, **how):
        """Announce requests, of all ranks unless given as ``(set_id, request)``."""
        pairs = [item if isinstance(item, tuple) else (ALL, item) for item in items]
        fresh = {}
        for _, asked in pairs:
            if asked.call.signature not in self.told:
                keep(self.told, asked)
                fresh[asked.call.signature] = asked
        keys = tuple(((set_id, a.call.name), a.call.signature) for set_id, a in pairs)
        self.coordinator.announce(self.number, Announcement(keys, fresh, **how))
        return fresh


def world(size, sets=(), *, fuse_bytes=0):
    """Return a coordinator and the ranks of a job with process sets 1, 2, ..."""
    members = {ALL: tuple(range(size)), **dict(enumerate(sets, 1))}
    coordinator = Coordinator(members, fuse_bytes=fuse_bytes)
    return coordinator, [Rank(coordinator, number) for number in range(size)]


def brief(decisions):
    """Return names and sets that run, and the names that fail."""
    found = []
    for decision in decisions:
        if isinstance(decision, Run):
            found.append(("run", *[name for _, name in decision.keys]))
        elif isinstance(decision, Fail):
            found.append(("fail", decision.key[1], decision.ranks))
        else:
            found.append(decision)
    return found


# Order


def test_the_example_of_the_module():
    coordinator, (zero, one) = world(2)
    zero.announce(request("A"), request("B"))
    assert coordinator.decide() == []
    one.announce(request("B"))
    assert brief(coordinator.decide()) == [("run", "B")]
    one.announce(request("A"))
    (run,) = coordinator.decide()
    assert (run.ranks, run.keys, run.requests) == ((0, 1), ((0, "A"),), (request("A"),))
    assert coordinator.decide() == []
    assert coordinator.waiting() == {}


def test_a_name_may_be_used_again_before_the_others_have_used_it_once():
    coordinator, (zero, one) = world(2)
    zero.announce(request("x"), request("x"), request("y"))
    one.announce(request("x"))
    assert brief(coordinator.decide()) == [("run", "x")]
    one.announce(request("y"), request("x"))
    assert brief(coordinator.decide()) == [("run", "y"), ("run", "x")]


def test_the_same_name_in_two_process_sets_is_two_operations():
    coordinator, (zero, one, two) = world(3, [(0, 1), (1, 2)])
    one.announce((1, request("x")), (2, request("x")))
    zero.announce((1, request("x")))
    (run,) = coordinator.decide()
    assert (run.ranks, run.keys) == ((0, 1), ((1, "x"),))
    two.announce((2, request("x")))
    (run,) = coordinator.decide()
    assert (run.ranks, run.keys) == ((1, 2), ((2, "x"),))


def test_a_process_set_that_rank_0_does_not_know_yet():
    members = {ALL: (0, 1, 2)}
    coordinator = Coordinator(members, fuse_bytes=0)
    for number in (1, 2):
        Rank(coordinator, number).announce((1, request()))
    assert coordinator.decide() == []
    members[1] = (1, 2)
    assert coordinator.decide() == []
    coordinator.reconsider()
    (run,) = coordinator.decide()
    assert run.ranks == (1, 2)


def test_a_rank_alone():
    coordinator, (zero,) = world(1)
    zero.announce(request("x"), request("y"), joined=True)
    assert brief(coordinator.decide()) == [("run", "x"), ("run", "y"), AllJoined((0,), 0)]


@st.composite
def jobs(draw):
    """Return process sets and, for each rank, what it announces: (set, name), in its own order."""
    size = draw(st.integers(1, 4))
    everyone = range(size)
    subsets = st.sets(st.sampled_from(everyone), min_size=1).map(lambda s: tuple(sorted(s)))
    sets = draw(st.lists(subsets, max_size=3))
    numbered = {ALL: tuple(everyone), **dict(enumerate(sets, 1))}
    keys = st.tuples(st.sampled_from(sorted(numbered)), st.sampled_from("abcd"))
    operations = draw(st.lists(keys, max_size=12))  # a key that comes twice is a name used again
    scripts = [
        draw(st.permutations([key for key in operations if rank in numbered[key[0]]]))
        for rank in everyone
    ]
    return sets, numbered, scripts


@given(jobs(), st.data(), st.integers(1, 5), st.sampled_from([0, 20, 1000]))
def test_whatever_the_order_of_announcements(job, data, most_known, fuse_bytes):
    """Each operation begins once, when all are there; queues in that order never block."""
    sets, members, scripts = job
    coordinator, ranks = world(len(scripts), sets, fuse_bytes=fuse_bytes)
    told, decisions = [0] * len(ranks), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negotiation, "MOST_KNOWN", most_known)
        while any(told[r] < len(script) for r, script in enumerate(scripts)):
            r = data.draw(st.sampled_from([r for r, s in enumerate(scripts) if told[r] < len(s)]))
            count = data.draw(st.integers(1, len(scripts[r]) - told[r]))
            ranks[r].announce(
                *((s, request(name)) for s, name in scripts[r][told[r] : told[r] + count])
            )
            told[r] += count
            decisions += coordinator.decide() if data.draw(st.booleans()) else []
            begun = [key for run in decisions for key in run.keys]
            for key in begun:
                announced = [scripts[m][: told[m]].count(key) for m in members[key[0]]]
                assert begun.count(key) <= min(announced)
        decisions += coordinator.decide()
    assert all(isinstance(decision, Run) for decision in decisions)
    assert coordinator.waiting() == {}
    for run in decisions:
        assert {key[0] for key in run.keys} == {run.keys[0][0]}
        assert run.ranks == members[run.keys[0][0]]
        assert len(run.keys) == 1 or sum(r.nbytes for r in run.requests) <= fuse_bytes
        assert [r.call.name for r in run.requests] == [name for _, name in run.keys]
    queues = [[run for run in decisions if r in run.ranks] for r in range(len(ranks))]
    for script, queue in zip(scripts, queues, strict=True):
        assert sorted(key for run in queue for key in run.keys) == sorted(script)
    while any(queues):
        heads = [queue[0] for queue in queues if queue]
        ready = [run for run in heads if all(queues[r] and queues[r][0] is run for r in run.ranks)]
        assert ready, "every rank waits for another"
        for r in ready[0].ranks:
            queues[r].pop(0)


@given(jobs(), st.data())
def test_whoever_joins_or_leaves_nobody_waits_for_ever(job, data):
    """Scripts are cut short; then a rank joins or leaves.  In the end nothing is waited for.

    When one has left, those who had joined get an error instead of an end, and leave as well.
    """
    sets, members, scripts = job
    coordinator, ranks = world(len(scripts), sets, fuse_bytes=20)
    scripts = [script[: data.draw(st.integers(0, len(script)))] for script in scripts]
    ends = [data.draw(st.sampled_from(["joined", "leaving"])) for _ in scripts]
    decisions = []
    for r in data.draw(st.permutations([r for r, s in enumerate(scripts) for _ in s])):
        set_id, name = scripts[r][0]
        ranks[r].announce((set_id, request(name)))
        scripts[r] = scripts[r][1:]
        decisions += coordinator.decide()
        if not scripts[r]:
            ranks[r].announce(**{ends[r]: True})
            decisions += coordinator.decide()
    for r in data.draw(st.permutations(range(len(ranks)))):
        if not ranks[r].told:  # whose script was empty
            ranks[r].announce(**{ends[r]: True})
    decisions += coordinator.decide()
    assert any(isinstance(decision, AllJoined) for decision in decisions) == ("leaving" not in ends)
    if "leaving" in ends:
        for r, end in enumerate(ends):
            if end == "joined":
                ranks[r].announce(leaving=True)
        decisions += coordinator.decide()
    assert coordinator.waiting() == {}
    gone = set()
    for decision in decisions:
        if isinstance(decision, Run):
            assert not gone.intersection(decision.ranks), "nothing begins with a rank that has left"
            assert decision.ranks == members[decision.keys[0][0]]
        elif isinstance(decision, Left):
            assert decision.ranks == members[ALL]
            gone.add(decision.rank)
        elif isinstance(decision, Fail):
            assert "leaving" in ends
    if 0 in gone:  # what comes after its last decision is nobody's
        assert decisions[-1] == Left(members[ALL], 0)
    else:
        assert gone == (set(range(len(ranks))) if "leaving" in ends else set())


@given(jobs(), st.data())
def test_every_announcement_of_a_rank_that_stays_is_answered_once(job, data):
    """One rank leaves at some moment; each use of a name by another runs or fails."""
    sets, _, scripts = job
    coordinator, ranks = world(len(scripts), sets)
    leaver = data.draw(st.integers(0, len(ranks) - 1))
    cut = data.draw(st.integers(0, len(scripts[leaver])))
    turns = data.draw(st.permutations([r for r, s in enumerate(scripts) for _ in s]))
    told, decisions, left = [0] * len(ranks), [], False
    for r in [*turns, leaver]:
        if not left and r == leaver and told[r] == cut:
            ranks[r].announce(leaving=True)
            left = True
        elif not (left and r == leaver) and told[r] < len(scripts[r]):
            set_id, name = scripts[r][told[r]]
            ranks[r].announce((set_id, request(name)))
            told[r] += 1
        decisions += coordinator.decide() if data.draw(st.booleans()) else []
    if not left:
        ranks[leaver].announce(leaving=True)
    decisions += coordinator.decide()
    for r, script in enumerate(scripts):
        answers = [
            key
            for decision in decisions
            if not isinstance(decision, Left) and r in decision.ranks
            for key in (decision.keys if isinstance(decision, Run) else [decision.key])
        ]
        announced = script[: told[r]]
        if leaver in (0, r):  # that rank 0 has left is the answer to all the rest
            assert not set(answers).difference(announced)
        else:
            assert sorted(answers) == sorted(announced)


# What travels


def test_a_request_travels_once_for_each_rank():
    coordinator, (zero, one) = world(2)
    for turn in range(3):
        for rank in (zero, one):
            fresh = rank.announce(request("x"), request("y"))
            assert len(fresh) == (0 if turn else 2)
        (first, second) = coordinator.decide()
        assert (first.requests, second.requests) == ((request("x"),), (request("y"),))


def test_names_that_are_never_used_again_are_forgotten(monkeypatch):
    """Else a job whose names count its steps would need ever more memory."""
    monkeypatch.setattr(negotiation, "MOST_KNOWN", 10)
    coordinator, ranks = world(2)
    for step in range(200):
        for rank in ranks:
            rank.announce(request("the same"), request(f"step {step}"))
            assert len(rank.told) <= 10
        assert brief(coordinator.decide()) == [("run", "the same"), ("run", f"step {step}")]
    assert all(len(known) <= 10 for known in coordinator._known.values())
    gc.collect()
    assert len(coordinator._shared) <= 20
    assert coordinator._pending == coordinator._touched == coordinator._given_up == {}


def test_ranks_share_the_memory_of_equal_requests():
    coordinator, ranks = world(3)
    for rank in ranks:
        rank.announce(request("x"))
    assert len({id(next(iter(known.values()))) for known in coordinator._known.values()}) == 1


# What cannot begin


def test_ranks_that_disagree_all_learn_what_each_had():
    coordinator, (zero, one, two) = world(3)
    zero.announce(request("x"))
    one.announce(request("x", shape="(4,)"))
    two.announce(request("x"))
    (fail,) = coordinator.decide()
    assert (fail.ranks, fail.key) == ((0, 1, 2), (0, "x"))
    assert isinstance(fail.error, MismatchError)
    assert "  ranks 0, 2:  float32 (3,)\n  rank 1:      float32 (4,)\n" in str(fail.error)
    for rank in (zero, one, two):
        rank.announce(request("x"))
    assert brief(coordinator.decide()) == [("run", "x")]


def test_ranks_of_a_process_set_go_by_their_own_numbers():
    coordinator, ranks = world(4, [(1, 3)])
    ranks[3].announce((1, request("x", op="Max")))
    ranks[1].announce((1, request("x")))
    (fail,) = coordinator.decide()
    assert fail.ranks == (1, 3)
    assert "  rank 1:  float32 (3,) op=Sum\n  rank 3:  float32 (3,) op=Max\n" in str(fail.error)


def test_different_collectives_of_one_name():
    coordinator, (zero, one) = world(2)
    zero.announce(request("x"))
    one.announce(request("x", kind="allgather"))
    (fail,) = coordinator.decide()
    assert "ranks called different collectives" in str(fail.error)


def test_a_call_that_one_rank_could_not_make():
    coordinator, (zero, one) = world(2)
    zero.announce(request("x"))
    one.announce(refusal("x"))
    (fail,) = coordinator.decide()
    assert fail.ranks == (0, 1)
    assert "  rank 0:  ready\n  rank 1:  ArgumentError: no such op\n" in str(fail.error)


def test_a_call_that_no_rank_could_make_does_not_run():
    coordinator, ranks = world(2)
    for rank in ranks:
        rank.announce(refusal("x"))
    assert brief(coordinator.decide()) == [("fail", "x", (0, 1))]


# Together


def fused(coordinator, ranks, *requests):
    for rank in ranks:
        rank.announce(*requests)
    return brief(coordinator.decide())


def test_neighbours_travel_together_up_to_a_limit():
    coordinator, ranks = world(2, fuse_bytes=100)
    sizes = [40, 60, 1, 99, 100, 101, 30, 30]
    requests = [request(f"{i}", nbytes=nbytes) for i, nbytes in enumerate(sizes)]
    assert fused(coordinator, ranks, *requests) == [
        ("run", "0", "1"),
        ("run", "2", "3"),
        ("run", "4"),
        ("run", "5"),
        ("run", "6", "7"),
    ]


def test_a_limit_of_nothing_fuses_nothing():
    coordinator, ranks = world(2, fuse_bytes=0)
    assert fused(coordinator, ranks, request("x"), request("y")) == [("run", "x"), ("run", "y")]


def test_only_what_is_alike_travels_together():
    coordinator, ranks = world(2, [(0, 1)], fuse_bytes=1000)
    assert fused(
        coordinator,
        ranks,
        request("a"),
        request("b", fusion="other"),
        request("c", fusion="other"),
        request("d", fusion=None),
        request("e", fusion=None),
        request("f"),
        (1, request("g")),
        (1, request("h")),
    ) == [
        *(("run", "a"), ("run", "b", "c"), ("run", "d"), ("run", "e"), ("run", "f")),
        ("run", "g", "h"),
    ]


def test_what_fails_stands_between():
    coordinator, (zero, one) = world(2, fuse_bytes=1000)
    zero.announce(request("a"), request("b"), request("c"))
    one.announce(request("a"), request("b", op="Max"), request("c"))
    assert brief(coordinator.decide()) == [("run", "a"), ("fail", "b", (0, 1)), ("run", "c")]


def test_what_a_joined_rank_brings_does_not_travel_with_what_it_does_not():
    """It announced `a` and then joined: it has an array for one, and none for the other."""
    coordinator, (zero, one) = world(2, fuse_bytes=1000)
    one.announce(request("a"), joined=True)
    zero.announce(request("a"), request("b"), request("c"))
    first, second = coordinator.decide()
    assert (brief([first, second]), first.absent, second.absent) == (
        [("run", "a"), ("run", "b", "c")],
        (),
        (1,),
    )


# Joining


def test_the_others_go_on_without_a_rank_that_has_joined():
    coordinator, (zero, one, two) = world(3, [(0, 1)])
    two.announce(joined=True)
    zero.announce(request("x"), (1, request("y")))
    assert coordinator.decide() == []
    one.announce(request("x"), (1, request("y")))
    x, y = coordinator.decide()
    assert (x.ranks, x.absent) == ((0, 1, 2), (2,))
    assert (y.ranks, y.absent) == ((0, 1), ())


def test_what_was_waited_for_begins_when_the_rank_joins():
    coordinator, (zero, one) = world(2)
    zero.announce(request("x"))
    assert coordinator.decide() == []
    one.announce(joined=True)
    (run,) = coordinator.decide()
    assert (run.ranks, run.absent) == ((0, 1), (1,))


@pytest.mark.parametrize("kind", ["allgather", "broadcast", "barrier"])
def test_what_a_joined_rank_cannot_take_part_in(kind):
    """A barrier by name is one: its work is known to those alone who asked for it."""
    coordinator, (zero, one) = world(2)
    one.announce(joined=True)
    zero.announce(request("x", kind=kind))
    (fail,) = coordinator.decide()
    assert fail.ranks == (0,)
    assert isinstance(fail.error, UnsupportedError)
    assert "rank 1 called join()" in str(fail.error)


def test_all_have_joined_when_the_last_has_and_may_again():
    coordinator, (zero, one, two) = world(3)
    for _ in range(2):
        one.announce(joined=True)
        zero.announce(request("x"), joined=True)
        assert coordinator.decide() == []
        two.announce(request("x"))
        assert brief(coordinator.decide()) == [("run", "x")]
        two.announce(joined=True)
        assert coordinator.decide() == [AllJoined((0, 1, 2), 2)]


def test_operations_come_before_the_end_of_joining():
    coordinator, (zero, one) = world(2)
    one.announce(joined=True)
    zero.announce(request("x"), joined=True)
    assert brief(coordinator.decide()) == [("run", "x"), AllJoined((0, 1), 0)]


# Giving up


STALL = StallError("rank 1 is late")


def test_what_is_given_up_fails_and_so_do_those_who_come_late():
    coordinator, (zero, one, two) = world(3)
    zero.announce(request("x"))
    two.announce(request("x"))
    coordinator.decide()
    assert coordinator.give_up((0, "x"), STALL) == Fail((0, 2), (0, "x"), STALL)
    assert coordinator.waiting() == {}
    one.announce(request("x"), request("y"))
    assert coordinator.decide() == [Fail((1,), (0, "x"), STALL)]
    for rank in (zero, one, two):
        rank.announce(request("x"))
    assert brief(coordinator.decide()) == [("run", "x")]


def test_each_use_that_was_given_up_is_answered_once():
    coordinator, (zero, one) = world(2)
    for _ in range(2):
        zero.announce(request("x"))
        coordinator.decide()
        coordinator.give_up((0, "x"), STALL)
    zero.announce(request("x"))
    one.announce(request("x"), request("x"), request("x"))
    assert brief(coordinator.decide()) == [
        *(("fail", "x", (1,)), ("fail", "x", (1,)), ("run", "x"))
    ]
    assert coordinator._given_up == {}


def test_a_rank_that_had_joined_is_not_late():
    coordinator, (zero, one, two) = world(3)
    two.announce(joined=True)
    zero.announce(request("x"))
    coordinator.decide()
    assert coordinator.waiting()[0, "x"][1:] == ((0,), (1,))
    coordinator.give_up((0, "x"), STALL)
    one.announce(joined=True)
    zero.announce(joined=True)
    assert coordinator.decide() == [AllJoined((0, 1, 2), 0)]
    for rank in (zero, one, two):
        rank.announce(request("x"))
    assert brief(coordinator.decide()) == [("run", "x")], "nor is one that skipped the operation"


def test_what_is_no_longer_waited_for_cannot_be_given_up():
    coordinator, (zero, _) = world(2)
    assert coordinator.give_up((0, "x"), STALL) is None
    zero.announce(request("x"))
    assert coordinator.give_up((0, "x"), STALL) is not None
    assert coordinator.give_up((0, "x"), STALL) is None


def test_who_waits_for_whom():
    coordinator, (zero, one, two) = world(3, [(0, 2)])
    one.announce(request("x"))
    zero.announce(request("x"), (1, request("y")))
    assert coordinator.waiting() == {
        (0, "x"): (request("x").call, (0, 1), (2,)),
        (1, "y"): (request("y").call, (0,), (2,)),
    }
    two.announce(joined=True)
    assert coordinator.waiting()[1, "y"] == (request("y").call, (0,), ())


# Leaving


def test_who_waits_for_a_rank_that_leaves_gets_an_error():
    coordinator, (zero, one, two) = world(3, [(0, 2)])
    zero.announce(request("x"), (1, request("y")))
    one.announce(leaving=True)
    fail, left = coordinator.decide()
    assert (fail.ranks, fail.key) == ((0,), (0, "x"))
    assert isinstance(fail.error, PeerError)
    assert "allreduce 'x': rank 1 called shutdown()" in str(fail.error)
    assert left == Left((0, 1, 2), 1)
    two.announce(request("x"), (1, request("y")))
    assert brief(coordinator.decide()) == [("fail", "x", (2,)), ("run", "y")]


def test_what_all_had_announced_still_begins():
    coordinator, (zero, one) = world(2)
    zero.announce(request("x"))
    one.announce(request("x"), request("y"), leaving=True)
    assert brief(coordinator.decide()) == [("run", "x"), Left((0, 1), 1)]
    zero.announce(request("y"))
    assert brief(coordinator.decide()) == [("fail", "y", (0,))]
    assert coordinator.waiting() == {}


def test_nobody_joins_when_one_has_left():
    coordinator, (zero, one, two) = world(3)
    zero.announce(joined=True)
    one.announce(leaving=True)
    assert coordinator.decide() == [Left((0, 1, 2), 1)]
    two.announce(joined=True)
    zero.announce((ALL, request("x")))
    assert brief(coordinator.decide()) == [("fail", "x", (0,))]


def test_nothing_is_decided_once_rank_0_has_left():
    """It may still be there for a while; the others have given up what they had announced."""
    coordinator, (zero, one, two) = world(3, [(1, 2)])
    one.announce((1, request("x")), leaving=True)
    zero.announce(leaving=True)
    assert coordinator.decide() == [Left((0, 1, 2), 1), Left((0, 1, 2), 0)]
    two.announce((1, request("x")), request("y"))
    one.announce(leaving=True)
    coordinator.reconsider()
    assert coordinator.decide() == []
    assert coordinator.waiting() == {}
    assert coordinator.give_up((1, "x"), STALL) is None
