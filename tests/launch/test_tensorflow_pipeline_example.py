"""The example of a pipeline of Keras layers: it runs, and is right."""

import re

import pytest

from .helpers import under_mpirun


def test_losses_are_those_of_one_rank():
    for needed in ("tensorflow", "keras", "sklearn", "tqdm"):
        pytest.importorskip(needed)
    found = []
    for ranks, *axes in ((2, "--pipeline", "2", "--schedule", "gpipe"), (1, "--pipeline", "1")):
        outcome = under_mpirun(
            ranks,
            "examples/tensorflow_pipeline.py",
            *(*axes, "--steps", "8"),
            CUDA_VISIBLE_DEVICES="",
        )
        assert outcome.status == 0, outcome.stderr
        *_, last = outcome.stdout.splitlines()
        ending = r"1 replica of each of 10 variables: identical, sha256 [0-9a-f]{16}$"
        assert re.search(ending, last), outcome.stdout
        losses = re.findall(r"^step +\d+  loss (\d+\.\d{4})$", outcome.stdout, re.MULTILINE)
        found.append([float(loss) for loss in losses])
        assert "8/8" in outcome.stderr
    assert len(found[0]) == 8
    assert found[0] == pytest.approx(found[1], abs=2e-4)
    assert found[0][-1] < found[0][0]
