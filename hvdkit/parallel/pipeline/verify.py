"""Proof that a pipeline schedule is right, for one number of ranks, microbatches and chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hvdkit.errors import ScheduleError
from hvdkit.parallel.pipeline.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    Kind,
    Memory,
    Result,
    Schedule,
    inputs,
    receives,
    result,
    sends,
)

#: The instructions of every rank.
Plan: TypeAlias = Sequence[Sequence[Instruction]]

_FORWARD, _INPUT, _WEIGHT = (
    "the forward",
    "the gradient of the input",
    "the gradient of the weights",
)

# What of a microbatch's way through a stage each instruction does.
_DOES: dict[type[Instruction], tuple[str, ...]] = {
    Forward: (_FORWARD,),
    Backward: (_INPUT, _WEIGHT),
    BackwardInput: (_INPUT,),
    BackwardWeight: (_WEIGHT,),
}

_DONE_BY = {
    _FORWARD: "Forward",
    _INPUT: "Backward or BackwardInput",
    _WEIGHT: "Backward or BackwardWeight",
}


@dataclass(frozen=True, slots=True)
class Report:
    """What a proved schedule was measured to need.

    Args:
        memory: the most that each rank holds.
        messages: messages of all ranks together.
    """

    memory: tuple[Memory, ...]
    messages: int


def verify(steps: Schedule, ranks: int, microbatches: int, chunks: int = 1) -> Report:
    """Prove the schedule correct, and measure what it holds in memory.

    Every microbatch goes forward and back through every stage exactly once, each result is there
    when it is needed, no rank waits for ever, and both ends of every message list it in the same
    order.

    Raises:
        ScheduleError: it is not; the message names the rank and the instruction.
    """
    plan = [list(steps(rank, ranks, microbatches, chunks)) for rank in range(ranks)]
    stages = ranks * chunks
    for rank, instructions in enumerate(plan):
        _check_each_once(rank, instructions, (ranks, stages, microbatches))
    for _ in play(plan, stages):
        pass
    return Report(memory=tuple(map(memory_held, plan)), messages=_check_message_order(plan, stages))


def play(plan: Plan, stages: int) -> Iterator[tuple[int, Instruction]]:
    """Yield ``(rank, instruction)`` in an order in which all ranks together can run them.

    Raises:
        ScheduleError: a result is needed before its own rank computes it, or ranks wait for one
            another, or for a result that never comes.
    """
    ranks = len(plan)
    position = [0] * ranks
    done: set[Result] = set()
    waiting: dict[Result, int] = {}  # a result is awaited by one other rank at the most
    running = list(range(ranks))
    while running:
        rank = running.pop()
        while position[rank] < len(plan[rank]):
            instruction = plan[rank][position[rank]]
            missing = [needed for needed in inputs(instruction, stages) if needed not in done]
            if missing:
                _check_comes_from_elsewhere(rank, position[rank], instruction, missing[0], ranks)
                waiting[missing[0]] = rank
                break
            yield rank, instruction
            position[rank] += 1
            computed = result(instruction)
            if computed is not None:
                done.add(computed)
                if computed in waiting:
                    running.append(waiting.pop(computed))
    if waiting:
        raise ScheduleError(_describe_stall(plan, position, waiting))


def memory_held(instructions: Sequence[Instruction]) -> Memory:
    """Return the most that a rank holds at once as it runs the instructions."""
    activations = in_flight = most_activations = most_in_flight = 0
    for instruction in instructions:
        kind = type(instruction)
        activations += (kind is Forward) - (kind in (Backward, BackwardInput))
        in_flight += (kind is Forward) - (kind in (Backward, BackwardWeight))
        most_activations = max(most_activations, activations)
        most_in_flight = max(most_in_flight, in_flight)
    return Memory(most_activations, most_in_flight)


def _check_each_once(
    rank: int, instructions: Sequence[Instruction], sizes: tuple[int, int, int]
) -> None:
    """Check that the rank does all of its own work, once, and no other's."""
    ranks, stages, microbatches = sizes
    did: dict[tuple[str, int, int], int] = {}
    for number, instruction in enumerate(instructions):
        where = f"rank {rank}, instruction {number}: {instruction}"
        stage, microbatch = instruction.stage, instruction.microbatch
        if not 0 <= stage < stages:
            raise ScheduleError(f"{where}: the stages are 0 to {stages - 1}")
        if stage % ranks != rank:
            raise ScheduleError(f"{where}: stage {stage} is on rank {stage % ranks}")
        if not 0 <= microbatch < microbatches:
            raise ScheduleError(f"{where}: the microbatches are 0 to {microbatches - 1}")
        for work in _DOES[type(instruction)]:
            before = did.setdefault((work, stage, microbatch), number)
            if before != number:
                raise ScheduleError(f"{where} computes {work} again after instruction {before}")
    for stage in range(rank, stages, ranks):
        for microbatch in range(microbatches):
            for work in (_FORWARD, _INPUT, _WEIGHT):
                if (work, stage, microbatch) not in did:
                    raise ScheduleError(
                        f"rank {rank} never computes {work}: "
                        f"{_DONE_BY[work]}(stage={stage}, microbatch={microbatch}) is missing"
                    )


def _check_comes_from_elsewhere(
    rank: int, number: int, instruction: Instruction, missing: Result, ranks: int
) -> None:
    if missing.stage % ranks == rank:
        raise ScheduleError(
            f"rank {rank}, instruction {number}: {instruction} needs {_name(missing)}, "
            f"which the rank has not computed before"
        )


def _check_message_order(plan: Plan, stages: int) -> int:
    """Check that both ends list the same messages, and return how many there are."""
    ranks = len(plan)
    left: dict[tuple[int, int, Kind], list[Result]] = defaultdict(list)
    awaited: dict[tuple[int, int, Kind], list[Result]] = defaultdict(list)
    for rank, instructions in enumerate(plan):
        for message in sends(instructions, ranks, stages):
            what = Result(message.kind, message.stage, message.microbatch)
            left[rank, message.peer, message.kind].append(what)
        for message in receives(instructions, ranks, stages):
            what = Result(message.kind, message.stage, message.microbatch)
            awaited[message.peer, rank, message.kind].append(what)
    for channel, out in left.items():
        source, destination, _ = channel
        for number, (ours, theirs) in enumerate(zip(out, awaited[channel], strict=True)):
            if ours != theirs:
                raise ScheduleError(
                    f"message {number} from rank {source} to rank {destination} carries "
                    f"{_name(ours)}, where the receiver first needs {_name(theirs)}"
                )
    return sum(map(len, left.values()))


def _describe_stall(plan: Plan, position: Sequence[int], waiting: dict[Result, int]) -> str:
    """Say why nothing moves: a rank that has ended, or else a cycle of ranks that wait."""
    ranks = len(plan)
    awaits = {rank: missing for missing, rank in waiting.items()}

    def line(rank: int) -> str:
        number = position[rank]
        return (
            f"rank {rank}, instruction {number}: {plan[rank][number]} waits for "
            f"{_name(awaits[rank])} from rank {awaits[rank].stage % ranks}"
        )

    path = [min(awaits)]
    while True:
        following = awaits[path[-1]].stage % ranks
        if following not in awaits:
            return f"{line(path[-1])}, which has ended after {position[following]} instructions"
        if following in path:
            break
        path.append(following)
    cycle = path[path.index(following) :]
    return "deadlock: each of these ranks waits for the next\n" + "\n".join(
        f"  {line(rank)}" for rank in (*cycle, following)
    )


def _name(needed: Result) -> str:
    what = "the output" if needed.kind == "forward" else "the gradient of the input"
    return f"{what} of stage {needed.stage}, microbatch {needed.microbatch}"
