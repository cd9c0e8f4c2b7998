"""What `hvdkit tune` makes of the times that it measures, on a machine that is a model."""

import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from hvdkit.schedules.machine import Level, Machine
from hvdkit.schedules.timing import gathering_alphas, in_flights, predict
from hvdkit.tuner.levels import measure_levels
from hvdkit.tuning.measure import Timing

from .tunings import KIB

WITHIN = Level(15e-6, 1e-10, 5e-11, at_once=0.75)
ACROSS = Level(60e-6, 8e-9, 5e-11, at_once=0.25)
CHECK = {"within": 10e-6, "across": 40e-6}
LEVELS = {"within": WITHIN, "across": ACROSS}


class ModelBench:
    """A bench whose ranks take as long as the model says; fulfils what `measure_levels` needs."""

    def __init__(self, *nodes):
        estimates = SimpleNamespace(usual_segment=512 * KIB)
        self._nodes = nodes
        outside = SimpleNamespace(included=lambda: False)
        sets = SimpleNamespace(add=lambda _: outside, remove=lambda _: None)
        self.context = SimpleNamespace(
            nodes=nodes, kernels=SimpleNamespace(reduce=print), process_sets=sets
        )
        self.world = SimpleNamespace(
            size=sum(map(len, nodes)),
            group=SimpleNamespace(estimates=estimates, arena=None),
            allgather_object=lambda value: [value],
        )

    def messages(self, _ranks, _segment_bytes):
        return nullcontext()

    def measure(self, label, calls):
        return {name: Timing(self._seconds(label, name), 0.0) for name in calls}

    def _seconds(self, label, name):
        if reducing := re.fullmatch(r"reducing (\d+) KiB", label):
            return int(reducing[1]) * KIB * WITHIN.gamma
        where = "within" if "within" in label else "across"
        level = LEVELS[where]
        size = max(map(len, self._nodes)) if where == "within" else len(self._nodes)
        if label.startswith("check"):
            return CHECK[where] * gathering_alphas(size, level.at_once)
        machine = Machine(level, level)
        if label.endswith("at once"):
            seen = in_flights(machine, size) if name == "all_pairs" else machine
            return predict("allreduce", name, 256, size, machine=seen)
        nbytes = int(label.split()[-2].replace(",", ""))
        return predict(*name.split(), nbytes, size, machine=machine)


def figures(level):
    return np.array([level.alpha, level.beta, level.gamma, level.at_once])


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_each_level_is_found_with_what_its_messages_cost_beside_another(nodes):
    """Of two nodes no message is beside another: what was found within a node stays there."""
    bench = ModelBench(*[(4 * node, 4 * node + 1, 4 * node + 2) for node in range(nodes)])
    levels, fits = measure_levels(bench)
    assert figures(levels.within) == pytest.approx(figures(WITHIN), rel=1e-3)
    assert levels.check[0] == pytest.approx(CHECK["within"])
    if nodes > 1:
        across = ACROSS if nodes == 3 else replace(ACROSS, at_once=0.1)
        assert figures(levels.across) == pytest.approx(figures(across), rel=1e-3)
        assert levels.check[1] == pytest.approx(CHECK["across"])
    assert set(fits) == {"within", "across"} if nodes > 1 else {"within"}
