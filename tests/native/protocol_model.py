"""The arena's flag protocol as state machines of atomic steps, and a search of all interleavings.

`arena.c` states the protocol and the argument for it; its labels [1]-[4] recur here.  A rank is a
list of steps, each of which touches shared memory once.  `explore` runs every interleaving of the
ranks' steps, one state at a time, and returns the first run that goes wrong:

    torn      a reader met a word of another round, or a half-written slot
    stuck     ranks wait, and nothing but a time limit or a signal would end it: also a lost wake-up

The model is sequentially consistent, and so are the loads and stores on which sleeping depends.
Weaker orders (what a release store publishes) are argued in arena.c, and tested by ThreadSanitizer
on the C code itself, see sanitize/run.py.  One weaker order is modelled, since it is the tempting
one: `Rules.store_waits` False lets a post linger in a store buffer, as a plain store does on x86.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Step = tuple[str, int, int]
State = tuple[int, ...]
CameFrom = dict[State, tuple[State, int]]

WORDS = 2  # a slot is filled and read in so many steps


@dataclass(frozen=True)
class Rules:
    """What the ranks keep to.  The defaults are what arena.c does; the rest are planted faults."""

    begin_waits: bool = True  # [1]
    fill_then_post: bool = True  # [2]
    waits_for_post: bool = True  # [3]
    read_then_post: bool = True  # [4]
    region_has_last_round: bool = True
    buffers: int = 2
    modulus: int = 8  # of the counter; the C code's is 2^32
    sleeps: bool = False  # whether a wait is spelled out, down to the futex
    store_then_look: bool = True  # at `waiters`
    store_waits: bool = True  # until all see it, before `waiters` is looked at
    looks_again: bool = True  # at `posted`, after having added itself to `waiters`
    sleep_compares: bool = True  # the futex's comparison with the value last seen
    wakes_all: bool = True
    counts_waiters: bool = True  # rather than setting and clearing a flag


@dataclass(frozen=True)
class Outcome:
    states: int
    spread: int  # the furthest that two counters were apart
    fault: str = ""
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.fault:
            return f"{self.states} states, counters at most {self.spread} apart"
        return "\n".join([f"{self.fault} after", *self.trace])


@dataclass
class Program:
    """The steps of one rank.  Every rank calls the same operations in the same order."""

    rank: int
    size: int
    rules: Rules = field(default_factory=Rules)
    round: int = 0
    operation: int = 0
    steps: list[Step] = field(default_factory=list)
    postponed: list[Step] = field(default_factory=list)

    # ------------------------------------------------------------------------------ shared memory

    def posted(self, rank: int) -> int:
        return rank

    def waiters(self, rank: int) -> int:
        return self.size + rank

    def slot(self, rank: int, number: int, word: int) -> int:
        return (2 + number % self.rules.buffers * WORDS + word) * self.size + rank

    def block(self, rank: int, share: int) -> int:
        """Return the address of a share of the rank's block of the region."""
        return (2 + (2 + share) * WORDS) * self.size + rank

    # ----------------------------------------------------------------- the protocol, as in arena.c

    def begin(self) -> None:
        self.round += 1
        if self.rules.begin_waits:
            self.wait_all(self.round - 1)

    def fill(self) -> Iterator[Step]:
        for word in range(WORDS):
            yield "write", self.slot(self.rank, self.round, word), self.round

    def post(self, filled: Iterator[Step] | None = None) -> None:
        """Fill the slot of the round, if it is filled, and publish it."""
        if self.rules.fill_then_post:
            self.steps += filled or ()
        self._store()
        if not self.rules.fill_then_post:
            self.steps += filled or ()
        self.steps += self.postponed
        self.postponed = []

    def _store(self) -> None:
        me, rules = self.rank, self.rules
        store = ("write" if rules.store_waits else "buffer", self.posted(me), self.round)
        if not rules.sleeps:
            self.steps.append(store)
            return
        look = ("look at waiters", self.waiters(me), 0)
        order = [store, look] if rules.store_then_look else [look, store]
        self.steps += [*order, ("wake all" if rules.wakes_all else "wake one", self.posted(me), 0)]

    def wait(self, rank: int, number: int) -> None:
        posted, waiters = self.posted(rank), self.waiters(rank)
        if not self.rules.sleeps:
            self.steps.append(("wait", posted, number))
            return
        add, subtract = ("add", "add") if self.rules.counts_waiters else ("write", "write")
        self.steps += [
            ("look, skip 6", posted, number),  # spinning
            (add, waiters, 1),
            ("look, skip 2" if self.rules.looks_again else "nothing", posted, number),
            ("sleep if same" if self.rules.sleep_compares else "sleep", posted, number),
            ("asleep", posted, number),
            (subtract, waiters, -1 if subtract == "add" else 0),
            ("look, or back 5", posted, number),
        ]

    def wait_all(self, number: int) -> None:
        for step in range(1, self.size):
            self.wait((self.rank + step) % self.size, number)

    def read(self, *ranks: int, number: int) -> None:
        reads = [
            ("read", self.slot(rank, number, word), number)
            for rank in ranks
            if rank != self.rank
            for word in range(WORDS)
        ]
        if self.rules.read_then_post:
            self.steps += reads
        else:
            self.postponed += reads

    # ------------------------------------------------- the sequences of rounds, as in collectives.c

    def everyone(self) -> range:
        return range(self.size)

    def gather(self, *, read: bool = True) -> None:
        """All publish, and all read all: a barrier, an exchange, and every first round."""
        self.begin()
        self.post(self.fill())
        if self.rules.waits_for_post:
            self.wait_all(self.round)
        if read:
            self.read(*self.everyone(), number=self.round)

    def broadcast(self, root: int, pieces: int) -> None:
        """After the first piece, the readers post without waiting for their own readers."""
        self.gather()
        for _ in range(pieces - 1):
            if self.rank == root:
                self.begin()
                self.post(self.fill())
                continue
            self.round += 1
            self.post()
            if self.rules.waits_for_post:
                self.wait(root, self.round)
            self.read(root, number=self.round)

    def staged(self, pieces: int) -> None:
        """Each round reads the slots of the round before as well, until it posts."""
        self.gather(read=False)
        for _ in range(pieces):
            self.begin()
            self.read(*self.everyone(), number=self.round - 1)
            self.post(self.fill())
            self.wait_all(self.round)
            self.read(*self.everyone(), number=self.round)

    def in_region(self) -> None:
        """Each rank reduces its share of all blocks in place; then a round in which none fills."""
        self.operation += 1
        before, after = 2 * self.operation - 1, 2 * self.operation
        me, everyone = self.rank, self.everyone()
        self.steps += [("write", self.block(me, share), before) for share in everyone]
        self.gather(read=False)
        self.steps += [("read", self.block(rank, me), before) for rank in everyone]
        self.steps += [("write", self.block(rank, me), after) for rank in everyone]
        if self.rules.region_has_last_round:
            self.begin()
            self.post()
            self.wait_all(self.round)
        self.steps += [("read", self.block(me, share), after) for share in everyone]


Body = Callable[[Program], None]


def explore(size: int, body: Body, rules: Rules | None = None) -> Outcome:
    """Run `body` on `size` ranks in every interleaving, until one goes wrong."""
    rules = rules or Rules()
    programs = [Program(rank, size, rules) for rank in range(size)]
    for program in programs:
        body(program)
    return _Search(size, [program.steps for program in programs], rules).run()


class _Search:
    """Depth first.  A state: the ranks' places, the values they saw last, their store buffers, and
    the shared memory, whose first words are the counters."""

    def __init__(self, size: int, programs: list[list[Step]], rules: Rules) -> None:
        self.size, self.modulus = size, rules.modulus
        self.programs = [[*steps, ("end", 0, 0)] for steps in programs]
        self.base = 3 * size
        self.words = 1 + max(address for steps in programs for _, address, _ in steps)

    def run(self) -> Outcome:
        start = (0,) * (self.base + max(self.words, self.size))
        came_from: CameFrom = {start: (start, -1)}
        stack, spread = [start], 0
        while stack:
            state = stack.pop()
            posted = state[self.base : self.base + self.size]
            spread = max(spread, max(posted) - min(posted))
            lively, finished = False, True
            for rank in range(self.size):
                step = self.programs[rank][state[rank]]
                finished &= step[0] == "end"
                for after in self._successors(state, rank, step):
                    if not after:
                        trace = (*self._trace(came_from, state), f"rank {rank}: {step}")
                        return Outcome(len(came_from), spread, "torn", trace)
                    lively |= step[0] != "asleep"
                    if after not in came_from:
                        came_from[after] = state, rank
                        stack.append(after)
            if not (lively or finished):
                return Outcome(len(came_from), spread, "stuck", self._trace(came_from, state))
        return Outcome(len(came_from), spread)

    def _trace(self, came_from: CameFrom, state: State) -> tuple[str, ...]:
        lines = []
        while came_from[state][1] >= 0:
            after, (state, rank) = state, came_from[state]
            drained = after[rank] == state[rank]
            lines.append(f"rank {rank}: {'drain' if drained else self.programs[rank][state[rank]]}")
        return tuple(reversed(lines))

    def _reached(self, posted: int, number: int) -> bool:
        return (posted - number) % self.modulus < self.modulus // 2

    def _successors(self, state: State, rank: int, step: Step) -> Iterator[State]:
        """Yield the states to which the rank can go; an empty one if it meets what it must not.

        A sleeper goes on without being woken when a signal comes; nobody may depend on that.
        """
        name, address, value = step
        place = state[rank]
        buffer = 2 * self.size + rank
        if state[buffer]:
            drained = list(state)
            drained[self.base + rank], drained[buffer] = state[buffer], 0
            yield tuple(drained)
        if name == "read" and state[self.base + address] != value:
            yield ()
        elif name in ("read", "asleep"):
            yield (*state[:rank], place + 1, *state[rank + 1 :])
        elif name != "end":
            after = self._perform(list(state), rank, step)
            if after:
                yield tuple(after)

    def _perform(self, state: list[int], rank: int, step: Step) -> list[int] | None:
        """Return the state after a step that cannot go wrong, or None if it must wait."""
        name, address, value = step
        word, seen = self.base + address, self.size + rank
        now = state[word]
        state[rank] += 1
        if name == "wait":
            return state if self._reached(now, value) else None
        if name == "write":
            state[word] = value
        elif name == "buffer":
            if state[2 * self.size + rank]:
                return None
            state[2 * self.size + rank] = value
        elif name == "add":
            state[word] += value
        elif name == "look at waiters":
            state[seen] = now
        elif name.startswith("look, "):
            state[seen] = now
            if name == "look, or back 5":
                state[rank] -= 0 if self._reached(now, value) else 6
            elif self._reached(now, value):
                state[rank] += int(name[-1])
        elif name == "sleep if same":
            state[rank] += (now - state[seen]) % self.modulus != 0
        elif name.startswith("wake") and state[seen]:
            for peer in range(self.size):
                if self.programs[peer][state[peer]][:2] == ("asleep", address):
                    state[peer] += 1
                    if name == "wake one":
                        break
        return state
