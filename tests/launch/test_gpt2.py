"""examples/gpt2.py: the same losses on any mesh, and from a checkpoint on another mesh."""

from __future__ import annotations

import importlib.util
import re

import pytest

from .helpers import python, under_mpirun

TINY = (
    "--layers 2 --width 32 --heads 2 --context 32 --batch 8 --warmup-steps 4 --decay-steps 8 "
    "--validate-every 5 --validation-batches 1 --microbatches 3 --sample 8"
)

#: Runs the example once for each argument, in one job: imports take longest.
ONE_AFTER_THE_OTHER = """
import sys
sys.path.insert(0, "examples")
import gpt2
for arguments in sys.argv[1:]:
    assert gpt2.main(gpt2.parser.parse_args(arguments.split())) == 0
    gpt2.say("THE END")
"""

#: Steps of the runs that stop early.
FEW = 5

#: float32 rounding, in losses of 5 and of four decimals.
ROUNDING = 2e-4


@pytest.fixture(autouse=True, scope="module")
def _modules():
    for needed in ("torch", "safetensors", "tqdm"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")


def texts_of(ranks, *runs):
    """Return what each run printed."""
    script = ("-c", ONE_AFTER_THE_OTHER, *(f"{TINY} {run}" for run in runs))
    outcome = under_mpirun(ranks, *script, timeout=240)
    assert outcome.status == 0, outcome.stdout + outcome.stderr
    return outcome.stdout.split("THE END\n")[:-1]


def losses(text):
    """Return the loss of each step."""
    found = re.findall(r"^step (\d+)  loss (\d\.\d{4})  lr 0\.\d{5}  norm \d+\.\d\d$", text, re.M)
    return {int(step): float(loss) for step, loss in found}


@pytest.fixture(scope="module")
def alone():
    """What one process prints, without mpirun."""
    outcome = python("examples/gpt2.py", *TINY.split(), timeout=120)
    assert outcome.status == 0, outcome.stdout + outcome.stderr
    assert "tok/s" in outcome.stderr
    return outcome.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def on_two(folder):
    few = f"--steps {FEW}"
    return texts_of(2, f"--data 2 --pipeline 1 {few} --checkpoint {folder}", f"--pipeline 2 {few}")


@pytest.fixture(scope="module")
def on_four(folder, on_two):
    del on_two  # it has written the checkpoint
    few = f"--steps {FEW}"
    return texts_of(
        4,
        f"--data 4 {few}",
        f"--data 2 {few}",
        f"--data 1 {few}",
        f"--data 2 {few} --schedule interleaved --chunks 2 --recompute",
        f"--pipeline 4 {few} --schedule zb-h1",
        f"--pipeline 2 --data 2 --resume {folder}",
    )


def test_one_process(alone):
    learnt = losses(alone)
    assert list(learnt) == list(range(1, 9))
    assert learnt[8] < learnt[1] - 0.2
    perplexity = re.search(
        r"^validation perplexity ([\d.]+); the best, after step 8: ", alone, re.M
    )
    assert 100 < float(perplexity[1]) < 256, "a guess among all bytes has 256"
    assert "\ndef " in alone
    assert re.search(r"^0 +0 +0-3 ", alone, re.M), "the table of stages"
    assert alone.endswith(" 28 with their copies, which hold identical bits\n")


def test_the_losses_are_the_same_on_any_mesh(alone, on_two, on_four):
    expected = {step: loss for step, loss in losses(alone).items() if step <= FEW}
    for text in [*on_two, *on_four[:-1]]:
        mesh = re.search(r"^Mesh.*", text, re.M)[0]
        assert losses(text) == pytest.approx(expected, rel=0, abs=ROUNDING), mesh


def test_a_checkpoint_goes_on_with_the_same_losses_on_another_mesh(alone, on_four):
    text = on_four[-1]
    assert text.startswith(f"resumed after step {FEW}, validation loss ")
    expected = {step: loss for step, loss in losses(alone).items() if step > FEW}
    assert losses(text) == pytest.approx(expected, rel=0, abs=ROUNDING)


def test_copies_hold_the_same_bits(on_two, on_four):
    counts = [56, 29, 4 * 28, 2 * 29, 29, 2 * 29, 29, 2 * 29]
    for text, count in zip([*on_two, *on_four], counts, strict=True):
        assert f", {count} with their copies, which hold identical bits\n" in text


def test_a_mesh_that_does_not_fit_is_refused_in_one_sentence():
    outcome = under_mpirun(2, "examples/gpt2.py", *TINY.split(), "--data", "1", "--pipeline", "3")
    assert outcome.status != 0
    sentence = "Mesh(data=1, pipeline=3) is for 3 ranks, and there are 2: start as many"
    assert outcome.stderr.count(sentence) == 1
    assert "Traceback" not in outcome.stderr
    assert not outcome.stdout
