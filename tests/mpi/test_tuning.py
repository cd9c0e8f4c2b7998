"""A tuning file is agreed by all ranks, and auto, segments and buckets go by it."""

import json
import os
import re
import warnings
from contextlib import contextmanager

import numpy as np
import pytest

import hvdkit as hvd
from hvdkit.api import context
from hvdkit.cli import main
from hvdkit.tuning.file import load, save
from hvdkit.tuning.record import Cell, Tuning

pytestmark = pytest.mark.skipif(hvd.size() == 1, reason="one rank has nothing to choose")

KIB = 1024


@contextmanager
def initialised_with(**variables):
    """Initialise hvdkit anew with these variables; with the usual ones afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    hvd.shutdown()
    os.environ.update(variables)
    try:
        yield hvd.init()
    finally:
        hvd.shutdown()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        hvd.init()


@pytest.fixture
def path(tmp_path):
    """A path that is the same on all ranks, who are on one host here."""
    return type(tmp_path)(hvd.broadcast_object(str(tmp_path / "tuning.json")))


def tuned(path, **parts):
    """Let rank 0 write a tuning of this world.  Collective."""
    world = context().describe_world()
    if hvd.rank() == 0:
        save(path, Tuning(world=world, measured="today", **parts), [])
    hvd.barrier()


def algorithms():
    return {name for ways in hvd.stats()["allreduce"].values() for name in ways}


def test_auto_goes_by_the_file_on_every_rank(path):
    times = {"tree": 1e-6, "double_tree": 1e-3}
    grid = {name: (Cell(4, seconds, 0.0),) for name, seconds in times.items()}
    tuned(path, grid={"allreduce": grid}, bucket_bytes=3 * KIB, segments=((KIB, 8 * KIB),))
    with initialised_with(HVDKIT_TUNING_FILE=str(path)):
        x = np.full(1000, hvd.rank() + 1.0, np.float32)
        assert (hvd.allreduce(x, op=hvd.Sum) == hvd.size() * (hvd.size() + 1) / 2).all()
        assert "tree" in algorithms()
        assert hvd.explain(4000).picked == "tree"
        assert hvd.explain(4000).segment_bytes == 8 * KIB
        assert context().bucket_bytes == 3 * KIB
        text = str(hvd.explain(4))
        assert re.search(r"^ \* tree +1\.0 us  measured, \+-0 %$", text, re.MULTILINE)
        assert "Measured today." in text


def test_a_process_set_goes_by_the_fitted_figures(path):
    tuned(path, grid={"allreduce": {"tree": (Cell(4, 1e-9, 0.0),)}})
    with initialised_with(HVDKIT_TUNING_FILE=str(path)):
        some = hvd.add_process_set([0])
        if some.included():
            assert hvd.explain(4, process_set=some).picked != "tree"
            assert "; these ranks were not." in str(hvd.explain(4, process_set=some))
        hvd.barrier()


def test_what_the_user_sets_goes_before_the_file(path):
    tuned(path, bucket_bytes=3 * KIB, segments=((KIB, 8 * KIB),))
    with initialised_with(
        HVDKIT_TUNING_FILE=str(path), HVDKIT_SEGMENT="16KiB", HVDKIT_FUSION_THRESHOLD="5KiB"
    ):
        assert hvd.explain(4000).segment_bytes == 16 * KIB
        assert context().bucket_bytes == 5 * KIB


def test_a_stale_file_is_one_warning_and_not_used(path):
    tuned(path, bucket_bytes=3 * KIB)
    if hvd.rank() == 0:
        data = json.loads(path.read_text())
        data["entries"][0]["world"]["hvdkit"] = "0.0.1"
        path.write_text(json.dumps(data))
    hvd.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with initialised_with(HVDKIT_TUNING_FILE=str(path)):
            assert context().tuning is None
            assert context().bucket_bytes == 25 * 1024 * KIB
    said = [str(w.message) for w in caught if "tuning file" in str(w.message)]
    if hvd.rank() == 0:
        assert len(said) == 1
        assert f"the version of hvdkit: 0.0.1; here: {hvd.__version__}" in said[0]
    else:
        assert not said


def test_a_damaged_file_is_an_error_on_every_rank(path):
    if hvd.rank() == 0:
        path.write_text("{")
    hvd.barrier()
    hvd.shutdown()
    os.environ["HVDKIT_TUNING_FILE"] = str(path)
    try:
        with pytest.raises(hvd.ConfigError, match="is damaged: no JSON"):
            hvd.init()
    finally:
        os.environ["HVDKIT_TUNING_FILE"] = "off"
        hvd.init()


def test_of_several_files_rank_0s_is_read(path):
    """A launcher may hand a variable to some hosts only."""
    hvd.shutdown()
    mine = os.environ["HVDKIT_TUNING_FILE"]
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
    os.environ["HVDKIT_TUNING_FILE"] = str(path.with_name("missing.json")) if rank else "off"
    try:
        hvd.init()
        assert "This machine was not measured" in str(hvd.explain(4))
        hvd.shutdown()
    finally:
        os.environ["HVDKIT_TUNING_FILE"] = mine
        hvd.init()


def test_without_a_tuning_explain_says_so():
    text = str(hvd.explain(4))
    assert "This machine was not measured" in text
    assert f"mpirun -n {hvd.size()} python -m hvdkit tune" in text
    with pytest.raises(hvd.ArgumentError, match="-1 is no number of bytes"):
        hvd.explain(-1)
    with pytest.raises(hvd.ArgumentError, match="unknown collective 'reduce'"):
        hvd.explain(4, "reduce")


def test_tune_writes_a_file_that_fits(path, capfd):
    """The whole of it, at a turn each: the figures are noise."""
    if hvd.size() != 2:
        pytest.skip("takes long where ranks share cores")
    hvd.shutdown()
    try:
        assert main(["tune", "--turns", "1", "--out", str(path)]) == 0
    finally:
        os.environ["HVDKIT_TUNING_FILE"] = "off"
        hvd.init()
    hvd.barrier()
    (entry,) = load(path)
    assert entry.world == context().describe_world()
    assert "ring" in entry.grid["allreduce"]
    assert entry.levels.within.alpha > 0
    if hvd.rank() == 0:
        told = capfd.readouterr()
        assert f"wrote {path}" in told.out
        assert "measuring allreduce, 4 bytes" in told.err
