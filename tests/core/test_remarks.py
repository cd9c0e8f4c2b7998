"""mpirun's last words: dropped where hvdrun and the rank have told as much, else shown."""

import pytest

from hvdkit.launch.remarks import Remarks

RULE = b"-" * 74

ABORT = [
    RULE,
    b"MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD",
    b"  Proc: [[49383,1],1]",
    b"  Errorcode: 3",
    b"",
    b"NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.",
    b"You may or may not see output from other processes, depending on",
    b"exactly when Open MPI kills them.",
    RULE,
]
CALLED = [
    RULE,
    b"prterun has exited due to process rank 1 with PID 0 on node vm calling",
    b'"abort". This may have caused other processes in the application to be',
    b"terminated by signals sent by prterun (as reported here).",
    RULE,
    b" ",
]
STATUS = [
    RULE,
    b"prterun detected that one or more processes exited with non-zero status,",
    b"thus causing the job to be terminated. The first process to do so was:",
    b"",
    b"   Process name: [prterun-vm-3314@1,1]",
    b"   Exit code:    137",
    RULE,
]
SIGNAL = [
    RULE,
    b"prterun noticed that process rank 1 with PID 520 on node vm exited on",
    b"signal 9 (Killed).",
    RULE,
]
OTHER = [RULE, b"There are not enough slots available in the system.", RULE]
LONG = [RULE, *[b"line %d" % number for number in range(20)], RULE]
LAST_WORDS = b"hvdkit: rank 1 of 2 exits with status 3; ending the job"


def shown(lines, *, said=(), named=()):
    """Return what is shown while the lines come, and what at the end."""
    remarks = Remarks()
    for line in said:
        remarks.hear(line)
    during = [out for line in lines for out in remarks.take(line)]
    return during, remarks.rest(named)


@pytest.mark.parametrize("block", [CALLED, STATUS, SIGNAL])
def test_the_end_of_a_rank_is_dropped_if_hvdrun_names_it(block):
    assert shown(block, named=[1]) == ([], [])
    assert shown(block, named=[0]) == ([], block)
    assert shown(block, said=[LAST_WORDS]) == ([], block)


def test_an_abort_is_dropped_if_its_rank_has_said_why():
    assert shown(ABORT, said=[LAST_WORDS]) == ([], [])
    assert shown(ABORT, named=[1]) == ([], ABORT), "a script has called MPI_Abort itself"
    other = LAST_WORDS.replace(b"rank 1", b"rank 0")
    assert shown(ABORT, said=[other], named=[1]) == ([], ABORT)


def test_all_of_them_in_a_row():
    lines = [b"before", *ABORT, *CALLED, b"between", *OTHER, b"after"]
    during, rest = shown(lines, said=[LAST_WORDS], named=[1])
    assert during == [b"before", b"between", *OTHER, b"after"]
    assert rest == []


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_block_that_says_a_word_more_is_shown(at):
    block = [*ABORT[:at], b"And something else.", *ABORT[at:]]
    assert shown(block, said=[LAST_WORDS], named=[1]) == (block, [])


def test_what_is_not_known_is_shown_at_once():
    for block in (OTHER, LONG, [b"one", b"", b"two"]):
        assert shown([*block, b"next"]) == ([*block, b"next"], [])
        assert shown([*block, *STATUS], named=[1]) == (block, [])


def test_rules_that_do_not_pair():
    assert shown([RULE]) == ([], [RULE])
    assert shown([RULE, *STATUS], named=[1]) == ([RULE], [])
    assert shown(STATUS[:-1], named=[1]) == ([], STATUS[:-1])
