"""What a rank says when it cannot go on, and how it ends the others, which would wait for it."""

from __future__ import annotations

import builtins
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

from hvdkit.context import Context
from hvdkit.errors import PeerError

#: What a launcher may need to pass a rank's last words on; what it has not read by then is lost.
_SECONDS_TO_FORWARD = 0.5

#: How TensorFlow quotes an error from inside a tf.function, in one of its own.
_QUOTED = f"{PeerError.__module__}.{PeerError.__name__}: "


#: What raises SystemExit by a call; the last two are not there under ``python -S``.
_EXITS = ((sys, "exit"), (builtins, "exit"), (builtins, "quit"))


class LastWords:
    """An excepthook: prints an uncaught exception, then ends every rank of the job.

    An exit with another status than 0 does the same when the interpreter ends: over MPI the rank
    would otherwise wait for the others, in MPI_Finalize.  A SystemExit that no function of `_EXITS`
    has raised is found in a script (``python train.py``), not under ``python -m`` or ``-c``.

    Of a rank that only suffers from another's end, one line will do: its traceback would stand
    where one looks for the cause.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._before = sys.excepthook
        self._process = os.getpid()
        self._exits: dict[tuple[Any, str], tuple[Any, Any]] = {}
        self._uncaught: SystemExit | None = None
        self._stderr: Any = None

    def install(self) -> None:
        sys.excepthook = self
        for place in _EXITS:
            if hasattr(*place):
                before = getattr(*place)
                self._exits[place] = before, self._noting(before)
                setattr(*place, self._exits[place][1])
        with suppress(AttributeError):  # a script may have put anything in its place
            self._flush = sys.stderr.flush
            sys.stderr.flush = self._look_and_flush  # type: ignore[method-assign]
            self._stderr = sys.stderr

    def remove(self) -> None:
        """Put back what was there before, unless somebody else has taken its place since."""
        if sys.excepthook is self:
            sys.excepthook = self._before
        for place, (before, own) in self._exits.items():
            if getattr(*place) is own:
                setattr(*place, before)
        if self._stderr is not None and self._stderr.flush == self._look_and_flush:
            del self._stderr.flush

    def __call__(
        self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        suffered = suffered_from(error)
        what = f"raised {kind.__name__}"
        if suffered is None:
            self._before(kind, error, traceback)
        else:
            what = f"cannot go on: {suffered}"
        self._end(what, 1)

    def at_exit(self) -> None:
        """End every rank if this process ends by an exit with another status than 0."""
        error = self._uncaught
        # A process that this one has forked ends by itself.
        if error is None or not status_of(error.code) or os.getpid() != self._process:
            return
        status = status_of(error.code)
        suffered = None if error.__context__ is None else suffered_from(error.__context__)
        what = f"exits with status {status}"
        self._end(what if suffered is None else f"cannot go on: {suffered}", status)

    def _end(self, what: str, status: int) -> None:
        here = self._context.topology
        sys.stdout.flush()
        sys.stderr.write(f"hvdkit: rank {here.rank} of {here.size} {what}; ending the job\n")
        sys.stderr.flush()
        time.sleep(_SECONDS_TO_FORWARD)
        self._context.abort(status)

    def _noting(self, leave: Callable[..., NoReturn]) -> Callable[..., NoReturn]:
        """Return `leave`, ``sys.exit`` or the like, whose SystemExit tells when nobody caught it.

        In another thread, which alone is ended by it, it stays what it is.
        """

        def exit(*code: Any, **named: Any) -> NoReturn:
            try:
                leave(*code, **named)
            except SystemExit as exc:
                if threading.current_thread() is not threading.main_thread():
                    raise
                raised = _NotedExit(*exc.args)
            raised.when_uncaught = self._note
            raise raised

        return exit

    def _look_and_flush(self) -> None:
        """Look for a SystemExit that nobody caught: after a script the interpreter flushes stderr.

        It then still holds the exception by which it is about to end, and nobody else does.
        """
        if _asked_by_interpreter() and self._uncaught is None:
            self._uncaught = _find_uncaught_exit()
        self._flush()

    def _note(self, error: SystemExit) -> None:
        self._uncaught = error


class _NotedExit(SystemExit):
    """A SystemExit that tells when the interpreter itself asks for its code: it ends by it.

    An ``atexit`` function cannot find out by itself: the exception is gone by then, and one that
    somebody caught does not count.
    """

    when_uncaught: Callable[[SystemExit], None]

    @property
    def code(self) -> Any:
        if _asked_by_interpreter():
            self.when_uncaught(self)
        return super().code

    @code.setter
    def code(self, value: Any) -> None:
        vars(SystemExit)["code"].__set__(self, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return SystemExit, self.args


_NotedExit.__name__ = _NotedExit.__qualname__ = "SystemExit"  # as a traceback shows it
_NotedExit.__module__ = "builtins"


def _asked_by_interpreter() -> bool:
    """Return whether no Python code has called the function that calls this."""
    try:
        sys._getframe(2)
    except ValueError:
        return True
    return False


def _find_uncaught_exit() -> SystemExit | None:
    """Return the SystemExit that no variable holds, and that ended the frame it came from."""
    # By type(), for isinstance() asks the objects themselves, of which some answer with a warning.
    everything = gc.get_objects()
    found: list[SystemExit] = [each for each in everything if issubclass(type(each), SystemExit)]
    del everything  # or it would refer to them
    for error in found:
        trace = error.__traceback__  # before Python 3.12 none yet
        ended_there = trace is None or trace.tb_frame.f_lasti == trace.tb_lasti
        holders = [each for each in gc.get_referrers(error) if each is not found]
        if ended_there and not any(type(each) is not FrameType for each in holders):
            return error
    return None


def status_of(code: Any) -> int:
    """Return the exit status of a process that ends by ``SystemExit(code)``."""
    if code is None:
        return 0
    return code & 0xFF if isinstance(code, int) else 1


def suffered_from(error: BaseException) -> str | None:
    """Return what another rank's end has done to this one, in a line; None: it is no such error."""
    text = str(error)
    if not isinstance(error, PeerError):
        if _QUOTED not in text:
            return None
        text = text.partition(_QUOTED)[2]
    return next(iter(text.splitlines()), "another rank has ended")
