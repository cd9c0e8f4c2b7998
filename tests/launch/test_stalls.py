"""Whatever ranks do to each other, nobody waits for ever, and nobody is accused who only computes.

Each job runs several scenarios, one after the other, each between an `init` and a `shutdown`; what
its ranks print in brackets is what is looked at.
"""

import os
import re
import signal
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from launching import end_group, run, start

from .helpers import is_running, wait_for

SECONDS = 45

#: With memory that ranks share; with messages between ranks; and with messages in place of mail.
TRANSPORTS = {"shared": {}, "messages": {"HVDKIT_SHM": "0"}, "mail": {"MAIL": "messages"}}

PRELUDE = """
    import logging, os, sys, threading, time
    import numpy as np
    import hvdkit as hvd
    from hvdkit.api import communicator, context
    from hvdkit.engine.bucketing import Gradient
    from hvdkit.transport.mail import PipeMail

    if os.environ.get("MAIL") == "messages":  # as between nodes
        PipeMail.create = lambda local: "there are several nodes"
    if os.environ.get("HVDKIT_SHM") == "0" or "MAIL" in os.environ:
        assert "HVDKIT_NATIVE" not in os.environ
    heard = []

    class Ears(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    logging.getLogger("hvdkit").addHandler(Ears())
    logging.getLogger("hvdkit").propagate = False

    def begin(**limits):
        # Return this rank and sets of two ranks: 0 and 1, 1 and 2, 0 and 2.
        global rank, sets, reducer
        for name, seconds in limits.items():
            os.environ[f"HVDKIT_{name}_TIME_SECONDS"] = str(seconds)
        hvd.init()
        rank = hvd.rank()
        pairs = [[0, 1], [1, 2], [0, 2]] if hvd.size() == 3 else []
        sets = [hvd.add_process_set(pair) for pair in pairs]
        reducer = context().gradient_reducer([Gradient("w", (5,), np.dtype("f4"))])
        hvd.barrier()

    def asynchronous(name, process_set=None, count=3):
        x = np.ones(count)
        among = communicator(process_set)
        return among.allreduce_async([(x, x)], name=name, op=hvd.Sum, result=x)

    def synchronous(name=None, process_set=None, count=3):
        return hvd.allreduce(np.ones(count), op=hvd.Sum, name=name, process_set=process_set)

    def say(*words):
        sys.stdout.write(f"[{' '.join(str(word) for word in words)}]\\n")
        sys.stdout.flush()

    def outcome(function, *arguments, **keywords):
        # Return the result, or the kind of the error and its message in one line.
        try:
            return function(*arguments, **keywords)
        except hvd.HvdkitError as exc:
            return f"{type(exc).__name__}: " + " | ".join(map(str.strip, str(exc).splitlines()))
"""


def jobs(script, *transports, ranks=3, **environment):
    """Run a script after the prelude, once for each of the transports, all at the same time.

    Yields what was said, each job's in order, and the outcome.
    """
    source = textwrap.dedent(PRELUDE) + textwrap.dedent(script)
    with ThreadPoolExecutor() as pool:
        settings = [TRANSPORTS[transport] | environment for transport in transports]
        running = [
            pool.submit(run, source, ranks, timeout=SECONDS, environment=setting)
            for setting in settings
        ]
        for each in running:
            ended = each.result()
            yield sorted(re.findall(r"\[(.*?)\]\n", ended.stdout)), ended


def end_well(*arguments, **keywords):
    """Run jobs that must end without an error; yields what was said."""
    for said, ended in jobs(*arguments, **keywords):
        assert ended.status == 0, ended.stderr
        assert "Traceback" not in ended.stderr, ended.stderr
        yield said


# A rank that does not come


def test_a_stall_is_a_warning_that_says_who_is_late_and_what_it_did_last():
    """Rank 1 computes; the others wait for it in calls of all three kinds at once."""
    script = """
        begin()
        synchronous("first")
        asynchronous("early").wait()
        reducer.ready(0), reducer.finish()
        if rank == 1:
            time.sleep(1.9)
        handle = asynchronous("late")
        reducer.ready(0)
        assert synchronous("second")[0] == 3
        assert handle.wait()[0] == 3
        reducer.finish()
        hvd.barrier()
        assert rank == 0 or not heard, heard
        for text in heard:
            say(text.replace("\\n", " | "))
    """
    for said in end_well(script, "shared", "messages", HOROVOD_STALL_CHECK_TIME_SECONDS="1"):
        for line, name, did in zip(
            said,
            ("bucket.0", "late", "second"),
            (
                "allreduce 'bucket.0' (operation 1 there)",
                "allreduce 'early'",
                "allreduce 'first' (operation ",
            ),
            strict=True,
        ):
            title = f"allreduce '{name}' is stalled"
            assert line.startswith(f"{title}: ranks 0, 2 waited 1 s for rank 1 |"), line
            assert f"rank 1:  last did {did}" in line
            assert "; is in its own code |" in line


def test_a_stall_that_lasts_is_an_error_on_all_ranks():
    """Also on the late rank, when it comes at last; what is begun by name later goes on."""
    script = """
        begin(STALL_CHECK=0)
        began = time.monotonic()
        if rank == 1:
            time.sleep(2.8)
        handle = asynchronous("late")
        reducer.ready(0)
        errors = [outcome(synchronous, "x"), outcome(handle.wait), outcome(reducer.finish)]
        seconds = time.monotonic() - began
        assert seconds < 4, seconds
        assert outcome(synchronous, "y") == errors[0]  # a group that was given up stays so
        assert asynchronous("late").wait()[0] == 3
        for error in errors:
            say(error)
        hvd.shutdown()
        os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = "0"
        begin()
        assert synchronous("x")[0] == 3
    """
    limit = {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "2"}
    for said in end_well(script, "shared", "messages", **limit):
        assert len(said) == 9
        for name in ("'x'", "'late'", "'bucket.0'"):
            title = f"StallError: allreduce {name} is stalled"
            start = f"{title}: ranks 0, 2 waited 2 s for rank 1 |"
            assert sum(line.startswith(start) for line in said) == 3, said


# Ranks that wait for each other


DEADLOCKS = """
    def different_names():
        return outcome(asynchronous(f"name.{rank}").wait)

    def one_name_on_two_sets():
        return outcome(asynchronous("same", sets[0] if rank == 1 else None).wait)

    def synchronous_and_asynchronous():
        return outcome(synchronous, "loss") if rank == 0 else outcome(asynchronous("loss").wait)

    def calls_in_a_circle():
        return outcome(synchronous, f"on set {rank + 1}", sets[rank])

    def names_in_a_circle():
        return outcome(asynchronous(f"on set {rank + 1}", sets[rank]).wait)

    def gradients_and_a_call():
        if rank == 0:
            reducer.ready(0)
        return outcome(reducer.finish) if rank == 0 else outcome(synchronous, "loss")

    def two_ranks_while_the_third_works_on():
        # It makes a call every now and then, which must not hide that the others are stuck.
        if rank == 2:
            for _ in range(30):
                hvd.allreduce(np.ones(3), process_set=alone)
                time.sleep(0.04)
            return "went on"
        wait = asynchronous("x", sets[0]).wait if rank else lambda: synchronous("x", sets[0])
        return outcome(wait)

    for scenario in os.environ["SCENARIOS"].split():
        begin(DEADLOCK_CHECK=0.4)
        alone = hvd.add_process_set([2])
        began = time.monotonic()
        result = globals()[scenario]()
        seconds = time.monotonic() - began
        assert seconds < 4, (scenario, seconds)
        say(scenario, rank, result)
        hvd.shutdown()
"""

BY_NAME = "different_names one_name_on_two_sets names_in_a_circle"
IN_CALLS = (
    "synchronous_and_asynchronous calls_in_a_circle gradients_and_a_call "
    "two_ranks_while_the_third_works_on"
)
DEADLOCKED = {
    "different_names": (
        "rank 0:  allreduce 'name.0' (asynchronous, process set 0), for ranks 1-2 | "
        "rank 1:  allreduce 'name.1' (asynchronous, process set 0), for ranks 0, 2 | "
        "rank 2:  allreduce 'name.2' (asynchronous, process set 0), for ranks 0-1 | "
    ),
    "one_name_on_two_sets": (
        "ranks 0, 2:  allreduce 'same' (asynchronous, process set 0), for rank 1 | "
        "rank 1:      allreduce 'same' (asynchronous, process set 1), for rank 0 | "
    ),
    "names_in_a_circle": (
        "rank 0:  allreduce 'on set 1' (asynchronous, process set 1), for rank 1 | "
        "rank 1:  allreduce 'on set 2' (asynchronous, process set 2), for rank 2 | "
        "rank 2:  allreduce 'on set 3' (asynchronous, process set 3), for rank 0 | "
    ),
    "synchronous_and_asynchronous": (
        "rank 0:     allreduce 'loss' (all ranks), for ranks 1-2 | "
        "ranks 1-2:  allreduce 'loss' (asynchronous, process set 0), for rank 0 | "
    ),
    "calls_in_a_circle": (
        "rank 0:  allreduce 'on set 1' (process set 1), for rank 1 | "
        "rank 1:  allreduce 'on set 2' (process set 2), for rank 2 | "
        "rank 2:  allreduce 'on set 3' (process set 3), for rank 0 | "
    ),
    "gradients_and_a_call": (
        "rank 0:     allreduce 'bucket.0' (gradients 0.1), for ranks 1-2 | "
        "ranks 1-2:  allreduce 'loss' (all ranks), for rank 0 | "
    ),
    "two_ranks_while_the_third_works_on": (
        "rank 0:  allreduce 'x' (process set 1), for rank 1 | "
        "rank 1:  allreduce 'x' (asynchronous, process set 1), for rank 0 | "
    ),
}


@pytest.mark.parametrize(
    ("scenarios", "transports"), [(BY_NAME, ["mail"]), (IN_CALLS, ["shared", "messages"])]
)
def test_a_deadlock_is_an_error_on_every_rank_in_it(scenarios, transports):
    """Within seconds, with what each waits for; and the next `init` starts afresh."""
    for said in end_well(DEADLOCKS, *transports, SCENARIOS=scenarios):
        assert len(said) == 3 * len(scenarios.split())
        for line in said:
            scenario, rank, result = line.split(" ", 2)
            if (scenario, rank) == ("two_ranks_while_the_third_works_on", "2"):
                assert result == "went on"
            else:
                assert result.startswith("StallError: deadlock: ranks 0-"), line
                assert DEADLOCKED[scenario] in result, line


def test_no_false_alarms():
    """However long a rank computes or waits for data: whoever may yet come is not accused."""
    script = """
        def computing():
            # Rank 1 keeps the interpreter busy; the others wait in calls of all kinds at once.
            until = time.monotonic() + 1.5
            while rank == 1 and time.monotonic() < until:
                sum(range(10_000))
            handle = asynchronous("x")
            reducer.ready(0)
            synchronous("y")
            handle.wait()
            reducer.finish()

        def waiting_with_a_limit():
            # Each waits for what the others have yet to start, but not for ever.
            handle = asynchronous(f"by {rank}")
            try:
                handle.wait(1.5)
            except TimeoutError:
                pass
            for other in range(3):
                (handle if other == rank else asynchronous(f"by {other}")).wait()

        def joining():
            if rank:
                time.sleep(1.5)
                synchronous()
                asynchronous("only here").wait()
            hvd.join()

        def another_thread():
            # The main threads wait for each other; a thread beside each starts what they wait for.
            def beside():
                time.sleep(1.5)
                for other in {0, 1, 2} - {rank}:
                    asynchronous(f"by {other}").wait()

            thread = threading.Thread(target=beside)
            thread.start()
            asynchronous(f"by {rank}").wait()
            thread.join()

        begin(DEADLOCK_CHECK=0.4)
        for scenario in (computing, waiting_with_a_limit, joining, another_thread):
            scenario()
            hvd.barrier()
        assert not heard, heard
        say("done")
    """
    for said in end_well(script, "shared", "messages"):
        assert said == ["done"] * 3


# Ranks that leave


def test_shutdown_and_the_end_of_a_program_with_operations_in_flight():
    """What cannot begin any more is given up, and the ranks leave within seconds."""
    script = """
        def named_everywhere():
            # None of them can begin, for each rank has another name.
            return [asynchronous(f"by {rank}"), asynchronous(f"by {rank} too")]

        def named_on_one_rank():
            return [asynchronous("x")] if rank == 1 else []

        def gradients_on_one_rank():
            if rank == 2:
                reducer.ready(0)
            return []

        def gradients_of_different_models():
            # Rank 0 is in the all-reduce of one, the others in that of the other.
            other = context().gradient_reducer([Gradient("v", (7,), np.dtype("f4"))])
            (other if rank else reducer).ready(0)
            return []

        def all_that_can_begin():
            handles = [asynchronous(f"{n}", count=30_000) for n in range(20)]
            reducer.ready(0)
            for handle in handles:
                handle.wait()
            return []

        def in_the_hands_of_other_threads():
            # They wait for what never comes, or come themselves, when the main thread leaves.
            def beside():
                while True:
                    result = outcome(lambda: asynchronous(f"by {rank}").wait())
                    if "NotInitialized" in str(result) or "PeerError" in str(result):
                        return

            threads = [threading.Thread(target=beside) for _ in range(3)]
            beside_main.extend(threads)
            for thread in threads:
                thread.start()
            return []

        beside_main = []
        for scenario in (
            named_everywhere,
            named_on_one_rank,
            gradients_on_one_rank,
            gradients_of_different_models,
            all_that_can_begin,
            in_the_hands_of_other_threads,
        ):
            begin()
            handles = scenario()
            hvd.barrier()
            time.sleep(0.05 * rank)
            began = time.monotonic()
            hvd.shutdown()
            seconds = time.monotonic() - began
            assert seconds < 3, (scenario, seconds)
            for handle in handles:
                error = outcome(handle.wait)
                assert error.startswith(("NotInitializedError: ", "PeerError: ")), error
        for thread in beside_main:
            thread.join()
        begin()
        handles = gradients_of_different_models() + named_everywhere()
        hvd.barrier()
        say("end")
    """
    for said in end_well(script, "shared", "messages", "mail"):
        assert said == ["end"] * 3


LEAVING = """
    def in_a_call():
        synchronous("x")

    def by_name(process_set=None):
        return asynchronous("x", process_set).wait()

    def in_the_reducer():
        reducer.ready(0)
        reducer.finish()

    def in_join():
        hvd.join()
"""


@pytest.mark.parametrize("leaver", [1, 0])
def test_who_waits_for_a_rank_that_has_left_gets_an_error(leaver):
    script = (
        LEAVING
        + """
    leaver = int(os.environ["LEAVER"])  # without stall checks if that is rank 0
    for scenario in (in_a_call, by_name, in_the_reducer, in_join):
        for late in (False, True):
            begin(STALL_CHECK=60)
            pair = next(each for each in sets if leaver not in each.ranks)
            if rank == leaver:
                time.sleep(0.2 * late)
            else:
                time.sleep(0.2 * (not late))
                began = time.monotonic()
                result = outcome(scenario)
                seconds = time.monotonic() - began
                assert seconds < 3, (scenario, seconds)
                say(scenario.__name__, result)
                hvd.barrier(process_set=pair)  # so that no other leaves before both have seen it
            hvd.shutdown()
    begin()
    if rank != leaver:
        pair = next(each for each in sets if leaver not in each.ranks)
        time.sleep(0.2)
        assert synchronous(None, pair)[0] == 2
        say("without", outcome(by_name, pair))
    hvd.shutdown()
    begin()
    assert synchronous()[0] == 3
    """
    )
    environment = {"LEAVER": str(leaver), "HVDKIT_STALL_CHECK_DISABLE": "01"[leaver == 0]}
    for said in end_well(script, "shared", "messages", **environment):
        errors, without = said[:16], said[16:]
        for line in errors:
            assert " PeerError: " in line
            assert f": rank {leaver} called shutdown(), or the program ended there" in line
        if leaver:  # rank 0 is needed to match names
            assert without == ["without [2. 2. 2.]"] * 2
        else:
            assert all(line.startswith("without PeerError: ") for line in without)


def test_a_rank_that_ends_early_ends_the_job_if_others_need_it():
    """And it is said which rank it was."""
    script = """
        begin()
        handle = asynchronous("x") if rank == 2 else None
        if rank == 1:
            sys.exit(3)
        synchronous() if rank == 0 else handle.wait()
        say("went on")
    """
    for said, ended in jobs(script, "shared", "messages"):
        assert ended.status != 0
        assert said == []
        assert "cannot go on: allreduce" in ended.stderr, ended.stderr
        assert "rank 1 called shutdown(), or the program ended there" in ended.stderr
        assert "Traceback" not in ended.stderr, ended.stderr


def test_an_exception_on_one_rank_while_operations_are_in_flight():
    script = """
        begin()
        handle = asynchronous("x")
        reducer.ready(0)
        if rank == 1:
            asynchronous("y")
            raise ZeroDivisionError("the loss of rank 1")
        asynchronous("z").wait()
        say("went on")
    """
    for said, ended in jobs(script, "shared", "messages"):
        assert ended.status != 0
        assert said == []
        assert "ZeroDivisionError: the loss of rank 1" in ended.stderr
        assert "hvdkit: rank 1 of 3 raised ZeroDivisionError; ending the job" in ended.stderr
        assert ended.stderr.count("Traceback") == 1, ended.stderr


WAITING = """
    from pathlib import Path

    begin()
    handle = asynchronous("first")
    reducer.ready(0)
    handle.wait(), reducer.finish()
    note = Path(os.environ["NOTES"]) / f"rank{rank}"
    note.with_suffix(".new").write_text(str(os.getpid()))
    note.with_suffix(".new").rename(note)
    if rank == 0:
        asynchronous("second").wait()
    elif rank == 1:
        time.sleep(600)
    reducer.ready(0)
    reducer.finish()
"""


@pytest.fixture
def waiting(tmp_path):
    """Start two jobs in which rank 0 waits for a name, rank 2 for gradients, and rank 1 sleeps.

    Yields each job with its ranks' process ids; then all of it must end soon.
    """
    running = []
    try:
        for transport in ("shared", "messages"):
            notes = tmp_path / transport
            notes.mkdir()
            environment = {"NOTES": str(notes)} | TRANSPORTS[transport]
            script = textwrap.dedent(PRELUDE) + textwrap.dedent(WAITING)
            running.append((start(script, 3, environment=environment), notes))
        found = [(job, process_ids(job, notes)) for job, notes in running]
        time.sleep(0.2)  # for the ranks to begin to wait
        yield found
        for job, pids in found:
            job.communicate(timeout=10)
            assert job.returncode != 0
            wait_for(lambda pids=pids: not any(map(is_running, pids)), 10, "the ranks end")
    finally:
        for job, _ in running:
            end_group(job)


def process_ids(job, notes):
    """Return those of the three ranks, when they are about to wait."""
    paths = [notes / f"rank{rank}" for rank in range(3)]
    wait_for(
        lambda: all(path.exists() for path in paths) or job.poll() is not None,
        SECONDS,
        "the ranks start",
    )
    assert job.poll() is None, job.stderr.read()
    return [int(path.read_text()) for path in paths]


def test_kill_9_of_a_rank_for_which_others_wait(waiting):
    for _, pids in waiting:
        os.kill(pids[1], signal.SIGKILL)


def test_kill_9_of_a_rank_that_waits(waiting):
    for _, pids in waiting:
        os.kill(pids[2], signal.SIGKILL)


def test_control_c(waiting):
    for job, _ in waiting:
        os.kill(job.pid, signal.SIGINT)


def test_control_c_on_one_rank(waiting):
    for _, pids in waiting:
        os.kill(pids[0], signal.SIGINT)
