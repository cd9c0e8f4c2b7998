"""Processes that a rank starts: those of a pool are not ranks, and do not end the job."""

import textwrap

from launching import run

UNGUARDED = """
    import multiprocessing, sys
    import hvdkit as hvd

    hvd.init()
    if __name__ == "__main__":
        child = multiprocessing.get_context("spawn").Process(target=print, args=("never",))
        child.start()
        child.join(30)
        print("child ended with", child.exitcode)
        print(hvd.allreduce(1.0, op=hvd.Sum))
"""

FORKED = """
    import multiprocessing
    import hvdkit as hvd

    hvd.init()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(abs, range(-3, 0)))
    print(hvd.allreduce(1.0, op=hvd.Sum))
"""


def test_a_spawned_worker_that_would_be_a_rank_is_told_not_to(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(textwrap.dedent(UNGUARDED))
    outcome = run(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", 2)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("child ended with 1") == 2
    assert outcome.stdout.count("2.0") == 2
    assert "never" not in outcome.stdout
    assert 'under if __name__ == "__main__"' in outcome.stderr


def test_a_forked_pool_works_and_leaves_the_rank_alone():
    outcome = run(FORKED, 2)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("[3, 2, 1]") == 2
    assert outcome.stdout.count("2.0") == 2
