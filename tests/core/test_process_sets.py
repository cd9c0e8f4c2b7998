"""Process sets: what makes one, and what is known of it before and after hvdkit knows it."""

from types import SimpleNamespace

import numpy as np
import pytest

from hvdkit.errors import ArgumentError
from hvdkit.process_sets import ProcessSet, global_process_set


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [
        ([0, 1], [0, 1]),
        ([3, 0, 2], [0, 2, 3]),
        (range(1, 4), [1, 2, 3]),
        ((2,), [2]),
        ({4, 1}, [1, 4]),
        (np.array([5, 2]), [2, 5]),
        ((rank for rank in (1, 0)), [0, 1]),
    ],
    ids=str,
)
def test_ranks_in_any_order_and_form(ranks, wanted):
    process_set = ProcessSet(ranks)
    assert process_set.ranks == wanted
    assert all(type(rank) is int for rank in process_set.ranks)


@pytest.mark.parametrize("ranks", [3, None, "01", [0.0, 1.0], [0, "1"], [[0, 1]], [None]], ids=str)
def test_what_is_no_list_of_ranks(ranks):
    with pytest.raises(ArgumentError, match="a process set is a list of ranks, not"):
        ProcessSet(ranks)


@pytest.mark.parametrize("ranks", [[0, 0], [1, 2, 1], [-1, 0], [-1]], ids=str)
def test_ranks_that_come_twice_or_are_negative(ranks):
    with pytest.raises(ArgumentError, match=r"has each rank once, from 0 up; not \["):
        ProcessSet(ranks)


def test_a_set_that_is_not_known_yet():
    process_set = ProcessSet([2, 1])
    assert process_set.process_set_id is None
    assert (process_set.size(), process_set.rank(), process_set.included()) == (None, None, None)
    with pytest.raises(ArgumentError, match=r"ranks=\[1, 2\].*add_process_set\(\) with it first"):
        process_set.communicator()


def test_a_set_that_this_rank_is_in():
    process_set, communicator = ProcessSet([2, 1]), SimpleNamespace(rank=1)
    process_set.bind(7, (1, 2), communicator)
    assert process_set.process_set_id == 7
    assert (process_set.size(), process_set.rank(), process_set.included()) == (2, 1, True)
    assert process_set.communicator() is communicator
    assert repr(process_set) == "ProcessSet(process_set_id=7, ranks=[1, 2])"


def test_a_set_that_this_rank_is_not_in():
    process_set = ProcessSet([1, 2, 3, 7])
    process_set.bind(7, (1, 2, 3, 7), None)
    assert (process_set.size(), process_set.rank(), process_set.included()) == (4, None, False)
    with pytest.raises(ArgumentError, match="not in the process set of ranks 1-3, 7"):
        process_set.communicator()


def test_a_set_that_was_let_go_of_may_be_made_known_again():
    process_set = ProcessSet([0])
    process_set.bind(1, (0,), SimpleNamespace(rank=0))
    process_set.unbind()
    assert (process_set.process_set_id, process_set.size(), process_set.included()) == (None,) * 3
    assert process_set.ranks == [0]
    with pytest.raises(ArgumentError, match="is not known"):
        process_set.communicator()
    process_set.bind(2, (0,), SimpleNamespace(rank=0))
    assert process_set.process_set_id == 2


def test_the_set_of_all_ranks_has_none_before_init():
    assert global_process_set.ranks == []
    assert global_process_set.size() is None
