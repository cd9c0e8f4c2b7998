"""Names of Horovod's that hvdkit does not have: an error that says what to do, and no surprise."""

import importlib

import pytest

import hvdkit
from hvdkit.missing import _INSTEAD, refuse_name

MODULES = {
    "hvdkit": None,
    "hvdkit.torch": "torch",
    "hvdkit.tensorflow": "tensorflow",
    "hvdkit.keras": "keras",
    "hvdkit.tensorflow.keras": "tensorflow",
}


@pytest.fixture(params=MODULES)
def module(request):
    if MODULES[request.param] is not None:
        pytest.importorskip(MODULES[request.param])
    return importlib.import_module(request.param)


def test_what_is_missing_says_what_to_do(module):
    with pytest.raises(hvdkit.MissingError) as error:
        _ = module.elastic
    assert str(error.value) == (
        f"{module.__name__} does not have Horovod's 'elastic': a job keeps the ranks that it "
        "starts with. Take away the state and what @hvd.elastic.run decorates, write checkpoints "
        "on rank 0, and start the job again from the last one"
    )
    assert isinstance(error.value, hvdkit.HvdkitError)


def test_scripts_may_ask_whether_it_is_there(module):
    for name in _INSTEAD:
        assert not hasattr(module, name), name
        assert getattr(module, name, None) is None


def test_of_a_name_that_nobody_has_python_can_suggest_another(module):
    with pytest.raises(AttributeError) as error:
        _ = module.allreduc
    assert not isinstance(error.value, hvdkit.HvdkitError)
    assert str(error.value) == f"module {module.__name__!r} has no attribute 'allreduc'"
    assert (error.value.name, error.value.obj) == ("allreduc", module)


def test_functions_of_a_submodule_stand_in_the_module():
    with pytest.raises(hvdkit.MissingError, match=r"write  from hvdkit.torch import allreduce"):
        refuse_name("hvdkit.torch", "mpi_ops")
