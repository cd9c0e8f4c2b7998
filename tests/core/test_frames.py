"""What ranks tell each other before a collective, over messages."""

import numpy as np
import pytest

from hvdkit.collectives import frames
from hvdkit.collectives.frames import Frames

from .worlds import changes_of, on_ranks

NOTHING = np.empty(0, np.int64)


def counted(transport):
    """Return the frames of a rank, and the list in which its all-gathers leave their lengths."""
    lengths = []
    plain = transport.allgather_ints

    def allgather_ints(values):
        lengths.append(len(values))
        return plain(values)

    transport.allgather_ints = allgather_ints
    return Frames(transport), lengths


@pytest.mark.parametrize("signature", [1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("length", [0, 1, 128, 129, 5000])
def test_everyone_learns_everything(signature, length):
    def body(transport):
        mine = np.arange(length) + transport.rank
        gathered = Frames(transport).gather(signature, mine)
        assert gathered.shape == (3, length)
        for rank, theirs in enumerate(gathered):
            assert (theirs == np.arange(length) + rank).all()

    on_ranks(3, body)


def test_signatures_that_differ_are_seen_by_all_however_much_each_has_to_tell():
    def body(transport):
        made = Frames(transport)
        assert made.gather(transport.rank, np.ones(1000 * transport.rank, np.int64)) is None
        assert made.gather(7, NOTHING).shape == (3, 0)

    on_ranks(3, body)


def test_what_fits_travels_with_the_signature():
    def body(transport):
        made, lengths = counted(transport)
        for length in (0, 1, 128, 129):
            made.gather(length, np.ones(length, np.int64))
        return lengths

    usual, short = 1 + 128, 1 + 8
    assert on_ranks(2, body) == [[usual, short, usual, usual, 129]] * 2


def test_many_ranks_have_short_frames():
    def body(transport):
        made, lengths = counted(transport)
        made.gather(1, NOTHING)
        return lengths

    assert on_ranks(8, body) == [[1 + 32]] * 8


def test_a_frame_is_as_long_as_the_call_that_is_expected():
    """Steps of three calls, of which one has much to tell: from the third on it tells at once."""

    def body(transport):
        made, lengths = counted(transport)
        for _ in range(3):
            for signature, length in ((1, 3), (2, 1000), (3, 0)):
                made.gather(signature, np.ones(length, np.int64))
        return lengths

    usual, short = 129, 9
    first, second = [usual, usual, 1000, usual], [usual, usual, 1000, short]
    third = [short, 1001, short]
    assert on_ranks(2, body) == [[*first, *second, *third]] * 2


def test_a_frame_fits_all_short_calls_that_come_after_one():
    """Two kinds of steps: the short frame of the first is forgotten once the other has come."""

    def body(transport):
        made, lengths = counted(transport)
        for length in (1, 1, 100, 1, 100):
            made.gather(1, NOTHING)
            made.gather(2, np.ones(length, np.int64))
        return lengths

    usual, short = 129, 9
    first, second, third = [usual, usual], [usual, usual], [short, short, 100]
    rest = [short, usual] * 2
    assert on_ranks(2, body) == [[*first, *second, *third, *rest]] * 2


def test_what_is_expected_in_vain_is_forgotten():
    def body(transport):
        made, lengths = counted(transport)
        for length in (1000, 1000, 1000, 0, 0, 1000):
            made.gather(5, np.ones(length, np.int64))
        return lengths

    # After two calls comes a long one, then two short ones, then a long one again.
    assert on_ranks(2, body) == [[129, 1000] * 3 + [1001, 1001, 129, 1000]] * 2


def test_another_call_at_the_end_of_a_loop_changes_nothing():
    """The frame that was too long for it stays: what comes next is most likely the loop's again."""

    def body(transport):
        made, lengths = counted(transport)
        changes = []
        for _ in range(4):
            made.gather(1, NOTHING)
            for _ in range(3):
                made.gather(2, np.ones(1000, np.int64))
            changes.append(changes_of(made.state))
        return lengths[-8:], changes

    lengths, changes = on_ranks(2, body)[0]
    assert lengths == [1001] * 8
    assert changes[2] == changes[3]


def test_what_comes_after_a_call_may_depend_on_the_one_before():
    def body(transport):
        made, lengths = counted(transport)
        for _ in range(3):
            for signature, length in ((1, 0), (2, 0), (3, 1000), (2, 0), (1, 0)):
                made.gather(signature, np.ones(length, np.int64))
        return lengths[-5:]

    assert on_ranks(2, body) == [[9, 9, 1001, 9, 9]] * 2


def test_after_a_difference_nothing_is_expected():
    """A rank that was in another call has not seen what the others had to tell."""

    def body(transport):
        made, lengths = counted(transport)
        for signature in (1, 1, 1, 1 + transport.rank, 1):
            made.gather(signature, np.ones(1000, np.int64))
        return lengths

    assert on_ranks(2, body) == [[129, 1000] * 3 + [1001, 129, 1000]] * 2


def test_frames_and_what_is_expected_have_bounds(monkeypatch):
    monkeypatch.setattr(frames, "MOST_EXPECTED", 3)
    beyond = frames.LARGEST_FRAMES // 2 // 8 + 1

    def body(transport):
        made, lengths = counted(transport)
        for _ in range(2):
            made.gather(1, np.ones(beyond, np.int64))
        for signature in range(20):
            made.gather(signature, np.ones(200, np.int64))
            assert len(made._following) <= 3
        return lengths[:4]

    assert on_ranks(2, body) == [[129, beyond, 129, beyond]] * 2
