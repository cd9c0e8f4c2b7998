"""An adapter imports its own framework, and no other."""

import importlib.util
import subprocess
import sys

import pytest

FRAMEWORKS = {"hvdkit.torch": "torch", "hvdkit.tensorflow": "tensorflow"}


@pytest.mark.parametrize("adapter", [None, *FRAMEWORKS])
def test_imports(adapter):
    own = FRAMEWORKS.get(adapter)
    if own is not None and importlib.util.find_spec(own) is None:
        pytest.skip(f"needs {own}")
    script = f"import sys, hvdkit, {adapter or 'os'}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    imported = set(done.stdout.split())
    assert {name for name in ("torch", "tensorflow", "horovod") if name in imported} == {own} - {
        None
    }
    assert "mpi4py.MPI" not in imported
