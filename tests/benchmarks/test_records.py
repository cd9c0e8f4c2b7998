"""Bus bandwidth as nccl-tests defines it, and what is written and read again."""

import csv
from dataclasses import replace

import pytest
from figures import made_run
from records import ReportError, Result, load, load_results, save


@pytest.mark.parametrize(
    ("what", "factor"),
    [
        ("allreduce", 2 * 3 / 4),
        ("allreduce, 2 x 2 ranks, 1 Gbit/s, over MPI", 2 * 3 / 4),
        ("allgather", 3 / 4),
        ("reducescatter, float16", 3 / 4),
        ("alltoall", 3 / 4),
        ("gather", 3 / 4),
        ("scatter", 3 / 4),
        ("broadcast", 1.0),
        ("reduce", 1.0),
        ("sendrecv", 1.0),
    ],
)
def test_busbw_on_four_ranks_is_that_of_nccl_tests(what, factor):
    result = Result("MPI", 4, what, "x", 8_000_000, (3e-3, 1e-3, 2e-3), 0)
    assert result.seconds == 2e-3
    assert result.algbw == pytest.approx(4e9)
    assert result.busbw == pytest.approx(4e9 * factor)


def test_one_rank_sends_nothing():
    assert Result("MPI", 1, "allreduce", "x", 100, (1.0,), 0).busbw == 0.0


def test_a_step_has_no_busbw():
    assert Result("MPI", 4, "step of a CNN", "x", 100, (1.0,), 0).busbw is None


def test_what_is_saved_is_read_again(tmp_path):
    run = made_run(1)
    run = replace(run, results=(*run.results, replace(run.results[0], what="b", notes={"n": 2.5})))
    save(run, tmp_path / "a.json")
    (again,) = load(tmp_path)
    assert (again.benchmark, again.date, again.machine) == (run.benchmark, run.date, run.machine)
    assert [r.key for r in again.results] == [r.key for r in run.results]
    assert again.results[-1].notes == {"n": 2.5}
    for read, written in zip(again.results, run.results, strict=True):
        assert read.seconds == pytest.approx(written.seconds, rel=1e-4)
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [r.name for r in run.results]
    assert float(rows[0]["seconds"]) == pytest.approx(run.results[0].seconds)
    assert rows[-1]["busbw"] == ""


def test_a_later_run_takes_the_place_of_the_same_measurement_alone(tmp_path):
    path = tmp_path / "a.json"
    on_two, again = made_run(1), made_run(2)
    on_four = replace(on_two, results=tuple(replace(r, ranks=4) for r in on_two.results))
    for run in (on_two, on_four, again):
        save(run, path)
    assert [{r.ranks for r in run.results} for run in load(path)] == [{4}, {2}]
    seconds = [r.seconds for r in load_results(path) if r.ranks == 2]
    assert seconds == pytest.approx([r.seconds for r in again.results], rel=1e-4)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not what a benchmark saves"),
        ("[]", "not what a benchmark saves"),
        ('{"format": "other", "runs": []}', "format 'other'"),
        ('{"format": "hvdkit benchmark 1", "runs": [{"results": [{"samples": []}]}]}', "TypeError"),
    ],
)
def test_something_else_is_refused(tmp_path, content, says):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ReportError, match=says):
        load(path)


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(ReportError, match="cannot read"):
        load(tmp_path / "none.json")
    with pytest.raises(ReportError, match="no figures"):
        load(tmp_path)
