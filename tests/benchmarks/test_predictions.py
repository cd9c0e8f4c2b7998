"""Predicted and simulated times beside measured ones."""

from dataclasses import replace

import predictions
import pytest
import report
from core.tunings import tuning
from figures import made_run
from plots import Series
from records import PREDICTION, Result, Run, plain_name

from hvdkit.schedules.machine import Level
from hvdkit.tuning.estimates import Estimates
from hvdkit.tuning.record import USUAL_LEVELS

LEVEL = Level(alpha=1e-5, beta=1e-10, gamma=0.0)


def tuned(ranks=2, library="Open MPI v5"):
    levels = replace(USUAL_LEVELS, within=LEVEL, check=(2e-6, 0.0))
    return tuning([ranks], library=library, levels=levels)


def run_as_predicted(ranks, factor=1.0):
    """Return an all-reduce that takes as long as the simulator says, times a factor."""
    estimates = Estimates(tuned(ranks), ranks)
    results = [
        Result(
            "Open MPI 5",
            ranks,
            "allreduce",
            name,
            nbytes,
            (factor * predictions.simulated_seconds(estimates, "allreduce", name, nbytes),) * 9,
            0,
        )
        for name in ("ring", "tree")
        for nbytes in (4, 4096)
    ]
    return Run("allreduce", "2026-11-21T12:00:00+0000", {}, {}, tuple(results))


@pytest.mark.parametrize("name", ["Open MPI v5.0.11", "Open MPI 5.0.11", "MPICH Version: 5.0.2"])
def test_names_of_libraries(name):
    assert plain_name(name) in ("Open MPI 5.0.11", "MPICH 5.0.2")


def test_a_ring_by_hand():
    """Two messages of half the bytes, after the check: a wait, and a tenth for each beside."""
    estimates = Estimates(tuned(2), 2)
    seconds = predictions.simulated_seconds(estimates, "allreduce", "ring", 1000)
    assert seconds == pytest.approx(2 * (1e-5 + 500e-10) + 2e-6)
    estimates = Estimates(tuned(4), 4)
    seconds = predictions.simulated_seconds(estimates, "allreduce", "ring", 1000)
    assert seconds == pytest.approx(6 * (1e-5 + 250e-10) + 1.2 * 2e-6)


@pytest.mark.parametrize(("factor", "shown"), [(1.0, "+0 %"), (2.0, "-50 %"), (0.5, "+100 %")])
def test_errors(factor, shown):
    run = run_as_predicted(3, factor)
    rows = predictions.errors_of(run.results, Estimates(tuned(3), 3))
    size = shown.strip("+-")
    assert rows == [[name, shown, shown, size] for name in ("ring", "tree")]
    (section,) = report.simulator([run], [tuned(3)])
    assert section.parts[0].tables[0].rows == rows
    assert section.parts[0].tables[0].head == ["", "4 B", "4 KiB", "median"]


def test_curves_of_what_was_tuned_alone():
    run = made_run(1)
    curves = predictions.predicted([run], [tuned()])
    assert {s.name for s in curves["allreduce", 2]} == {"shm", "ring"}
    for other in (tuned(3), tuned(library="MPICH Version: 5")):
        assert predictions.predicted([run], [other]) == {}
        assert report.simulator([run], [other]) == []
    page = report.render([run], report.sections_of([run], curves))
    assert "ring, predicted" in page


def curve(name, alpha, beta):
    sizes = [4, 1000, 100_000, 10_000_000]
    return Series(name, sizes, [alpha + n * beta for n in sizes])


def test_a_crossing_is_where_the_lines_meet():
    """1 us + n ns and 10 us + n/10 ns meet at 10,000 bytes; between sizes by a straight line."""
    few, many = curve("few steps", 1e-6, 1e-9), curve("few bytes", 10e-6, 1e-10)
    assert 7_000 < predictions.crossing(few, many) < 14_000
    assert predictions.crossing(many, few) is None
    assert predictions.crossing(few, few) is None, "neither is faster"
    assert predictions.crossing(few, curve("slower", 2e-6, 2e-9)) is None


def test_crossings_measured_and_predicted():
    def results(name, alpha, beta, factor):
        return [
            Result(
                "Open MPI 5",
                3,
                "allreduce, 3 x 1 ranks",
                name,
                n,
                (factor * (alpha + n * beta),) * 9,
                0,
                notes={PREDICTION: alpha + n * beta},
            )
            for n in (4, 1000, 100_000, 10_000_000)
        ]

    some = results("gathered", 1e-6, 1e-9, 1.0) + results("ring", 10e-6, 1e-10, 1.0)
    ((short, long, measured, predicted, times),) = predictions.crossings_of(some)
    assert (short, long, times) == ("gathered", "ring", "1")
    assert measured == predicted
    some = results("gathered", 1e-6, 1e-9, 1.0) + results("ring", 10e-6, 1e-10, 100.0)
    ((_, _, measured, predicted, times),) = predictions.crossings_of(some)
    assert (measured, times) == ("never", "")
    assert predictions.choices_of(some) == [
        ["4 B", "gathered", "gathered", "1.00"],
        ["1000 B", "gathered", "gathered", "1.00"],
        ["97.66 KiB", "gathered", "ring", "19.80"],
        ["9.537 MiB", "gathered", "ring", "10.10"],
    ]
    run = Run("hosts", "2026-11-21T12:00:00+0000", {}, {}, tuple(some))
    curves = predictions.predicted([run], [])
    assert {s.name for s in curves["allreduce, 3 x 1 ranks", 3]} == {"gathered", "ring"}
    page = report.render([run], report.sections_of([run], curves))
    assert "from, predicted" in page
    assert predicted in page
    assert "fastest, predicted" in page
