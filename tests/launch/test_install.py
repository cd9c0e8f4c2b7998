"""`pip install .` from a clean copy, with a C compiler and without one."""

import shutil
import subprocess
import sys
import sysconfig

import pytest
from launching import run

from .helpers import REPOSITORY, plain_environment, python

SUM = """
    import numpy as np
    import hvdkit as hvd
    hvd.init()
    x = np.arange(1000, dtype=np.float16)
    assert (hvd.allreduce(x, op=hvd.Sum) == 2 * x).all()
    assert (hvd.allreduce(x.astype("f4"), op=hvd.Max) == x).all()
    print(f"[{hvd.__file__}]")
"""


def install(tmp_path, **environment):
    """Install a copy of the source with build isolation, and return where it went."""
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    unbuilt = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(REPOSITORY / "hvdkit", source / "hvdkit", ignore=unbuilt)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--no-deps", "--target", str(target), str(source)],
        env=plain_environment(**environment),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def native_modules(target):
    return list(target.rglob("_native*.so"))


def assert_it_works(target, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(target))
    monkeypatch.chdir(tmp_path)
    outcome = run(SUM, 2)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count(f"[{target}/hvdkit/__init__.py]") == 2


def test_without_a_compiler_numpy_does_the_work(tmp_path, monkeypatch):
    target = install(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert native_modules(target) == []
    monkeypatch.chdir(tmp_path)
    doctor = python("-m", "hvdkit", "doctor", PYTHONPATH=str(target))
    assert doctor.status == 0, doctor.stdout + doctor.stderr
    assert "--  native module  not there (" in doctor.stdout
    assert "numpy reduces, several times slower" in doctor.stdout
    assert_it_works(target, tmp_path, monkeypatch)


def test_with_a_compiler_there_is_a_native_module(tmp_path, monkeypatch):
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    target = install(tmp_path)
    assert len(native_modules(target)) == 1
    monkeypatch.chdir(tmp_path)
    doctor = python("-m", "hvdkit", "doctor", PYTHONPATH=str(target))
    assert "ok  native module  native (" in doctor.stdout
    assert (target / "hvdkit/py.typed").exists()
    assert_it_works(target, tmp_path, monkeypatch)
