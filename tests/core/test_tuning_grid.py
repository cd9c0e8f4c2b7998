"""Several looks at the same algorithms become one figure each."""

import pytest

from hvdkit.tuner.grid import _cells, _contenders
from hvdkit.tuning.measure import Timing


def look(margin=0.0, **seconds):
    """What was seen at 4 bytes."""
    return {4: {name: Timing(time, margin * time) for name, time in seconds.items()}}


def test_one_slow_look_does_not_decide():
    usual, slow = ({"ring": ring, "tree": 2.0, "double_tree": 2.0} for ring in (1.0, 3.0))
    cells = _cells([look(**usual), look(**slow), look(**usual)])
    assert cells["ring"][0].seconds == pytest.approx(1.0)
    assert cells["ring"][0].margin > cells["tree"][0].margin == 0.0


def test_a_machine_that_was_slower_is_no_uncertainty():
    cells = _cells([look(ring=1.0, tree=2.0), look(ring=2.0, tree=4.0)])
    assert cells["ring"][0].seconds == pytest.approx(1.5)
    assert cells["tree"][0].seconds == pytest.approx(3.0)
    assert cells["ring"][0].margin == cells["tree"][0].margin == 0.0


def test_what_was_looked_at_less_often_is_on_the_same_scale():
    cells = _cells([look(ring=1.0, tree=4.0), look(ring=1.0, tree=4.0), look(ring=2.0)])
    assert cells["tree"][0].seconds == pytest.approx(4 * cells["ring"][0].seconds)


def test_the_margin_of_a_look_counts_where_looks_agree():
    twice = [look(0.1, ring=1.0, tree=1.0)] * 2
    assert _cells(twice)["ring"][0].margin == pytest.approx(0.1 / 2**0.5)


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ({"ring": 1.0, "tree": 1.4, "gathered": 2.0}, ["ring", "tree"]),
        ({"ring": 1.0, "tree": 2.0}, []),  # there is nothing to decide
        ({"ring": 1.0, "mpi": 0.5}, []),  # which auto never picks
    ],
)
def test_what_may_be_the_fastest_is_looked_at_again(seconds, wanted):
    assert _contenders([look(**seconds)] * 2, 4) == wanted
