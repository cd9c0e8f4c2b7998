"""Ranks that wait for one that does not come, or for each other; and those that only compute."""

import pytest

from .scenarios import end_well

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
    ("scenarios", "transports"),
    [(BY_NAME, ["mail"]), (IN_CALLS, ["shared", "messages"])],
    ids=["by name", "in calls"],
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
            # Rank 1 keeps the interpreter busy, also below a function of hvdkit, as in a closure;
            # the others wait in calls of all kinds at once.
            def compute(group=None):
                until = time.monotonic() + 0.8
                while time.monotonic() < until:
                    sum(range(10_000))

            if rank == 1:
                compute()
                communicator().call(compute)
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
