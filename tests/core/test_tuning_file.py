"""The tuning file: what is written is read, and what is damaged is refused with the place."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from core.tunings import KIB, MIB, cells, tuning
from hvdkit.errors import ConfigError
from hvdkit.schedules.machine import Level
from hvdkit.tuning.file import default_path, load, save, text_of

FULL = tuning(
    allreduce={"ring": cells({4: 1e-5, MIB: 1e-3}, 0.05), "mpi": cells({4: 2e-6})},
    margins={"within": Level(1e-6, 1e-11, 1e-12)},
    segments=((MIB, 256 * KIB), (4 * MIB, MIB)),
    bucket_bytes=8 * MIB,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "tuning.json"


def test_what_is_written_is_read(path):
    save(path, FULL, [])
    assert load(path) == (FULL,)


def test_the_file_is_readable_text(path):
    save(path, FULL, [])
    lines = path.read_text().splitlines()
    assert lines[1] == '  "format": "hvdkit tuning",'
    assert '          "Some CPU, 2 cores"' in lines
    assert max(map(len, lines)) < 100


def test_an_entry_takes_the_place_of_the_one_of_its_world_and_of_no_other(path):
    other, again = tuning((2,)), replace(FULL, bucket_bytes=None)
    save(path, FULL, [])
    save(path, other, load(path))
    save(path, again, load(path))
    assert load(path) == (other, again)
    assert [file.name for file in path.parent.iterdir()] == ["tuning.json"]


def test_the_default_place():
    assert default_path({"XDG_CONFIG_HOME": "/x", "HOME": "/h"}) == Path("/x/hvdkit/tuning.json")
    assert default_path({"HOME": "/h"}) == Path("/h/.config/hvdkit/tuning.json")


def damaged(change):
    data = json.loads(text_of([FULL]))
    change(data, data["entries"][0])
    return json.dumps(data)


DAMAGES = {
    "no JSON": (lambda: text_of([FULL])[:-200], "is damaged: no JSON"),
    "empty": (lambda: "", "is damaged: no JSON"),
    "another file": (lambda: '{"scripts": {}}', 'no tuning file of hvdkit: it lacks "format"'),
    "a list": (lambda: "[1, 2]", "is no tuning file of hvdkit"),
    "newer": (
        lambda: damaged(lambda data, _: data.update(version=3)),
        "has version 3, and this hvdkit reads 2",
    ),
    "older": (
        lambda: damaged(lambda data, _: data.update(version=1)),
        "has version 1, and this hvdkit reads 2",
    ),
    "no entries": (lambda: damaged(lambda data, _: data.pop("entries")), "entries is missing"),
    "entries no list": (
        lambda: damaged(lambda data, _: data.update(entries={})),
        "entries is {}, not a list",
    ),
    "entry no object": (
        lambda: damaged(lambda data, _: data.update(entries=[3])),
        r"entries\[0\].levels is missing",
    ),
    "no world": (
        lambda: damaged(lambda _, entry: entry.pop("world")),
        r"entries\[0\].world is missing",
    ),
    "nodes": (
        lambda: damaged(lambda _, entry: entry["world"].update(nodes=[0])),
        r"entries\[0\].world.nodes\[0\] is 0, not a whole number above 0",
    ),
    "shared memory": (
        lambda: damaged(lambda _, entry: entry["world"].update(shared_memory="yes")),
        r"entries\[0\].world.shared_memory is 'yes', not true or false",
    ),
    "alpha": (
        lambda: damaged(lambda _, entry: entry["levels"]["within"].update(alpha="fast")),
        r"entries\[0\].levels.within.alpha is 'fast', not a number of 0 or more",
    ),
    "beta missing": (
        lambda: damaged(lambda _, entry: entry["levels"]["across"].pop("beta")),
        r"entries\[0\].levels.across.beta is None",
    ),
    "at_once missing": (
        lambda: damaged(lambda _, entry: entry["levels"]["across"].pop("at_once")),
        r"entries\[0\].levels.across.at_once is None",
    ),
    "gamma": (
        lambda: damaged(lambda _, entry: entry["levels"]["memory"].update(gamma=-1.0)),
        r"entries\[0\].levels.memory.gamma is -1.0",
    ),
    "not finite": (
        lambda: damaged(lambda _, entry: entry["levels"]["memory"].update(gamma=float("nan"))),
        r"entries\[0\].levels.memory.gamma is nan",
    ),
    "segments": (
        lambda: damaged(lambda _, entry: entry.update(segments=[[4]])),
        r"entries\[0\].segments has \[4\], not a pair",
    ),
    "segment of 0": (
        lambda: damaged(lambda _, entry: entry.update(segments=[[4, 0]])),
        r"entries\[0\].segments is 0, not a whole number above 0",
    ),
    "bucket": (
        lambda: damaged(lambda _, entry: entry.update(bucket_bytes="25MiB")),
        r"entries\[0\].bucket_bytes is '25MiB', not a whole number",
    ),
    "size": (
        lambda: damaged(lambda _, e: e["seconds"]["allreduce"].update(ring={"4KiB": [1, 0]})),
        "has times for '4KiB', which is no number of bytes",
    ),
    "no times": (
        lambda: damaged(lambda _, entry: entry["seconds"]["allreduce"].update(ring={})),
        r"seconds.allreduce.ring is {}, not seconds by bytes",
    ),
    "0 seconds": (
        lambda: damaged(lambda _, e: e["seconds"]["allreduce"].update(ring={"4": [0, 0]})),
        r"seconds.allreduce.ring.4 is 0 seconds",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_right_is_refused(tmp_path, damage):
    text, message = DAMAGES[damage]
    path = tmp_path / "tuning.json"
    path.write_text(text())
    with pytest.raises(ConfigError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "measure anew: mpirun -n N python -m hvdkit tune" in str(error.value)


def test_a_file_of_no_text_is_refused(tmp_path):
    path = tmp_path / "tuning.json"
    path.write_bytes(b"\x80\x03PNG\xff")
    with pytest.raises(ConfigError, match="it is no text"):
        load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load(tmp_path / "tuning.json")


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        save(tmp_path / "file" / "tuning.json", FULL, [])
