"""The progress thread: named operations, matched by rank 0 and run in the order it decides.

    user's threads     submit ----> Submissions                               handle.wait()
    progress thread          Announcer -> mail -> rank 0: Coordinator              ^
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
from hvdkit.engine.announcing import Announcer
from hvdkit.engine.handles import Handle
from hvdkit.engine.negotiation import AllJoined, Announcement, Decision, Fail, Left, Run, left_error
from hvdkit.engine.performing import Performer
from hvdkit.engine.recording import Recording
from hvdkit.engine.requests import Key, Operation, Request
from hvdkit.engine.stall import Watch
from hvdkit.engine.submissions import Submissions
from hvdkit.errors import HorovodInternalError, HvdkitError, NotInitializedError, PeerError
from hvdkit.transport.mail import Mail

log = logging.getLogger("hvdkit")

#: How long a rank that leaves waits for rank 0 to let it go.
SECONDS_TO_LEAVE = 10.0

#: How long it waits for the others to leave as well, so that all can let go of everything.
SECONDS_FOR_FAREWELLS = 0.5

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
        self._rank = rank
        self._watch = watch
        self._recording = recording
        self.gone: set[int] = set()
        """The ranks that have left."""
        self.last = ""
        """What was done by name last."""
        self._submissions = Submissions(members, self.gone)
        self._announcer = Announcer(mail, members, self.gone, rank=rank, fuse_bytes=fuse_bytes)
        self._decided: deque[Decision] = deque()
        self._running: int | None = None  # the process set in which an operation is under way
        self._performer = Performer(groups, recording)
        self._news = False
        self._asleep = False
        self._closed = 0.0  # when
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
        operation.handle.hurry = self._submissions.hasten
        error = self._submissions.put(operation)
        if error is not None:
            call = operation.request.call
            refusal = Request(Call.refused(call.kind, call.name, error))
            self.refuse(Operation(operation.key, refusal))
            raise error
        self._nudge()
        return operation.handle

    def refuse(self, operation: Operation) -> None:
        """Announce a call that this rank cannot make, so that the others learn why."""
        if self._submissions.put_refused(operation):
            self._nudge()

    def join(self) -> Handle[int]:
        """Announce that this rank has no more data; completes with the rank that joined last."""
        handle = self._submissions.join()
        self._nudge()
        return handle

    def reconsider(self) -> None:
        """Tell that the process sets have changed."""
        self._announcer.reconsider()
        self._nudge()

    def in_use(self, set_id: int) -> bool:
        """Return whether operations are under way in a process set."""
        # In this order: what begins between the two looks is running before it is off the table.
        return self._submissions.in_use(set_id) or self._running == set_id

    def release(self, set_id: int) -> None:
        """Let go of what is kept for a process set, in which nothing is under way on any rank."""
        self._performer.release(set_id)

    def pending(self) -> list[Operation]:
        """Return the operations that have not begun."""
        return self._submissions.pending()

    def close(self) -> None:
        """Run what is decided, give up the rest, and end the thread.

        Others may go on.  Waits for rank 0 to have heard of it, lest others begin with this rank;
        and for what is under way in the channels, which others may have to be told to give up.
        """
        self._closed = time.monotonic()  # first, for the thread looks at it once it is closing
        self._submissions.close()
        self._nudge()
        self._thread.join()

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
        self._submissions.failure = failure
        for group in list(self._groups.values()):
            group.abort(failure)

    def _loop(self) -> None:
        while not self._may_leave():
            self._news = False
            self._submissions.settle()
            self._announce()
            if self._decided:
                self._obey(self._decided.popleft())
            self._asleep = True
            timeout = self._watch.interval
            if self._submissions.closing:
                timeout = CLOSING_PACE
            if self._news or self._decided or self._may_leave():
                timeout = 0.0
            patient = self._submissions.idle and not self._announcer.decides_for_others
            messages = self._mail.receive(timeout, patient=patient)
            self._asleep = False
            for source, message in messages:
                self._deliver(source, pickle.loads(message))
            self._watch.look()

    def _may_leave(self) -> bool:
        """Return whether nothing is done any more in which others need this rank.

        So it is once rank 0 knows that this rank leaves, and all that began before has ended.
        """
        if not self._submissions.closing or self._decided:
            return False
        at_rest, seconds = self._watch.part(), time.monotonic() - self._closed
        let_go = bool(self.gone & {0, self._rank}) or seconds >= SECONDS_TO_LEAVE
        alone = self._watch.heard_all() or seconds >= SECONDS_FOR_FAREWELLS
        return at_rest and let_go and alone

    def _announce(self) -> None:
        self._take(self._announcer.announce(self._submissions.take_new()))

    def post(self, destination: int, message: Any) -> None:
        """Send a message to the progress thread of another rank; see `Announcer.post`."""
        self._announcer.post(destination, message)

    def give_up(self, key: Key, error: HvdkitError) -> None:
        """Fail a named operation on every rank of it.  On rank 0."""
        self._take(self._announcer.give_up(key, error))

    def waiting(self) -> dict[Key, tuple[Call, tuple[int, ...], tuple[int, ...]]]:
        """Return what ranks have announced and others have not.  On rank 0."""
        return self._announcer.waiting()

    def _deliver(self, source: int, message: Any) -> None:
        if isinstance(message, Announcement):
            self._announcer.hear(source, message)
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
            self._submissions.note_decided(keys, now)

    def _obey(self, decision: Decision) -> None:
        if isinstance(decision, Run):
            self._run(decision)
        elif isinstance(decision, Fail):
            operation = self._submissions.begin(decision.key)
            if operation is not None:
                operation.handle.fail(decision.error)
        elif isinstance(decision, Left):
            self._without(decision.rank)
        elif isinstance(decision, AllJoined):
            joined = self._submissions.end_join()
            if joined is not None:
                joined.complete(decision.last)

    def _run(self, run: Run) -> None:
        """Run what was decided, together with the other ranks."""
        self._running = run.keys[0][0]
        keys = () if self._rank in run.absent else run.keys
        mine = [use for key in keys if (use := self._submissions.begin(key)) is not None]
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
        if rank != self._rank:
            for handle in self._submissions.give_up(all_uses=rank == 0):
                handle.fail(left_error(Call(handle.title, None), [rank]))

    def _leave(self) -> None:
        """End whatever waits for this thread; if it failed, the others hear of it only now.

        That a rank is lost they hear from the transport, each by itself.
        """
        handles, failure = self._submissions.end(), self._submissions.failure
        error = failure or NotInitializedError("hvdkit was shut down before the operation began")
        for handle in handles:
            handle.fail(error)
        if failure is not None and not isinstance(failure, PeerError):
            with suppress(Exception):
                self._announcer.resign()
