"""The scripts for Horovod among the examples: they run, and are scripts for Horovod."""

import ast
import importlib.util
import re

import pytest

from .helpers import REPOSITORY, under_mpirun

SETTINGS = {
    "horovod_mnist": ("--epochs", "2"),
    "horovod_synthetic_benchmark": (
        *("--batch-size", "2", "--image-size", "16", "--width", "4", "--num-warmup-batches", "1"),
        *("--num-batches-per-iter", "2", "--num-iters", "2", "--no-progress", "--fp16-allreduce"),
    ),
    "horovod_accumulation_and_clipping": (
        *("--steps", "6", "--characters", "60000", "--hidden", "16", "--max-norm", "0.05"),
    ),
    "horovod_uneven_join": ("--epochs", "2"),
    "horovod_keras_mnist": ("--epochs", "3", "--warmup-epochs", "1", "--fp16-allreduce"),
    "horovod_tensorflow2_mnist": ("--steps", "80"),
    "horovod_tensorflow2_synthetic_benchmark": (
        *("--batch-size", "1", "--image-size", "32", "--num-warmup-batches", "1"),
        *("--num-batches-per-iter", "2", "--num-iters", "2", "--fp16-allreduce"),
    ),
}

ALIKE = r"all 2 ranks hold identical (weights|parameters): sha256 [0-9a-f]{16}"


def run(name, *arguments):
    """Run an example on 2 ranks; return its lines on stdout, which end as they should."""
    framework = "torch"
    if "keras" in name or "tensorflow" in name:
        framework = "tensorflow"
    for needed in (framework, "sklearn", "tqdm"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    script = f"examples/{name}.py"
    outcome = under_mpirun(2, script, *SETTINGS[name], *arguments, CUDA_VISIBLE_DEVICES="")
    assert outcome.status == 0, outcome.stdout + outcome.stderr
    lines = outcome.stdout.splitlines()
    assert re.search(f"{ALIKE}$", lines[-1]), outcome.stdout
    return lines, outcome.stderr


@pytest.mark.parametrize(
    "options", [("--gradient-predivide-factor", "2"), ("--use-adasum", "--fp16-allreduce")]
)
def test_mnist(options):
    lines, progress = run("horovod_mnist", *options)
    accuracies = [float(line.split()[-1].rstrip("%")) for line in lines[:2]]
    assert lines[-1].startswith(f"accuracy {accuracies[1]:.2f}%; ")
    assert accuracies[1] > 40, "a guess is right in 10 % of the cases"
    assert "Epoch 2: 100%" in progress


@pytest.mark.parametrize("name", [name for name in SETTINGS if "synthetic" in name])
def test_synthetic_benchmark(name):
    lines, progress = run(name)
    text = "\n".join(lines)
    assert "Number of CPUs: 2\n" in text
    assert len(re.findall(r"^Iter #\d: \d+\.\d img/sec per CPU$", text, re.MULTILINE)) == 2
    each = re.search(r"^Img/sec per CPU: (\d+\.\d) \+-\d+\.\d$", text, re.MULTILINE)
    both = re.search(r"^Total img/sec on 2 CPU\(s\): (\d+\.\d) \+-\d+\.\d$", text, re.MULTILINE)
    assert float(both[1]) == pytest.approx(2 * float(each[1]), abs=0.2)
    assert ("iter/s" in progress) == ("--no-progress" not in SETTINGS[name])


def test_accumulation_and_clipping():
    lines, progress = run("horovod_accumulation_and_clipping")
    assert lines[-2] == "gradients clipped in 6 of 6 steps"
    bits = float(lines[-1].split()[0])
    assert 3 < bits < 7, "equally likely characters have 7 bits"
    assert "6/6" in progress


def test_uneven_join():
    lines, _ = run("horovod_uneven_join")
    assert lines[0] == "batches an epoch on each rank: [30, 60]"
    assert [line.partition(";")[0] for line in lines[1:3]] == ["rank 1 joined last"] * 2
    assert float(re.search(r"^accuracy ([\d.]+)%", lines[-1])[1]) > 80


def test_keras_mnist():
    lines, _ = run("horovod_keras_mnist")
    assert any(line.startswith("Epoch 3/3") for line in lines)
    assert float(re.search(r"^accuracy ([\d.]+)%", lines[-1])[1]) > 50


@pytest.mark.parametrize("options", [(), ("--use-adasum", "--fp16-allreduce")])
def test_tensorflow2_mnist(options):
    lines, progress = run("horovod_tensorflow2_mnist", *options)
    assert float(re.search(r"^accuracy ([\d.]+)%", lines[-1])[1]) > 50
    assert "40/40" in progress


@pytest.mark.parametrize("name", SETTINGS)
def test_the_import_is_all_that_is_hvdkits(name):
    source = (REPOSITORY / "examples" / f"{name}.py").read_text()
    (imported,) = re.findall(r".*hvdkit.*", source)
    module = re.fullmatch(r"import hvdkit\.(torch|keras|tensorflow) as hvd", imported)[1]
    assert names_used(source, "hvd") <= OF_HOROVOD[module]


def names_used(source, module):
    """Return the attributes of `module` that a script uses."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == module
    }


#: What all of Horovod's modules have.
EVERYWHERE = {"init", "rank", "size", "local_rank", "allgather", "allreduce", "Average", "Sum"}
EVERYWHERE |= {"Adasum", "Compression", "DistributedOptimizer"}

#: What the examples may use of ``horovod.torch``, and so on.
OF_HOROVOD = {
    "torch": EVERYWHERE
    | {"join", "allgather_object", "broadcast_parameters", "broadcast_optimizer_state"},
    "keras": EVERYWHERE | {"callbacks"},
    "tensorflow": EVERYWHERE
    | {"allgather_object", "broadcast_variables", "DistributedGradientTape"},
}
