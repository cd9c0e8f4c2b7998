"""Which tuning a job uses: what fits its world, alike on all ranks, and word of what does not."""

import warnings
from dataclasses import replace

import pytest

from core.tunings import WORLD, tuning
from core.worlds import on_ranks
from hvdkit.config import NO_TUNING
from hvdkit.errors import ConfigError
from hvdkit.tuning.file import save
from hvdkit.tuning.finding import agree_on_tuning, this_machine

TUNED = tuning(bucket_bytes=12345)


def agreed(named, *, world=WORLD, home="/nowhere", size=2):
    """What each rank gets, or the error that it raises, and what was warned of."""

    def body(transport):
        try:
            environ = {"XDG_CONFIG_HOME": str(home)}
            return agree_on_tuning(transport, named, lambda: world, environ)
        except ConfigError as exc:
            return str(exc)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = on_ranks(size, body)
    return results, [str(warning.message) for warning in caught]


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "mine.json", TUNED, [tuning((3,))])
    return tmp_path / "mine.json"


def test_all_ranks_get_what_rank_0_reads(path):
    assert agreed(path, size=3) == ([TUNED] * 3, [])


def test_the_default_place_is_read(tmp_path):
    save(tmp_path / "hvdkit" / "tuning.json", TUNED, [])
    assert agreed(None, home=tmp_path) == ([TUNED] * 2, [])


def test_nothing_in_the_default_place_is_nothing(tmp_path):
    assert agreed(None, home=tmp_path) == ([None] * 2, [])


def test_a_file_that_is_named_and_missing_is_an_error_on_every_rank(tmp_path):
    results, warned = agreed(tmp_path / "none.json")
    assert results[0] == results[1] and "none.json cannot be read: No such file" in results[0]
    assert not warned


def test_a_damaged_file_is_an_error_on_every_rank_wherever_it_is(tmp_path):
    default = tmp_path / "hvdkit" / "tuning.json"
    default.parent.mkdir()
    default.write_text("{")
    for named in (None, default):
        results, _ = agreed(named, home=tmp_path)
        assert results[0] == results[1] and "is damaged: no JSON" in results[0]


def test_off_reads_nothing(tmp_path):
    default = tmp_path / "hvdkit" / "tuning.json"
    default.parent.mkdir()
    default.write_text("{")
    assert agreed(NO_TUNING, home=tmp_path) == ([None] * 2, [])


def test_one_rank_has_nothing_to_choose(tmp_path):
    assert agreed(tmp_path / "none.json", size=1) == ([None], [])


STALE = {
    "machine": (
        {"machines": ("Other CPU, 8 cores",)},
        "the machine: Some CPU, 2 cores; here: Other CPU, 8 cores",
    ),
    "ranks": ({"nodes": (8,)}, "the number of ranks: 3; here: 8"),
    "layout": ({"nodes": (2, 2)}, "the ranks of the nodes: 4 on 1 node; here: 2, 2 on 2 nodes"),
    "version": ({"hvdkit": "0.2.0"}, "the version of hvdkit: 0.1.0; here: 0.2.0"),
    "transport": ({"library": ""}, "the messages: over Open MPI 5.0.11; here: over TCP"),
    "kernels": ({"kernels": "avx2"}, "the kernels: numpy; here: avx2"),
    "memory": ({"shared_memory": False}, "shared memory: yes; here: no"),
}


@pytest.mark.parametrize("how", STALE)
def test_a_stale_file_is_one_warning_that_says_what_differs(path, how):
    change, message = STALE[how]
    world = replace(WORLD, **change)
    results, warned = agreed(path, world=world)
    assert results == [None, None]
    assert len(warned) == 1 and str(path) in warned[0]
    assert message in warned[0].splitlines()[1:][-1] or message in warned[0]
    command = f"HVDKIT_TUNING_FILE={path} mpirun -n {sum(world.nodes)} python -m hvdkit tune"
    assert f"To measure this one: {command}" in warned[0]


def test_only_what_differs_from_the_nearest_entry_is_said(path):
    _, warned = agreed(path, world=replace(WORLD, hvdkit="0.2.0"))
    assert warned[0].splitlines()[1:] == ["  the version of hvdkit: 0.1.0; here: 0.2.0"]


def test_this_machine_is_known_by_its_processor_and_cores():
    assert this_machine() == this_machine()
    assert this_machine().endswith("cores")
