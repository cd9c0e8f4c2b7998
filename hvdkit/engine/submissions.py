"""What a rank has submitted by name, and what of it has not begun.

    user's threads     put ----> the names in use ----> handles
    progress thread             take_new, to announce    begin, once it is decided

A name may be in use once at a time; each use goes when its operation begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from hvdkit.collectives.calls import Call
from hvdkit.engine.handles import Handle
from hvdkit.engine.negotiation import left_error
from hvdkit.engine.requests import Key, Operation
from hvdkit.errors import ArgumentError, HvdkitError, NotInitializedError

#: Seconds that a burst of submissions is given: after the last one, and in all.
LINGER = 300e-6
LONGEST_LINGER = 1e-3


class News(NamedTuple):
    """What rank 0 has not heard of yet."""

    operations: list[Operation]
    joined: bool
    leaving: bool


class Submissions:
    """The named operations of this rank that have not begun.  Threads may share it.

    Args:
        members: the ranks of every process set by its number; a live mapping.
        gone: the ranks that have left; live.
    """

    def __init__(self, members: Mapping[int, tuple[int, ...]], gone: set[int]) -> None:
        self._members = members
        self._gone = gone
        self._lock = threading.Lock()
        self._submitted: list[Operation] = []  # and not announced
        self._uses: dict[Key, list[Operation | None]] = {}  # of names; None: one that was refused
        self._join: Handle[int] | None = None
        self._join_announced = False
        self._leave_announced = False
        self._lingers = False
        self._hurry = threading.Event()
        self.closing = False
        """Whether nothing more is taken."""
        self.failure: HvdkitError | None = None
        """Why not, if it is not that this rank was told to close."""

    # From the user's threads

    def put(self, operation: Operation) -> Exception | None:
        """Take an operation; return why it cannot be, if so.

        Raises:
            NotInitializedError: after `close`; or the `failure`.
        """
        with self._lock:
            self._check_open()
            error = self._why_refused(operation)
            if error is None:
                self._uses.setdefault(operation.key, []).append(operation)
                self._submitted.append(operation)
            return error

    def put_refused(self, operation: Operation) -> bool:
        """Take a call that this rank cannot make; return whether anybody is there to hear of it."""
        with self._lock:
            if self.closing or 0 in self._gone:
                return False
            self._uses.setdefault(operation.key, []).append(None)
            self._submitted.append(operation)
            return True

    def join(self) -> Handle[int]:
        """Take the word that this rank has no more data.

        Raises:
            ArgumentError: it is taken already.
            PeerError: a rank has left.
            NotInitializedError: after `close`; or the `failure`.
        """
        handle: Handle[int] = Handle("join")
        with self._lock:
            self._check_open()
            if self._join is not None:
                raise ArgumentError("join() was called twice at once")
            if self._gone:
                raise left_error(Call("join", None), sorted(self._gone))
            self._join, self._join_announced = handle, False
        return handle

    def hasten(self) -> None:
        """Have what was submitted announced at once: somebody waits."""
        if self._lingers:
            self._hurry.set()

    def in_use(self, set_id: int) -> bool:
        """Return whether operations of a process set have not begun."""
        with self._lock:
            return any(key[0] == set_id for key in self._uses)

    def pending(self) -> list[Operation]:
        """Return the operations that have not begun."""
        with self._lock:
            return [use for uses in self._uses.values() for use in uses if use is not None]

    def close(self) -> None:
        """Take nothing more."""
        with self._lock:
            self.closing = True

    # On the progress thread

    @property
    def idle(self) -> bool:
        """Whether nothing waits for another rank."""
        return not (self._uses or self._join or self.closing)

    def settle(self) -> None:
        """Let a burst of submissions go on for a moment, to announce it as one.

        Otherwise this thread and the submitting one would take the interpreter from each other
        for every operation.  The first of a burst is announced at once, and so is everything that
        somebody waits for.
        """
        before, deadline = 1, time.perf_counter() + LONGEST_LINGER
        self._hurry.clear()
        while len(self._submitted) > before and time.perf_counter() < deadline:
            before = len(self._submitted)
            self._lingers = True
            if self._hurry.wait(LINGER):
                break
        self._lingers = False

    def take_new(self) -> News:
        """Return what is to be announced, each thing once."""
        with self._lock:
            operations, self._submitted = self._submitted, []
            joined = self._join is not None and not self._join_announced
            self._join_announced = self._join is not None
            leaving = self.closing and not self._leave_announced
            self._leave_announced = self.closing
        return News(operations, joined, leaving)

    def note_decided(self, keys: Iterable[Key], when: float) -> None:
        """Note when rank 0's decision about the next use of each name came in."""
        with self._lock:
            for use in (self._uses.get(key, (None,))[0] for key in keys):
                if use is not None:
                    use.decided = when

    def begin(self, key: Key) -> Operation | None:
        """Take the next use of a name off the table; None if it was refused."""
        with self._lock:
            uses = self._uses[key]
            use = uses.pop(0)
            if not uses:
                del self._uses[key]
            return use

    def end_join(self) -> Handle[int] | None:
        """Return the handle of a `join` under way, which is no more."""
        with self._lock:
            return self._take_join()

    def give_up(self, *, all_uses: bool) -> list[Handle[Any]]:
        """Return the handles of what cannot begin any more: of a `join`, and of all if so told."""
        with self._lock:
            return self._given_up(all_uses=all_uses)

    def end(self) -> list[Handle[Any]]:
        """Take nothing more, and give up everything; return the handles."""
        with self._lock:
            self.closing = True
            return self._given_up(all_uses=True)

    # With the lock held

    def _check_open(self) -> None:
        if self.closing:
            raise self.failure or NotInitializedError("hvdkit was shut down")

    def _why_refused(self, operation: Operation) -> Exception | None:
        set_id, _ = operation.key
        if any(use is not None for use in self._uses.get(operation.key, ())):
            return ArgumentError(
                f"{operation.request.call.title}: the name is in use by an operation that has not "
                "completed; synchronize that one first, or give each a name of its own"
            )
        gone = self._gone.intersection(self._members.get(set_id, ())) or self._gone & {0}
        return left_error(operation.request.call, sorted(gone)) if gone else None

    def _take_join(self) -> Handle[int] | None:
        handle, self._join = self._join, None
        return handle

    def _given_up(self, *, all_uses: bool) -> list[Handle[Any]]:
        handle = self._take_join()
        handles: list[Handle[Any]] = [] if handle is None else [handle]
        if all_uses:
            lost, self._uses = self._uses, {}
            handles += [use.handle for uses in lost.values() for use in uses if use is not None]
        return handles
