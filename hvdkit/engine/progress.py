"""The progress thread: named operations, matched by rank 0 and run in the order it decides.

    user's threads     submit ----> queue                                     handle.wait()
    progress thread          announce -> mail -> rank 0: Coordinator               ^
                             run <- mail <- decisions                  ------------+

There is one such thread a rank.  It sleeps until somebody submits or mail comes.  Between naps it
lets the `Watch` look whether anything is stuck.

Decisions are obeyed one by one, in the order in which they come; so those about one name concern
its uses in the order of submission.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from hvdkit.collectives.calls import Call
from hvdkit.collectives.group import Group
from hvdkit.engine.handles import Handle
from hvdkit.engine.negotiation import (
    AllJoined,
    Announcement,
    Coordinator,
    Decision,
    Fail,
    Left,
    Run,
    keep,
    left_error,
)
from hvdkit.engine.performing import Performer
from hvdkit.engine.recording import Recording
from hvdkit.engine.requests import Key, Operation, Request
from hvdkit.engine.stall import Farewell, Watch
from hvdkit.errors import (
    ArgumentError,
    HorovodInternalError,
    HvdkitError,
    NotInitializedError,
    PeerError,
)
from hvdkit.transport.mail import Mail

log = logging.getLogger("hvdkit")

#: How long a rank that leaves waits for rank 0 to let it go.
SECONDS_TO_LEAVE = 10.0

#: How long it waits for the others to leave as well, so that all can let go of everything.
SECONDS_FOR_FAREWELLS = 0.5

#: Seconds that a burst of submissions is given: after the last one, and in all.
LINGER = 300e-6
LONGEST_LINGER = 1e-3

#: Seconds between looks of a rank that leaves whether its channels have come to rest.
CLOSING_PACE = 0.02


class Progress:
    """Runs this rank's named operations.  Threads may share it.

    Args:
        mail: to and from the same object on the other ranks.
        groups: of each process set that this rank is in, by its number; a live mapping.
        members: the ranks of every process set by its number; a live mapping.
        rank: this rank among all.
        fuse_bytes: the most that travels together.
        watch: looks for what is stuck.
        recording: is told what was done.
    """

    def __init__(
        self,
        mail: Mail,
        groups: Mapping[int, Group],
        members: Mapping[int, tuple[int, ...]],
        *,
        rank: int,
        fuse_bytes: int,
        watch: Watch,
        recording: Recording,
    ) -> None:
        self._mail = mail
        self._groups = groups
        self._members = members
        self._rank = rank
        self._watch = watch
        self._recording = recording
        self._coordinator = Coordinator(members, fuse_bytes=fuse_bytes) if rank == 0 else None
        self._lock = threading.Lock()
        self._submitted: list[Operation] = []  # and not announced
        self._uses: dict[Key, list[Operation | None]] = {}  # of names; None: one that was refused
        self._told: dict[int, Request] = {}  # what rank 0 knows, by signature
        self._decided: deque[Decision] = deque()
        self._running: int | None = None  # the process set in which an operation is under way
        self._performer = Performer(groups, recording)
        self._join: Handle[int] | None = None
        self._join_announced = False
        self._regrouped = False
        self._news = False
        self._asleep = False
        self._lingers = False
        self._hurry = threading.Event()
        self._closing = False
        self._leave_announced = False
        self._closed = 0.0  # when
        self._failure: HvdkitError | None = None
        self.gone: set[int] = set()
        """The ranks that have left."""
        self.last = ""
        """What was done by name last."""
        watch.attach(self)
        self._thread = threading.Thread(target=self._live, name="hvdkit-progress", daemon=True)
        self._thread.start()

    # From the user's threads

    def submit(self, operation: Operation) -> Handle[Any]:
        """Start an operation; returns at once.

        Raises:
            ArgumentError: an operation of this name is under way in the process set.  The other
                ranks get a MismatchError that says so.
            NotInitializedError: after `close`.
        """
        operation.submitted = time.perf_counter()
        operation.handle.hurry = self._hasten
        with self._lock:
            self._check_open()
            error = self._why_refused(operation)
            if error is None:
                self._uses.setdefault(operation.key, []).append(operation)
                self._submitted.append(operation)
        if error is not None:
            call = operation.request.call
            refusal = Request(Call.refused(call.kind, call.name, error))
            self.refuse(Operation(operation.key, refusal))
            raise error
        self._nudge()
        return operation.handle

    def refuse(self, operation: Operation) -> None:
        """Announce a call that this rank cannot make, so that the others learn why."""
        with self._lock:
            if self._closing or 0 in self.gone:
                return
            self._uses.setdefault(operation.key, []).append(None)
            self._submitted.append(operation)
        self._nudge()

    def join(self) -> Handle[int]:
        """Announce that this rank has no more data; completes with the rank that joined last."""
        handle: Handle[int] = Handle("join")
        with self._lock:
            self._check_open()
            if self._join is not None:
                raise ArgumentError("join() was called twice at once")
            if self.gone:
                raise left_error(Call("join", None), sorted(self.gone))
            self._join, self._join_announced = handle, False
        self._nudge()
        return handle

    def reconsider(self) -> None:
        """Tell that the process sets have changed."""
        self._regrouped = True
        self._nudge()

    def in_use(self, set_id: int) -> bool:
        """Return whether operations are under way in a process set."""
        with self._lock:
            return self._running == set_id or any(key[0] == set_id for key in self._uses)

    def release(self, set_id: int) -> None:
        """Let go of what is kept for a process set, in which nothing is under way on any rank."""
        self._performer.release(set_id)

    def pending(self) -> list[Operation]:
        """Return the operations that have not begun."""
        with self._lock:
            return [use for uses in self._uses.values() for use in uses if use is not None]

    def close(self) -> None:
        """Run what is decided, give up the rest, and end the thread.

        Others may go on.  Waits for rank 0 to have heard of it, lest others begin with this rank;
        and for what is under way in the channels, which others may have to be told to give up.
        """
        with self._lock:
            self._closed = time.monotonic()  # first, for the thread looks at it once it is closing
            self._closing = True
        self._nudge()
        self._thread.join()

    def _check_open(self) -> None:
        if self._closing:
            raise self._failure or NotInitializedError("hvdkit was shut down")

    def _why_refused(self, operation: Operation) -> Exception | None:
        set_id, _ = operation.key
        if any(use is not None for use in self._uses.get(operation.key, ())):
            return ArgumentError(
                f"{operation.request.call.title}: the name is in use by an operation that has not "
                "completed; synchronize that one first, or give each a name of its own"
            )
        gone = self.gone.intersection(self._members.get(set_id, ())) or self.gone & {0}
        return left_error(operation.request.call, sorted(gone)) if gone else None

    def _nudge(self) -> None:
        self._news = True  # before the look: whoever goes to sleep looks the other way round
        if self._asleep:
            self._mail.wake()

    # On the progress thread

    def _live(self) -> None:
        """Nobody may wait for ever for a thread that is no more, whatever has ended it."""
        try:
            self._loop()
        except PeerError as exc:
            self._fail(exc)
        except BaseException as exc:
            log.exception("hvdkit's progress thread failed")
            failure = HorovodInternalError(f"hvdkit's progress thread failed: {exc!r}")
            failure.__cause__ = exc
            self._fail(failure)
        self._leave()

    def _fail(self, failure: HorovodInternalError) -> None:
        self._failure = failure
        for group in list(self._groups.values()):
            group.abort(failure)

    def _loop(self) -> None:
        while not self._may_leave():
            self._news = False
            self._gather()
            self._announce()
            if self._decided:
                self._obey(self._decided.popleft())
            self._asleep = True
            timeout = self._watch.interval
            if self._closing:
                timeout = CLOSING_PACE
            if self._news or self._decided or self._may_leave():
                timeout = 0.0
            messages = self._mail.receive(timeout)
            self._asleep = False
            for source, message in messages:
                self._deliver(source, pickle.loads(message))
            self._watch.look()

    def _may_leave(self) -> bool:
        """Return whether nothing is done any more in which others need this rank.

        So it is once rank 0 knows that this rank leaves, and all that began before has ended.
        """
        if not self._closing or self._decided:
            return False
        at_rest, seconds = self._watch.part(), time.monotonic() - self._closed
        let_go = bool(self.gone & {0, self._rank}) or seconds >= SECONDS_TO_LEAVE
        alone = self._watch.heard_all() or seconds >= SECONDS_FOR_FAREWELLS
        return at_rest and let_go and alone

    def _gather(self) -> None:
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

    def _hasten(self) -> None:
        """Announce what was submitted at once: somebody waits."""
        if self._lingers:
            self._hurry.set()

    def _announce(self) -> None:
        """Tell rank 0 of what was submitted; on rank 0, decide."""
        with self._lock:
            operations, self._submitted = self._submitted, []
            joined = self._join is not None and not self._join_announced
            self._join_announced = self._join is not None
            leaving = self._closing and not self._leave_announced
            self._leave_announced = self._closing
        if operations or joined or leaving:
            requests = {}
            for operation in operations:
                signature = operation.request.call.signature
                if signature not in self._told:
                    keep(self._told, operation.request)
                    requests[signature] = operation.request
            items = tuple((op.key, op.request.call.signature) for op in operations)
            announcement = Announcement(items, requests, joined, leaving)
            if self._coordinator is None:
                self.post(0, announcement)
                return
            self._coordinator.announce(0, announcement)
        if self._coordinator is not None:
            if self._regrouped:
                self._regrouped = False
                self._coordinator.reconsider()
            self.publish(self._coordinator.decide())

    def publish(self, decisions: list[Decision]) -> None:
        """Tell each rank the decisions that concern it.  On rank 0."""
        by_rank: dict[int, list[Decision]] = {}
        for decision in decisions:
            brief = decision.brief() if isinstance(decision, Run) else decision
            for rank in decision.ranks:
                needs_all = isinstance(decision, Run) and rank in decision.absent
                by_rank.setdefault(rank, []).append(decision if needs_all else brief)
        pickled: dict[tuple[int, ...], bytes] = {}  # most ranks are told the same
        for rank, theirs in by_rank.items():
            if rank != self._rank and rank not in self.gone:
                which = tuple(map(id, theirs))
                if which not in pickled:
                    pickled[which] = pickle.dumps(theirs, pickle.HIGHEST_PROTOCOL)
                self._mail.send(rank, pickled[which])
        self._take(by_rank.get(self._rank, []))

    def post(self, destination: int, message: Any) -> None:
        """Send a message to the progress thread of another rank, unless that is gone.

        A rank that has left may still wait for the end of what is under way in its channels: it
        hears a farewell.
        """
        if destination not in self.gone or isinstance(message, Farewell):
            self._mail.send(destination, pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def give_up(self, key: Key, error: HvdkitError) -> None:
        """Fail a named operation on every rank of it.  On rank 0."""
        assert self._coordinator is not None
        failed = self._coordinator.give_up(key, error)
        if failed is not None:
            self.publish([failed])

    def waiting(self) -> dict[Key, tuple[Call, tuple[int, ...], tuple[int, ...]]]:
        """Return what ranks have announced and others have not.  On rank 0."""
        assert self._coordinator is not None
        return self._coordinator.waiting()

    def _deliver(self, source: int, message: Any) -> None:
        if isinstance(message, Announcement):
            assert self._coordinator is not None
            self._coordinator.announce(source, message)
        elif isinstance(message, list):
            self._take(message)
        else:
            self._watch.deliver(source, message)

    def _take(self, decisions: list[Decision]) -> None:
        """Put decisions behind those that wait to be obeyed."""
        self._decided.extend(decisions)
        if self._recording.timeline is not None:
            now = time.perf_counter()
            keys = [key for run in decisions if isinstance(run, Run) for key in run.keys]
            with self._lock:
                for use in (self._uses.get(key, (None,))[0] for key in keys):
                    if use is not None:
                        use.decided = now

    def _obey(self, decision: Decision) -> None:
        if isinstance(decision, Run):
            self._run(decision)
        elif isinstance(decision, Fail):
            operation = self._begin(decision.key)
            if operation is not None:
                operation.handle.fail(decision.error)
        elif isinstance(decision, Left):
            self._without(decision.rank)
        elif isinstance(decision, AllJoined) and self._join is not None:
            handle, self._join = self._join, None
            handle.complete(decision.last)

    def _begin(self, key: Key) -> Operation | None:
        """Take the next use of a name off the table; None if it was refused."""
        with self._lock:
            uses = self._uses[key]
            use = uses.pop(0)
            if not uses:
                del self._uses[key]
            return use

    def _run(self, run: Run) -> None:
        """Run what was decided, together with the other ranks."""
        self._running = run.keys[0][0]
        keys = () if self._rank in run.absent else run.keys
        mine = [use for key in keys if (use := self._begin(key)) is not None]
        self.last = mine[-1].request.call.title if mine else self.last
        try:
            results = self._performer.perform(run, mine)
        except BaseException as exc:
            self._running = None
            for operation in mine:
                operation.handle.fail(exc)
            return
        self._running = None
        # The last one first: who waits for the first then finds all of them complete, and does not
        # take the interpreter from this thread for each.
        for operation, result in reversed(list(zip(mine, results, strict=True))):
            operation.handle.complete(result)

    def _without(self, rank: int) -> None:
        """Note that a rank has left, with which nothing begins any more."""
        self.gone.add(rank)
        if rank == self._rank:
            return
        handles: list[Handle[Any]] = []
        with self._lock:
            if self._join is not None:
                handles.append(self._join)
                self._join = None
            if rank == 0:
                handles += self._give_up_uses()
        for handle in handles:
            handle.fail(left_error(Call(handle.title, None), [rank]))

    def _give_up_uses(self) -> list[Handle[Any]]:
        """Take everything off the table; return the handles.  With the lock held."""
        lost, self._uses = self._uses, {}
        return [use.handle for uses in lost.values() for use in uses if use is not None]

    def _leave(self) -> None:
        """End whatever waits for this thread; if it failed, the others hear of it only now.

        That a rank is lost they hear from the transport, each by itself.
        """
        with self._lock:
            self._closing = True
            handles: list[Handle[Any]] = self._give_up_uses()
            if self._join is not None:
                handles.append(self._join)
                self._join = None
        error = self._failure or NotInitializedError(
            "hvdkit was shut down before the operation began"
        )
        for handle in handles:
            handle.fail(error)
        if self._failure is not None and not isinstance(self._failure, PeerError):
            with suppress(Exception):
                if self._coordinator is None:
                    self.post(0, Announcement(leaving=True))
                else:
                    self.publish([Left(self._members[0], 0)])
