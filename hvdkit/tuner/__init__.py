"""Measure this world: what its levels cost, and which algorithm, segment and bucket are the best.

[1] levels      alpha, beta and gamma of shared memory and of messages within a node, on one
                node's ranks, and of messages across nodes, on the first rank of each; of
                messages also what one costs beside another
[2] segments    schedules on long messages, cut in segments of several lengths
[3] grid        every algorithm at every size, on all ranks, with these segments
[4] buckets     as many bytes as a model has, in buckets of several lengths
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

from hvdkit.context import Context
from hvdkit.tuner.bench import Bench
from hvdkit.tuner.grid import measure_grid
from hvdkit.tuner.lengths import best_bucket, best_segments
from hvdkit.tuner.levels import measure_levels
from hvdkit.tuning.fit import Fit
from hvdkit.tuning.measure import TURNS
from hvdkit.tuning.record import Tuning


def tune(
    context: Context, say: Callable[[str], None], *, turns: int = TURNS
) -> tuple[Tuning, dict[str, Fit]]:
    """Return what was found, by which `context` chooses from then on.  Collective, blocking.

    Args:
        context: of the job, of two ranks or more.
        say: told what is measured next, on every rank.
        turns: of each candidate.

    Returns:
        The tuning, and how well each level was fitted.
    """
    bench = Bench(context, say, turns=turns)
    world = context.world
    levels, fits = measure_levels(bench)
    tuning = Tuning(
        world=context.describe_world(),
        measured=world.broadcast_object(time.strftime("%Y-%m-%d %H:%M"), 0),
        hosts=tuple(dict.fromkeys(world.allgather_object(os.uname().nodename))),
        levels=levels,
        margins={name: found.margin for name, found in fits.items()},
        segments=best_segments(bench),
    )
    context.adopt_tuning(tuning)
    tuning = replace(tuning, grid=measure_grid(bench))
    context.adopt_tuning(tuning)
    tuning = replace(tuning, bucket_bytes=best_bucket(bench))
    context.adopt_tuning(tuning)
    return tuning, fits
