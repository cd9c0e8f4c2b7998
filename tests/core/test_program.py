"""A schedule laid out on a message: which elements travel in each step."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hvdkit.collectives.program import bounds_of, even_bounds, lay_out
from hvdkit.schedules.steps import Exchange


@given(st.integers(0, 100), st.integers(1, 20))
def test_even_chunks_differ_by_one_element_at_the_most(count, chunks):
    bounds = even_bounds(count, chunks)
    lengths = np.diff(bounds)
    assert (bounds[0], bounds[-1], len(lengths)) == (0, count, chunks)
    assert max(lengths) - min(lengths) <= 1


def test_bounds_of_counts():
    assert bounds_of([]) == [0]
    assert bounds_of([3, 0, 2]) == [0, 3, 3, 5]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8).flatmap(
        lambda counts: st.tuples(
            st.just(counts),
            st.lists(st.sampled_from(range(len(counts))), unique=True, min_size=1),
        )
    ),
    st.integers(1, 12),
)
def test_segments_are_the_chunks_in_order_and_no_longer_than_asked(case, longest):
    counts, chunks = case
    bounds = bounds_of(counts)
    steps = [Exchange(send=(1, tuple(chunks)))]
    (move,) = lay_out(steps, 2, bounds, longest=longest)
    wanted = [i for c in chunks for i in range(bounds[c], bounds[c + 1])]
    assert [i for s in move.outgoing for i in range(s.start, s.stop)] == wanted
    assert all(0 < s.stop - s.start <= longest for s in move.outgoing)
    assert move.incoming == ()


def test_sender_and_receiver_cut_a_message_alike():
    bounds = bounds_of([5, 0, 7, 3])
    (sent,) = lay_out([Exchange(send=(1, (2, 3, 0)))], 2, bounds, longest=4)
    (received,) = lay_out([Exchange(store=(0, (2, 3, 0)))], 2, bounds, longest=4)
    lengths = [s.stop - s.start for s in sent.outgoing]
    assert lengths == [s.stop - s.start for s in received.incoming]
    assert lengths == [4, 4, 2, 4, 1]


def test_peers_are_relative_to_the_root():
    steps = [Exchange(send=(0, 0), store=(3, 0))]
    (move,) = lay_out(steps, 5, [0, 4], longest=9, root=3)
    assert (move.destination, move.source) == (3, 1)


def test_what_is_sent_may_be_cut_otherwise_than_what_is_received():
    steps = [Exchange(send=(1, 1), store=(1, 1))]
    (move,) = lay_out(steps, 2, bounds_of([1, 4]), source=bounds_of([2, 1]), longest=9)
    assert (move.incoming, move.outgoing) == ((slice(1, 5),), (slice(2, 3),))


def test_only_what_is_sent_and_reduced_in_one_step_goes_in_turn():
    steps = [
        Exchange(send=(1, 0), reduce=(1, 0)),
        Exchange(send=(1, 0), reduce=(1, 1)),
        Exchange(send=(1, 0), store=(1, 1)),
        Exchange(reduce=(1, 0)),
    ]
    moves = lay_out(steps, 2, bounds_of([2, 2]), longest=1)
    assert [move.in_turn for move in moves] == [True, False, False, False]
    assert [move.reduces for move in moves] == [True, True, False, True]
