"""A rank that raises while the others are inside a tf.function."""

import pytest
from launching import run

pytest.importorskip("tensorflow")


def test_only_the_cause_has_a_traceback():
    outcome = run(
        """
        import tensorflow as tf
        import hvdkit.tensorflow as hvd

        hvd.init()
        step = tf.function(lambda x: hvd.allreduce(x))
        step(tf.ones(5))
        if hvd.rank() == 1:
            raise ValueError("the data are gone")
        step(tf.ones(5))
        """,
        2,
        timeout=120,
        environment={"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert outcome.status != 0
    assert outcome.stderr.count("Traceback (most recent call last)") == 1, outcome.stderr
    assert "ValueError: the data are gone" in outcome.stderr
    assert "rank 1 of 2 raised ValueError; ending the job" in outcome.stderr
    # Rank 0's own line is there only where the launcher lets it speak: MPICH's kills it at once.
    assert "rank 0 of 2 raised" not in outcome.stderr
