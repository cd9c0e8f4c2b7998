"""The proof of the secret, without any socket: nobody gets in who does not have it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdkit.transport.tcp.handshake import Identity, RefusedError, Turn, admit, offer

JOB = bytes(range(16))
SECRET = b"s" * 32


def who(rank, *, size=4, job=JOB, secret=SECRET):
    return Identity(rank, size, job, secret)


class Side:
    """One end of a handshake: what it has sent, and what became of it."""

    def __init__(self, script):
        self.script = script
        self.turn = next(script)
        self.sent = [self.turn.send]
        self.result = None

    def hear(self, data):
        assert len(data) == self.turn.want, "it reads no more than that"
        try:
            self.turn = self.script.send(data)
        except StopIteration as stop:
            self.result = stop.value
            return
        self.sent.append(self.turn.send)


def talk(connecting, accepting):
    """Let both sides speak to the end; return them."""
    connects, accepts = Side(connecting), Side(accepting)
    accepts.hear(connects.sent[0])
    connects.hear(accepts.sent[1])
    accepts.hear(connects.sent[1])
    connects.hear(accepts.sent[2])
    accepts.hear(b"")
    return connects, accepts


def test_both_learn_whom_they_speak_with():
    connects, accepts = talk(offer(who(3), 1), admit(who(1)))
    assert (connects.result, accepts.result) == (1, 3)


def test_only_who_may_have_been_admitted_is_committed():
    connects, _ = talk(offer(who(3), 1), admit(who(1)))
    script = offer(who(3), 1)
    assert not next(script).committed
    assert connects.turn.committed


def test_no_two_handshakes_are_alike():
    first, second = (talk(offer(who(3), 1), admit(who(1))) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one.sent, other.sent, strict=True):
            assert a != b or not a


@pytest.mark.parametrize(
    ("stranger", "why"),
    [
        (offer(who(3, secret=b"wrong"), 1), "secret"),
        (offer(who(3, job=b"j" * 16), 1), "not of this job"),
        (offer(who(3, size=5), 1), "not of this job"),
        (offer(who(3), 0), "not of this job"),
        (offer(who(0), 1), "no reason"),
        (offer(who(1), 1), "no reason"),
        (offer(who(4), 1), "no reason"),
    ],
    ids=["secret", "job", "size", "other rank", "lower rank", "itself", "no rank"],
)
def test_who_accepts_refuses_what_does_not_fit(stranger, why):
    connects, accepts = Side(stranger), Side(admit(who(1)))
    with pytest.raises(RefusedError, match=why):
        accepts.hear(connects.sent[0])
        connects.turn = Turn(b"", 64)
        with pytest.raises(RefusedError):
            connects.hear(accepts.sent[1])  # who connects notices first, and has not proved a thing
        accepts.hear(bytes(32))


def test_who_connects_refuses_a_stranger_that_answers():
    connects = Side(offer(who(3), 1))
    accepts = Side(admit(who(1, secret=b"wrong")))
    accepts.hear(connects.sent[0])
    with pytest.raises(RefusedError, match="secret"):
        connects.hear(accepts.sent[1])
    assert len(connects.sent) == 1, "nothing that could be used elsewhere"


def test_what_was_recorded_is_of_no_use_again():
    connects, accepts = talk(offer(who(3), 1), admit(who(1)))
    again = Side(admit(who(1)))
    again.hear(connects.sent[0])
    with pytest.raises(RefusedError, match="secret"):
        again.hear(connects.sent[1])
    again = Side(offer(who(3), 1))
    with pytest.raises(RefusedError, match="secret"):
        again.hear(accepts.sent[1])


def test_nothing_can_be_sent_back_to_where_it_came_from():
    """The proof of who accepts is none of who connects, for the same hello and nonce."""
    hello = Side(offer(who(3), 1)).sent[0]
    accepts = Side(admit(who(1)))
    accepts.hear(hello)
    with pytest.raises(RefusedError, match="secret"):
        accepts.hear(accepts.sent[1][32:])


def test_one_ranks_proof_is_none_to_another():
    """Rank 3's connection to rank 1, relayed to rank 2."""
    connects, accepts = Side(offer(who(3), 1)), Side(admit(who(2)))
    with pytest.raises(RefusedError, match="not of this job"):
        accepts.hear(connects.sent[0])


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_garbage_is_refused(data):
    """Whatever a stranger says, at whichever point: an error of the one kind, and no result."""
    side = Side(data.draw(st.sampled_from([admit(who(1)), offer(who(3), 1)])))
    good = Side(offer(who(3), 1)).sent[0]
    try:
        while side.turn.want:
            size = side.turn.want
            garbage = st.binary(min_size=size, max_size=size)
            if size == len(good):
                garbage = garbage | st.just(good)
            side.hear(data.draw(garbage))
            assert side.result is None
    except RefusedError:
        return
    pytest.fail("garbage was taken for a proof")
