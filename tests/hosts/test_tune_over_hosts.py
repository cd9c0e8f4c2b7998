"""Tuning over two hosts: levels are told apart, and the file that rank 0 has is used on both."""

import sys
import textwrap

from testbed import Link
from testbed.launchers import over_mpi, run_ranks

from hvdkit.tuning.file import load

TUNE = """
    import os, sys
    import hvdkit as hvd
    from hvdkit.cli import tune as command
    from hvdkit.tuner import levels, lengths, grid
    from hvdkit.cli import main

    levels.SIZES = (256, 65536, 262144)
    lengths.SEGMENTED_SIZES, grid.SIZES = (1 << 20,), (4, 65536, 1 << 20)
    assert main(["tune", "--turns", "1"]) == 0
    os.environ.update(HVDKIT_TUNING_FILE=sys.argv[1])
    hvd.init()
    assert hvd.explain(65536).ways[0].source == "measured"
    picked = set(hvd.allgather_object(hvd.explain(65536).picked))
    assert len(picked) == 1, picked
    print(f"[rank {hvd.rank()} is tuned]")
"""


def test_tune(hosts, shaped, tmp_path):
    """On links of a millisecond, which the fit must find between the hosts and not within one."""
    shaped(Link(delay=1e-3))
    script, path = tmp_path / "tune.py", tmp_path / "tuning.json"
    script.write_text(textwrap.dedent(TUNE))
    ended = run_ranks(
        hosts,
        over_mpi,
        "alpha:2,beta:1",
        [sys.executable, str(script), str(path)],
        timeout=90,
        variables={"HVDKIT_TUNING_FILE": str(path)},
    )
    assert ended.status == 0, ended.stderr
    assert ended.stdout.count("is tuned]") == 3
    (entry,) = load(path)
    assert entry.world.nodes == (2, 1)
    assert {"hierarchical", "ring"} <= entry.grid["allreduce"].keys()
    assert 0.7e-3 < entry.levels.across.alpha < 3e-3
    assert entry.levels.within.alpha < 0.7e-3
