"""A call is packed, and unpacked as on a rank, without any rank."""

import sys
import threading
from types import ModuleType

import pytest

from hvdkit.errors import LauncherError, UnsupportedError
from hvdkit.launch import parcel


def function(x):
    return x


@pytest.fixture(params=["cloudpickle", "pickle"])
def pickler(request, monkeypatch):
    if request.param == "pickle":
        monkeypatch.setitem(sys.modules, "cloudpickle", None)
    else:
        pytest.importorskip("cloudpickle")
    return request.param


@pytest.fixture
def main(monkeypatch):
    """A main module of its own, in which `function` seems to be defined."""
    module = ModuleType("__main__")
    module.function = function
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.setattr(function, "__module__", "__main__")
    return module


def test_there_and_back(pickler, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--epochs", "3"])
    packed = parcel.pack(function, [1], {"a": 2})
    assert packed.by_value == (pickler == "cloudpickle")
    assert packed.main is None
    sys.argv[:] = ["guard.py"]
    assert parcel.unpack(packed) == (function, (1,), {"a": 2})
    assert sys.argv == ["script.py", "--epochs", "3"]


def test_by_cloudpickle_lambdas_travel_with_what_they_use():
    pytest.importorskip("cloudpickle")
    base = 10
    packed = parcel.pack(lambda x: x + base, (5,), {})
    travelled, args, _ = parcel.unpack(packed)
    assert travelled(*args) == 15


def test_what_cannot_travel_is_named_with_a_remedy(pickler):
    with pytest.raises(
        UnsupportedError, match=r"cannot send function to the ranks: .*lock"
    ) as error:
        parcel.pack(function, (threading.Lock(),), {})
    remedy = {"pickle": "pip install 'hvdkit[run]'", "cloudpickle": "create what cannot travel"}
    assert remedy[pickler] in str(error.value)


@pytest.mark.usefixtures("pickler")
def test_a_result_that_cannot_travel():
    packed = parcel.pack(function, (), {})
    with pytest.raises(UnsupportedError, match="the result cannot travel back") as error:
        parcel.pack_result((i for i in range(3)), packed)
    assert "other plain data instead of generator" in str(error.value)


def test_a_function_of_a_script_is_found_in_the_script(main, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    main.__file__ = str(tmp_path / "script.py")
    (tmp_path / "script.py").touch()
    where = {"init_main_from_path": str(tmp_path / "script.py")}
    assert parcel.pack(function, (), {}).main == where
    main.__spec__ = type("Spec", (), {"name": "package.module"})
    assert parcel.pack(function, (), {}).main == {"init_main_from_name": "package.module"}


@pytest.mark.parametrize("path", [None, "<stdin>"])
def test_a_function_of_an_interactive_session_needs_cloudpickle(main, monkeypatch, path):
    if path is not None:
        main.__file__ = path
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(UnsupportedError, match="an interactive session") as error:
        parcel.pack(function, (), {})
    assert "pip install 'hvdkit[run]'" in str(error.value)


def test_a_function_that_the_rank_does_not_find(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    packed = parcel.pack(function, (), {})
    monkeypatch.delitem(globals(), "function")
    with pytest.raises(LauncherError, match="cannot load the function or an argument"):
        parcel.unpack(packed)
