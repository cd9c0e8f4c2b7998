"""What mpirun itself says of a job's end, where hvdrun and the rank have said the same already.

Open MPI closes a job that has failed with blocks of text between dashed rules.  Those that are
known, word by word, are kept back until it is known how the job has ended; each is dropped if all
that it tells has been told, else shown.  Everything else is shown as it comes.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_RULE = re.compile(rb"-{20,}\s*")

#: What hvdkit writes on a rank before it calls MPI_Abort.
_LAST_WORDS = re.compile(rb"hvdkit: rank (\d+) of \d+ .*; ending the job")

#: By the rank, in MPI_Abort.
_ABORT = re.compile(
    rb"MPI_ABORT was invoked on rank (\d+) in communicator MPI_COMM_WORLD "
    rb"Proc: \S+ Errorcode: -?\d+ "
    rb"NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes\. "
    rb"You may or may not see output from other processes, depending on "
    rb"exactly when Open MPI kills them\."
)

#: By mpirun, when it has ended the others: which rank, and its status.
_ENDS = (
    re.compile(
        rb'\S+ has exited due to process rank (\d+) with PID \d+ on node \S+ calling "abort"\. '
        rb"This may have caused other processes in the application to be terminated by signals "
        rb"sent by \S+ \(as reported here\)\."
    ),
    re.compile(
        rb"\S+ detected that one or more processes exited with non-zero status, thus causing the "
        rb"job to be terminated\. The first process to do so was: "
        rb"Process name: \[\S+,(\d+)\] Exit code: \d+"
    ),
    re.compile(
        rb"\S+ noticed that process rank (\d+) with PID \d+ on node \S+ exited on signal \d+ "
        rb"\([^)]*\)\."
    ),
)

_LONGEST_BLOCK = 12


class Remarks:
    """The lines of mpirun's stderr, sorted."""

    def __init__(self) -> None:
        self._block: list[bytes] = []
        self._kept: list[list[bytes]] = []
        self._is_after_kept = False
        self._is_in_another = False  # block, which is none of the known
        self._said: set[int] = set()

    def hear(self, line: bytes) -> None:
        """Take note of a line that a rank has written to stderr."""
        if words := _LAST_WORDS.match(line):
            self._said.add(int(words[1]))

    def take(self, line: bytes) -> list[bytes]:
        """Return the lines that can be shown, now that `line` has come."""
        is_rule = _RULE.fullmatch(line) is not None
        if self._block:
            return self._go_on(line, is_rule=is_rule)
        if self._is_after_kept and not line.strip():
            self._kept[-1].append(line)
            return []
        self._is_after_kept = False
        if is_rule and not self._is_in_another:
            self._block = [line]
            return []
        self._is_in_another &= not is_rule
        return [line]

    def _go_on(self, line: bytes, *, is_rule: bool) -> list[bytes]:
        """Return what can be shown of a block that has begun."""
        self._block.append(line)
        if not is_rule and len(self._block) < _LONGEST_BLOCK:
            return []
        block, self._block = self._block, []
        text = _words(block)
        if is_rule and any(known.fullmatch(text) for known in (_ABORT, *_ENDS)):
            self._kept.append(block)
            self._is_after_kept = True
            return []
        if is_rule and not text:  # it may end the one block, or begin the next
            self._block = [block.pop()]
        self._is_in_another = not is_rule
        return block

    def rest(self, named: Collection[int]) -> list[bytes]:
        """Return the lines that tell more than has been told.

        Args:
            named: the ranks of whose end hvdrun itself tells.
        """
        kept, self._kept = self._kept, []
        told = [each for each in kept if _is_told(_words(each), self._said, named)]
        unclosed, self._block = self._block, []
        return [line for each in kept if each not in told for line in each] + unclosed


def _is_told(text: bytes, said: Collection[int], named: Collection[int]) -> bool:
    if abort := _ABORT.fullmatch(text):
        return int(abort[1]) in said
    return any((end := known.fullmatch(text)) and int(end[1]) in named for known in _ENDS)


def _words(block: list[bytes]) -> bytes:
    """Return what stands between the rules, in one line."""
    return b" ".join(b" ".join(line for line in block if not _RULE.fullmatch(line)).split())
