"""The messages that follow from instructions."""

from __future__ import annotations

from hvdkit.parallel.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Message,
    inputs,
    received,
    receives,
    sends,
    sent,
)
from hvdkit.parallel.pipeline.registry import get


def test_the_first_and_the_last_stage_face_one_way() -> None:
    assert received(Forward(0, 5), 3, 3) is None
    assert sent(Forward(0, 5), 3, 3) == Message(1, 0, 5, "forward")
    assert received(Backward(0, 5), 3, 3) == Message(1, 1, 5, "backward")
    assert sent(Backward(0, 5), 3, 3) is None
    assert received(Forward(2, 5), 3, 3) == Message(1, 1, 5, "forward")
    assert sent(Forward(2, 5), 3, 3) is None
    assert received(Backward(2, 5), 3, 3) is None
    assert sent(BackwardInput(2, 5), 3, 3) == Message(1, 2, 5, "backward")


def test_the_gradients_of_weights_go_nowhere() -> None:
    assert sent(BackwardWeight(1, 0), 3, 3) is None
    assert received(BackwardWeight(1, 0), 3, 3) is None


def test_chunks_go_round_from_the_last_rank_to_the_first() -> None:
    assert sent(Forward(2, 0), 3, 6) == Message(0, 2, 0, "forward")
    assert received(Forward(3, 0), 3, 6) == Message(2, 2, 0, "forward")
    assert sent(Backward(3, 0), 3, 6) == Message(2, 3, 0, "backward")


def test_stages_of_one_rank_need_no_message_but_do_need_one_another() -> None:
    assert sent(Forward(0, 0), 1, 2) is None
    assert received(Forward(1, 0), 1, 2) is None
    assert len(inputs(Backward(0, 0), 2)) == 2


def test_what_a_rank_of_1f1b_receives_and_sends() -> None:
    middle = get("1f1b").plan(3, 2)[1]  # F0 F1 B0 B1
    assert receives(middle, 3, 3) == [
        Message(0, 0, 0, "forward"),
        Message(0, 0, 1, "forward"),
        Message(2, 2, 0, "backward"),
        Message(2, 2, 1, "backward"),
    ]
    assert sends(middle, 3, 3) == [
        Message(2, 1, 0, "forward"),
        Message(2, 1, 1, "forward"),
        Message(0, 1, 0, "backward"),
        Message(0, 1, 1, "backward"),
    ]


def test_with_chunks_the_two_kinds_overtake_one_another_hence_a_tag_each() -> None:
    """Between two ranks both kinds go both ways, and are not needed in the order of sending."""
    first, second = get("interleaved").plan(2, 5, 2)
    out = [(m.kind, m.stage, m.microbatch) for m in sends(first, 2, 4)]
    into = [(m.kind, m.stage, m.microbatch) for m in receives(second, 2, 4)]
    assert out != into
    for kind in ("forward", "backward"):
        assert [m for m in out if m[0] == kind] == [m for m in into if m[0] == kind]
