"""The vocabulary in which every pipeline schedule is written: what a rank computes, in order.

A schedule is a pure generator ``steps(rank, ranks, microbatches, chunks)`` of instructions.  The
model is cut into ``ranks * chunks`` stages, and stage s is on rank ``s % ranks``.

Transfers are no instructions, for they follow from these: the activations of a stage go to the
stage after it, the gradient of its input to the stage before.  Receives are posted beforehand and
sends do not block, so that a rank waits only for what its present instruction needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, TypeAlias

from hvdkit.errors import ArgumentError

#: What passes between stages: activations forward, the gradients of these backward.
Kind: TypeAlias = Literal["forward", "backward"]

#: A duration in any unit.  Sums of int and Fraction are exact.
Time: TypeAlias = int | float | Fraction


@dataclass(frozen=True, slots=True)
class Instruction:
    """What one rank computes of one microbatch, in one go."""

    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Forward(Instruction):
    """Compute the stage's output from its input."""


@dataclass(frozen=True, slots=True)
class Backward(Instruction):
    """Compute both gradients: of the stage's input and of its weights."""


@dataclass(frozen=True, slots=True)
class BackwardInput(Instruction):
    """Compute the gradient of the stage's input, for which the stage before waits."""


@dataclass(frozen=True, slots=True)
class BackwardWeight(Instruction):
    """Compute the gradient of the stage's weights, for which no other stage waits."""


#: ``steps(rank, ranks, microbatches, chunks)`` yields the instructions of one rank.
Schedule: TypeAlias = Callable[[int, int, int, int], Iterator[Instruction]]


class Result(NamedTuple):
    """What an instruction computes and another needs.

    Args:
        kind: ``"forward"``: the output of the stage; ``"backward"``: the gradient of its input.
        stage: the stage that computes it.
        microbatch: of which microbatch.
    """

    kind: Kind
    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Message:
    """One message between two ranks, as one of them sees it.

    Messages of one kind between two ranks arrive in the order in which they were sent; the two
    kinds need a tag each, for with several chunks on two ranks one may overtake the other.

    Args:
        peer: the other rank.
        stage: the stage that computes what the message carries.
        microbatch: of which microbatch.
        kind: ``"forward"``: the output of the stage; ``"backward"``: the gradient of its input.
    """

    peer: int
    stage: int
    microbatch: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Memory:
    """The most that a rank holds at once, in microbatches of one stage.

    Args:
        activations: forward is done, the gradient of the input is not.
        in_flight: forward is done, the gradient of the weights is not; hence all `activations`,
            and what only the gradients of weights still need.
    """

    activations: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Times:
    """How long a stage takes for one microbatch, in any unit; `Backward` takes both of its parts.

    Raises:
        ArgumentError: a duration is negative.
    """

    forward: Time = 1
    backward_input: Time = 1
    backward_weight: Time = 1

    def __post_init__(self) -> None:
        for name in ("forward", "backward_input", "backward_weight"):
            if not getattr(self, name) >= 0:  # NaN too
                raise ArgumentError(f"{name} lasts {getattr(self, name)}; it must last 0 or more")

    def of(self, instruction: Instruction) -> Time:
        """Return how long the instruction takes."""
        if isinstance(instruction, Forward):
            return self.forward
        if isinstance(instruction, BackwardInput):
            return self.backward_input
        if isinstance(instruction, BackwardWeight):
            return self.backward_weight
        return self.backward_input + self.backward_weight


def result(instruction: Instruction) -> Result | None:
    """Return what the instruction computes for others; None for the gradients of weights."""
    if isinstance(instruction, BackwardWeight):
        return None
    kind: Kind = "forward" if isinstance(instruction, Forward) else "backward"
    return Result(kind, instruction.stage, instruction.microbatch)


def inputs(instruction: Instruction, stages: int) -> tuple[Result, ...]:
    """Return what must be there before the instruction can run: its own rank's results first."""
    stage, microbatch = instruction.stage, instruction.microbatch
    if isinstance(instruction, Forward):
        return (Result("forward", stage - 1, microbatch),) if stage > 0 else ()
    if isinstance(instruction, BackwardWeight):
        return (Result("backward", stage, microbatch),)
    own = Result("forward", stage, microbatch)
    if stage == stages - 1:
        return (own,)
    return (own, Result("backward", stage + 1, microbatch))


def received(instruction: Instruction, ranks: int, stages: int) -> Message | None:
    """Return the message that must have come before the instruction can run, if there is one."""
    rank = instruction.stage % ranks
    for kind, stage, microbatch in inputs(instruction, stages):
        if stage % ranks != rank:
            return Message(stage % ranks, stage, microbatch, kind)
    return None


def sent(instruction: Instruction, ranks: int, stages: int) -> Message | None:
    """Return the message that goes out when the instruction is done, if there is one."""
    computed = result(instruction)
    if computed is None:
        return None
    kind, stage, microbatch = computed
    reader = stage + 1 if kind == "forward" else stage - 1
    if not 0 <= reader < stages or reader % ranks == stage % ranks:
        return None
    return Message(reader % ranks, stage, microbatch, kind)


def receives(instructions: Iterable[Instruction], ranks: int, stages: int) -> list[Message]:
    """Return the messages that a rank receives, in the order in which its instructions need them.

    An executor posts these receives beforehand, those of one kind from one peer in this order: it
    is the order in which the peer sends them, as `verify` proves.
    """
    messages = (received(instruction, ranks, stages) for instruction in instructions)
    return [message for message in messages if message is not None]


def sends(instructions: Iterable[Instruction], ranks: int, stages: int) -> list[Message]:
    """Return the messages that a rank sends, in the order in which its instructions make them."""
    messages = (sent(instruction, ranks, stages) for instruction in instructions)
    return [message for message in messages if message is not None]
