"""The page has what it should, and needs nothing else."""

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from figures import SIZES, made_run
from plots import PREDICTED, Series
from records import Result, save
from report import Part, Section, compared, main, render, sections_of
from tables import human_size


@pytest.fixture(scope="module")
def page():
    run = made_run(1)
    first, *rest = run.results
    run = replace(run, results=(replace(first, wrong=7), *rest))
    steps = [
        Result("Open MPI 5", 2, "step of a CNN", name, 10**7, (s, 1.1 * s, 1.2 * s), 0)
        for name, s in (("hvdkit", 1e-2), ("alone", 9e-3))
    ]
    buckets = [
        Result("Open MPI 5", 2, "gradients", f"b{n}", 10**7, (1e-2,), 0, notes={"bucket bytes": n})
        for n in (0, 2**20, 2**22)
    ]
    runs = [
        run,
        replace(run, benchmark="torch", results=tuple(steps)),
        replace(run, benchmark="bucketing", results=tuple(buckets)),
    ]
    return render(runs, sections_of(runs))


class Loads(HTMLParser):
    """Collects whatever a browser would load for a page, and its elements."""

    def __init__(self):
        super().__init__()
        self.loaded, self.tags, self.ids, self.used = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src", "srcset", "action", "data", "poster"):
                (self.used if value.startswith("#") else self.loaded).append(value)


def test_the_page_loads_nothing(page):
    found = Loads()
    found.feed(page)
    assert found.loaded == []
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(found.tags)
    assert not re.search(r"https?:|@import", page)
    assert all(reference.startswith("#") for reference in re.findall(r"url\((.*?)\)", page))


def test_what_plots_refer_to_is_there_once(page):
    found = Loads()
    found.feed(page)
    assert [name for name, times in Counter(found.ids).items() if times > 1] == []
    assert {reference[1:] for reference in found.used} <= set(found.ids)
    assert set(re.findall(r"url\(#(.*?)\)", page)) <= set(found.ids)


def test_the_page_has_machine_versions_date_plots_and_ratios(page):
    for text in ("made up", "0.1.0", "Open MPI 5", "2026-11-21T12:00:00+0000"):
        assert text in page
    assert page.count("<svg") == 3
    for title in ("All-reduce", "PyTorch", "Buckets"):
        assert f">{title}</h2>" in page
    for head in ("x MPI library", "x gloo", "% of memory roof", "busbw, GB/s", "95 % interval"):
        assert f"<th>{head}</th>" in page
    for nbytes in SIZES:
        assert f"<td>{human_size(nbytes)}</td>" in page
    assert '<td class="bad">7 wrong</td>' in page


def test_the_page_is_readable_on_light_and_on_dark(page):
    assert "prefers-color-scheme: dark" in page
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert all("currentColor" in plot and "#010203" not in plot for plot in plots)
    assert not any(re.search(r"fill: ?(#000000|#ffffff|black|white)", plot) for plot in plots)
    for plot in plots:
        assert all("fill: currentColor" in text for text in re.findall(r"<text [^>]*>", plot))


def test_text_is_escaped():
    run = replace(made_run(1), machine={"processor": "<script>alert(1)</script>"})
    assert "<script>" not in render([run], sections_of([run]))


def test_predicted_curves_and_further_sections_are_drawn():
    run = made_run(1)
    curve = Series("ring", SIZES, [1e-5] * len(SIZES), kind=PREDICTED)
    sections = sections_of([run], {("allreduce", 2): [curve]})
    sections.append(Section("Simulator", [Part(text="off by 3 %")], "Simulated against measured."))
    page = render([run], sections)
    assert "ring, predicted" in page
    assert "off by 3 %" in page
    assert ">Simulator</h2>" in page


def test_changes_are_marked():
    page = render([made_run(1)], [compared([made_run(1)], [made_run(2, slower={"shm": 1.6})])])
    assert page.count('<td class="bad">regression</td>') == len(SIZES)
    assert "10 figures are in both reports; 5 differ beyond the noise." in page


def test_the_script_writes_the_page_and_the_plots(tmp_path, monkeypatch, capsys):
    save(made_run(1), tmp_path / "allreduce.json")
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    assert main() == 0
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    plot = tmp_path / "allreduce-allreduce-2-ranks-open-mpi-5.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path), "--images", str(tmp_path / "i")])
    assert main() == 1
    assert "no figures for: allreduce on 4 ranks" in capsys.readouterr().out
    assert 0 < (tmp_path / "i" / "allreduce-2-ranks.png").stat().st_size < 100_000
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / "none")])
    assert main() == 2
