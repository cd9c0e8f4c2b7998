"""Which bucket is taken: one that is fast alone as well as while backward computes."""

import pytest

from hvdkit.config import BUCKET_BYTES, MIB
from hvdkit.tuner.lengths import BUCKETS, _least_behind
from hvdkit.tuning.measure import Timing


def timings(seconds, margin=0.0):
    """Timings of all buckets, `seconds` by MiB, with a margin that is a share of them."""
    known = {MIB * size: Timing(time, margin * time) for size, time in seconds.items()}
    return {bucket: known.get(bucket, Timing(2.0, margin * 2.0)) for bucket in BUCKETS}


@pytest.mark.parametrize(
    ("alone", "overlapped", "wanted"),
    [
        ({4: 1.0, 25: 1.0}, {4: 0.7, 25: 1.0}, 4),  # more of it is hidden
        ({4: 1.3, 25: 1.0}, {4: 1.0, 25: 1.0}, 25),  # nothing is, and each costs its start
        ({4: 1.3, 8: 1.1, 25: 1.0}, {4: 0.8, 8: 0.9, 25: 1.2}, 8),  # neither is far behind
        ({4: 0.98, 25: 1.0}, {4: 0.98, 25: 1.0}, 25),  # too little to be worth it
    ],
)
def test_the_bucket_is_not_far_behind_whatever_is_hidden(alone, overlapped, wanted):
    assert _least_behind(timings(alone), timings(overlapped)) == wanted * MIB


def test_the_usual_bucket_stays_if_no_other_is_better_beyond_the_noise():
    found = {4: 0.9, 25: 1.0}
    assert _least_behind(timings(found, 0.01), timings(found, 0.01)) == 4 * MIB
    assert _least_behind(timings(found, 0.2), timings(found, 0.2)) == BUCKET_BYTES
