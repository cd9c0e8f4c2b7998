"""Ranks that leave while others wait, in an orderly way or not: nobody waits for ever."""

import os
import signal
import time

import pytest
from launching import end_group

from .helpers import is_running, wait_for
from .scenarios import SECONDS, begin, end_well, jobs


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


@pytest.mark.parametrize("leaver", [1, 0])
def test_who_waits_for_a_rank_that_has_left_gets_an_error(leaver):
    """Whether it waits already, or calls only later."""
    script = """
        def in_a_call():
            synchronous("x")

        def by_name(process_set=None):
            return asynchronous("x", process_set).wait()

        def in_the_reducer():
            reducer.ready(0)
            reducer.finish()

        def in_join():
            hvd.join()

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
                    hvd.barrier(process_set=pair)  # neither leaves before both have seen it
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


ENDS_EARLY = """
    begin()
    handle = asynchronous("x") if rank == 2 else None
    if rank == 1:
        sys.exit({status})
    synchronous() if rank == 0 else handle.wait()
    say("went on")
"""


def test_a_rank_that_ends_early_ends_the_job_if_others_need_it():
    """And it is said which rank it was."""
    for said, ended in jobs(ENDS_EARLY.format(status=0), "shared", "messages"):
        assert ended.status != 0
        assert said == []
        assert "cannot go on: allreduce" in ended.stderr, ended.stderr
        assert "rank 1 called shutdown(), or the program ended there" in ended.stderr
        assert "Traceback" not in ended.stderr, ended.stderr


def test_a_rank_that_ends_with_a_status_ends_the_job():
    for said, ended in jobs(ENDS_EARLY.format(status=3), "shared", "messages"):
        assert ended.status != 0
        assert said == []
        assert "hvdkit: rank 1 of 3 exits with status 3; ending the job" in ended.stderr
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
            running.append((begin(WAITING, transport, NOTES=str(notes)), notes))
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
