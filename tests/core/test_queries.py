"""Horovod's questions: each is answered without MPI, or says that init() is missing."""

import sys
from types import SimpleNamespace

import pytest

from hvdkit import api, queries
from hvdkit.errors import NotInitializedError


@pytest.fixture
def job(monkeypatch):
    """A job of which only what is asked for is there."""
    context = SimpleNamespace(local_sizes=(2, 2), kind="mpi", threaded=True)
    monkeypatch.setattr(api, "current", context)
    return context


def test_mpi_is_what_there_is(monkeypatch):
    assert queries.mpi_built() is True
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert queries.mpi_built() is False


@pytest.mark.parametrize(
    "name",
    [
        "gloo_built",
        "gloo_enabled",
        "ddl_built",
        "ccl_built",
        "cuda_built",
        "rocm_built",
    ],
)
def test_what_there_is_not(name):
    assert getattr(queries, name)() is False


def test_an_extension_is_there_if_its_framework_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__spec__="found"))
    queries.check_extension("horovod.torch", "HOROVOD_WITH_PYTORCH", __file__, "mpi_lib_v2")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"torch is not installed, which horovod.torch needs"):
        queries.check_extension("horovod.torch", "HOROVOD_WITH_PYTORCH", __file__, "mpi_lib_v2")
    with pytest.raises(ImportError, match=r"nothing for horovod.mxnet"):
        queries.check_extension("horovod.mxnet", "HOROVOD_WITH_MXNET", __file__, "mpi_lib")


def test_nccl_version_is_a_number():
    """Horovod's scripts compare it: ``hvd.nccl_built() >= 21000``."""
    assert queries.nccl_built() == 0
    assert isinstance(queries.nccl_built(), int)
    assert not isinstance(queries.nccl_built(), bool)


def test_mpi_is_enabled_between_init_and_shutdown(job, monkeypatch):
    assert queries.mpi_enabled() is True
    job.kind = "tcp"
    assert queries.mpi_enabled() is False
    monkeypatch.setattr(api, "current", None)
    assert queries.mpi_enabled() is False


@pytest.mark.parametrize("answer", [False, True])
def test_threads(job, answer):
    job.threaded = answer
    assert queries.mpi_threads_supported() is answer


@pytest.mark.parametrize(("local_sizes", "answer"), [((2, 2, 2, 2), True), ((2, 2, 1), False)])
def test_homogeneous(job, local_sizes, answer):
    job.local_sizes = local_sizes
    assert queries.is_homogeneous() is answer


@pytest.mark.parametrize("name", ["mpi_threads_supported", "is_homogeneous"])
def test_what_needs_a_job_says_so(name):
    with pytest.raises(NotInitializedError, match=r"call hvd\.init\(\) first"):
        getattr(queries, name)()
