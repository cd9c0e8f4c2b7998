"""What a rank says when it cannot go on, and how it ends the others, which would wait for it."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from hvdkit.context import Context
from hvdkit.errors import PeerError

#: What a launcher may need to pass a rank's last words on; what it has not read by then is lost.
_SECONDS_TO_FORWARD = 0.5

#: How TensorFlow quotes an error from inside a tf.function, in one of its own.
_QUOTED = f"{PeerError.__module__}.{PeerError.__name__}: "


class LastWords:
    """An excepthook: prints an uncaught exception, then ends every rank of the job.

    Of a rank that only suffers from another's end, one line will do: its traceback would stand
    where one looks for the cause.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._before = sys.excepthook

    def install(self) -> None:
        sys.excepthook = self

    def remove(self) -> None:
        """Put back what was there before, unless somebody else has taken its place since."""
        if sys.excepthook is self:
            sys.excepthook = self._before

    def __call__(
        self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        here, suffered = self._context.topology, suffered_from(error)
        what = f"raised {kind.__name__}"
        if suffered is None:
            self._before(kind, error, traceback)
        else:
            what = f"cannot go on: {suffered}"
        sys.stdout.flush()
        sys.stderr.write(f"hvdkit: rank {here.rank} of {here.size} {what}; ending the job\n")
        sys.stderr.flush()
        time.sleep(_SECONDS_TO_FORWARD)
        self._context.abort(1)


def suffered_from(error: BaseException) -> str | None:
    """Return what another rank's end has done to this one, in a line; None: it is no such error."""
    text = str(error)
    if not isinstance(error, PeerError):
        if _QUOTED not in text:
            return None
        text = text.partition(_QUOTED)[2]
    return next(iter(text.splitlines()), "another rank has ended")
