"""Pipelines whose ranks end, fail or do not come: nobody waits for ever."""

import os
import re
import signal
import textwrap

import pytest
from launching import end_group, run, start

from .helpers import is_running, wait_for

pytest.importorskip("torch")

SECONDS = 60
either = pytest.mark.parametrize("shm", ["1", "0"], ids=["shared", "messages"])

MODEL = """
    import os, sys, time
    from pathlib import Path
    import torch
    import hvdkit.torch as hvd
    from hvdkit import Mesh
    from hvdkit.torch.pipeline import PipelineModule

    torch.set_num_threads(1)
    hvd.init()
    rank = hvd.rank()

    def say(*words):
        sys.stdout.write(f"[{' '.join(map(str, words))}]\\n")
        sys.stdout.flush()

    class Layer(torch.nn.Linear):
        def forward(self, x):
            if before is not None:
                before()
            return super().forward(x)

    before = None

    def pipeline(**how):
        torch.manual_seed(0)
        layers = [Layer(300, 300) for _ in range(4)]
        return PipelineModule(layers, torch.nn.functional.mse_loss, **how)

    x = torch.randn(16, 300)
"""


def source(script):
    return textwrap.dedent(MODEL) + textwrap.dedent(script)


@either
def test_kill_9_of_a_rank_that_the_others_wait_for(tmp_path, shm):
    script = """
        model = pipeline()
        model(x, x)
        Path(os.environ["NOTES"], f"rank{rank}").write_text(str(os.getpid()))
        if rank == 1:
            time.sleep(600)
        while True:
            model(x, x)
    """
    job = start(source(script), 3, environment={"NOTES": str(tmp_path), "HVDKIT_SHM": shm})
    try:
        notes = [tmp_path / f"rank{rank}" for rank in range(3)]
        wait_for(
            lambda: (
                all(note.exists() and note.read_text() for note in notes) or job.poll() is not None
            ),
            SECONDS,
            "the ranks start",
        )
        assert job.poll() is None, job.stderr.read()
        pids = [int(note.read_text()) for note in notes]
        os.kill(pids[1], signal.SIGKILL)
        job.communicate(timeout=SECONDS)
        assert job.returncode != 0
        wait_for(lambda: not any(map(is_running, pids)), SECONDS, "the ranks end")
    finally:
        end_group(job)


@either
def test_an_error_in_a_layer_ends_the_job(shm):
    script = """
        def before():
            if rank == 1:
                raise ZeroDivisionError("a layer of rank 1")

        pipeline()(x, x)
        say("went on")
    """
    outcome = run(source(script), 3, timeout=SECONDS, environment={"HVDKIT_SHM": shm})
    assert outcome.status != 0
    assert "went on" not in outcome.stdout
    assert "ZeroDivisionError: a layer of rank 1" in outcome.stderr


@either
def test_a_rank_that_does_not_come(shm):
    """Who waits for it, is told so, by the ranks' numbers in the whole job."""
    script = """
        model = pipeline(mesh=Mesh(data=2, pipeline=2))
        model(x, x)
        hvd.barrier()

        def before():
            if rank == 2:
                time.sleep(5)

        try:
            model(x, x)
        except hvd.StallError as exc:
            say(rank, str(exc).splitlines()[0])
            os._exit(0)
        say(rank, "went on")
        time.sleep(5)
    """
    limits = {
        "HVDKIT_SHM": shm,
        "HVDKIT_STALL_SHUTDOWN_TIME_SECONDS": "2",
        "HVDKIT_STALL_CHECK_TIME_SECONDS": "1",
    }
    outcome = run(source(script), 4, timeout=SECONDS, environment=limits)
    said = re.findall(r"\[(\d) (.*?)\]\n", outcome.stdout)
    (text,) = (text for rank, text in said if rank == "3")
    assert text.startswith("rank 3 waited 2 s for "), text
    assert text.endswith(" of rank 2"), text
    assert "rank 3 waited 1 s for " in outcome.stderr


@either
def test_large_activations(shm):
    """Eight microbatches of 4 MiB, sent before anything is received; on several nodes as well."""
    script = """
        layers = [torch.nn.Tanh() for _ in range(4)]
        layers[0] = torch.nn.LayerNorm(1 << 18)
        x = torch.randn(32, 1 << 18)
        for schedule in ("gpipe", "1f1b"):
            model = PipelineModule(
                layers, torch.nn.functional.mse_loss, microbatches=8, schedule=schedule
            )
            say(f"{model(x, x).item():.6f}")
    """
    outcome = run(source(script), 2, timeout=SECONDS, environment={"HVDKIT_SHM": shm})
    assert outcome.status == 0, outcome.stderr
    said = re.findall(r"\[(.*?)\]\n", outcome.stdout)
    assert len(said) == 4
    assert len(set(said)) == 1


def test_shutdown_and_init_again():
    """With a pipeline before and one after, and messages on their way that nobody takes."""
    script = """
        losses = set()
        for shm in ("1", "0", "1"):
            os.environ["HVDKIT_SHM"] = shm
            hvd.shutdown()
            hvd.init()
            model = pipeline()
            torch.manual_seed(1)
            x = torch.randn(16, 300)
            losses.add(model(x, x).item())
            courier = model._pipeline._executor._courier
            courier.send((rank + 1) % 3, "nobody asks", torch.ones(1 << 20).numpy())
        began = time.monotonic()
        hvd.shutdown()
        assert time.monotonic() - began < 8
        assert len(losses) == 1
        say("done")
    """
    outcome = run(source(script), 3, timeout=SECONDS)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("[done]") == 3
