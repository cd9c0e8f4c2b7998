"""A call on its way to the ranks, and their results on the way back: cloudpickle, else pickle."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType
from typing import Any

from hvdkit.errors import LauncherError, UnsupportedError

_loading_main = ContextVar("_loading_main", default=False)

_REMEDY = (
    "Install cloudpickle (pip install 'hvdkit[run]'), which also takes lambdas, functions inside "
    "functions and notebooks; or define the function at the top of a module that the ranks can "
    "import."
)


@dataclass(frozen=True)
class Parcel:
    """A call, and what a rank needs to know before it can read it."""

    call: bytes
    """(function, args, kwargs), by cloudpickle if `by_value`, else by pickle."""

    by_value: bool
    """Functions of the main script travel by value, as only cloudpickle can do."""

    main: Mapping[str, str] | None
    """Where the main script is, if the call refers to it: for `multiprocessing.spawn`."""

    argv: tuple[str, ...]
    """The launcher's command line: the function may parse it."""


def pack(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Parcel:
    """Return the call as something that can travel.

    Raises:
        UnsupportedError: it cannot be pickled, or the ranks could not find the function; says
            what to do.
        LauncherError: this process is itself a rank that is just loading the main script.
    """
    if _loading_main.get():
        raise LauncherError(
            "run() was called while a rank loads the main script, to find the function in it: put "
            "the call under  if __name__ == '__main__':  as multiprocessing wants it too, or "
            "install cloudpickle (pip install 'hvdkit[run]')"
        )
    pickler = _pickler()
    by_value = pickler is not pickle
    try:
        call = (function, tuple(args), dict(kwargs))
        data: bytes = pickler.dumps(call, pickle.HIGHEST_PROTOCOL)
    except Exception as exc:
        remedy = (
            "The arguments, and the variables outside of it that the function uses, travel to the "
            "ranks with it: create what cannot travel (locks, files, connections) inside of it."
        )
        raise UnsupportedError(
            f"run() cannot send {_name(function)} to the ranks: {exc}\n"
            f"{remedy if by_value else _REMEDY}"
        ) from exc
    if by_value or b"main__" not in data:  # __main__, or __mp_main__ on a rank
        return Parcel(data, by_value, None, tuple(sys.argv))
    main = _locate(sys.modules["__main__"])
    if main is None:
        raise UnsupportedError(
            f"run() cannot send {_name(function)} to the ranks: it, or an argument, is defined in "
            f"an interactive session, which the ranks cannot load\n{_REMEDY}"
        )
    return Parcel(data, False, main, tuple(sys.argv))


def unpack(parcel: Parcel) -> tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]]:
    """Return the function, its args and its kwargs, on a rank.

    The main script, where it is needed, is loaded as ``__mp_main__``: what stands under
    ``if __name__ == "__main__":`` does not run again.
    """
    sys.argv[:] = parcel.argv
    if parcel.main is not None:
        with _while_loading_main():
            spawn.prepare(dict(parcel.main))
    try:
        function, args, kwargs = pickle.loads(parcel.call)
    except Exception as exc:
        raise LauncherError(
            f"the ranks cannot load the function or an argument ({type(exc).__name__}: {exc})\n"
            f"{'' if parcel.by_value else _REMEDY}"
        ) from exc
    return function, args, kwargs


def pack_result(result: object, parcel: Parcel) -> bytes:
    """Return a call's result as something that can travel the way that the call came.

    Raises:
        UnsupportedError: it cannot be pickled.
    """
    pickler = _pickler() if parcel.by_value else pickle
    try:
        data: bytes = pickler.dumps(result, pickle.HIGHEST_PROTOCOL)
    except Exception as exc:
        raise UnsupportedError(
            f"the result cannot travel back: {exc}\n"
            f"Return numbers, arrays or other plain data instead of {type(result).__name__}."
        ) from exc
    return data


def _pickler() -> ModuleType:
    try:
        return importlib.import_module("cloudpickle")
    except ImportError:
        return pickle


@contextmanager
def _while_loading_main() -> Iterator[None]:
    token = _loading_main.set(True)
    try:
        yield
    finally:
        _loading_main.reset(token)


def _locate(main: ModuleType) -> dict[str, str] | None:
    """Return where `main` can be loaded from, None for an interactive session."""
    spec = getattr(main, "__spec__", None)
    if spec is not None:  # python -m
        return {"init_main_from_name": spec.name}
    path = getattr(main, "__file__", None)
    if path is None or not Path(path).is_file():
        return None
    return {"init_main_from_path": str(Path(path).absolute())}


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
