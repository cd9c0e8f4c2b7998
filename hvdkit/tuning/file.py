"""The tuning file: JSON that people can read, with an entry for each world that was measured."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from hvdkit.errors import ConfigError
from hvdkit.schedules.machine import Level
from hvdkit.tuning.record import Cell, Grid, Levels, Tuning, World

FORMAT = "hvdkit tuning"
VERSION = 2

#: What there is of a level in the file: of memory and of margins what was fitted, of messages all.
FITTED = ("alpha", "beta", "gamma")
MESSAGES = (*FITTED, "at_once")

#: How a tuning is made.
COMMAND = "mpirun -n {ranks} python -m hvdkit tune"

#: Two numbers, each on a line of its own.
_PAIR = re.compile(r"\[\s+([-+.\de]+),\s+([-+.\de]+)\s+\]")

T = TypeVar("T")


class _WrongError(Exception):
    """What is wrong with a file, and where in it."""


def default_path(environ: Mapping[str, str]) -> Path:
    """Return ``$XDG_CONFIG_HOME/hvdkit/tuning.json``, or that under ``~/.config``."""
    folder = (
        environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".config"
    )
    return Path(folder) / "hvdkit" / "tuning.json"


def load(path: Path) -> tuple[Tuning, ...]:
    """Return the entries of a tuning file.

    Raises:
        ConfigError: the file cannot be read, or is no tuning file, or not one of this version.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(
            f"tuning file {path} cannot be read: {exc.strerror}. {_remedy()}"
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"{path} is no tuning file of hvdkit: it is no text. {_remedy()}"
        ) from exc
    return parse(text, str(path))


def parse(text: str, where: str) -> tuple[Tuning, ...]:
    """Return the entries in the text of a tuning file.

    Raises:
        ConfigError: as `load`; the message says which part of `where` is wrong.
    """
    try:
        data = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"tuning file {where} is damaged: no JSON, {exc}. {_remedy()}") from exc
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(
            f'{where} is no tuning file of hvdkit: it lacks "format": "{FORMAT}". {_remedy()}'
        )
    if data.get("version") != VERSION:
        raise ConfigError(
            f"tuning file {where} has version {data.get('version')!r}, and this hvdkit reads "
            f"{VERSION}. {_remedy()}"
        )
    try:
        return _each(data, "entries", "", _tuning)
    except _WrongError as exc:
        raise ConfigError(f"tuning file {where} is damaged: {exc}. {_remedy()}") from exc


def save(path: Path, tuning: Tuning, others: Iterable[Tuning]) -> None:
    """Write `tuning`, in the place of those of `others` that it supersedes, at once or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    entries = [other for other in others if other.world != tuning.world]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text_of([*entries, tuning]), encoding="utf-8")
        temporary.replace(path)
    except OSError as exc:
        with suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"tuning file {path} cannot be written: {exc.strerror}") from exc


def text_of(entries: Iterable[Tuning]) -> str:
    """Return the text of a tuning file."""
    plain = {"format": FORMAT, "version": VERSION, "entries": [_plain(entry) for entry in entries]}
    return _PAIR.sub(r"[\1, \2]", json.dumps(plain, indent=2)) + "\n"


def _remedy() -> str:
    command = COMMAND.format(ranks="N")
    return f"Remove it, or let HVDKIT_TUNING_FILE name another, and measure anew: {command}"


# Out of JSON


def _tuning(data: Any, where: str) -> Tuning:
    levels = _take(data, "levels", where, dict)
    inside = f"{where}.levels"
    memory = levels.get("memory")
    return Tuning(
        world=_world(_take(data, "world", where, dict), f"{where}.world"),
        measured=_take(data, "measured", where, str),
        hosts=_each(data, "hosts", where, _string),
        levels=Levels(
            memory=None if memory is None else _level(memory, f"{inside}.memory", FITTED),
            within=_level(_take(levels, "within", inside, dict), f"{inside}.within"),
            across=_level(_take(levels, "across", inside, dict), f"{inside}.across"),
            check=_pair(_take(levels, "check", inside, list), f"{inside}.check", _figure),
        ),
        margins={
            key: _level(margin, f"{where}.margins.{key}", FITTED)
            for key, margin in _take(data, "margins", where, dict).items()
        },
        segments=tuple(
            _pair(pair, f"{where}.segments", _count)
            for pair in _take(data, "segments", where, list)
        ),
        bucket_bytes=None
        if data.get("bucket_bytes") is None
        else _count(data["bucket_bytes"], f"{where}.bucket_bytes"),
        grid=_grid(_take(data, "seconds", where, dict), f"{where}.seconds"),
    )


def _world(data: dict[str, Any], where: str) -> World:
    return World(
        hvdkit=_take(data, "hvdkit", where, str),
        machines=_each(data, "machines", where, _string),
        nodes=_each(data, "nodes", where, _count),
        transport=_take(data, "transport", where, str),
        library=_take(data, "library", where, str),
        kernels=_take(data, "kernels", where, str),
        shared_memory=_take(data, "shared_memory", where, bool),
    )


def _level(data: Any, where: str, figures: Sequence[str] = MESSAGES) -> Level:
    if not isinstance(data, dict):
        raise _WrongError(f"{where} is {data!r}, not {', '.join(figures)}")
    return Level(**{name: _figure(data.get(name), f"{where}.{name}") for name in figures})


def _grid(data: dict[str, Any], where: str) -> Grid:
    return {
        kind: {
            name: _cells(rows, f"{where}.{kind}.{name}")
            for name, rows in _take(data, kind, where, dict).items()
        }
        for kind in data
    }


def _cells(rows: Any, where: str) -> tuple[Cell, ...]:
    if not isinstance(rows, dict) or not rows:
        raise _WrongError(f"{where} is {rows!r}, not seconds by bytes")
    cells = []
    for key, value in rows.items():
        if not key.isdigit() or int(key) == 0:
            raise _WrongError(f"{where} has times for {key!r}, which is no number of bytes")
        seconds, margin = _pair(value, f"{where}.{key}", _figure)
        if seconds == 0:
            raise _WrongError(f"{where}.{key} is 0 seconds")
        cells.append(Cell(int(key), seconds, margin))
    return tuple(sorted(cells, key=lambda cell: cell.nbytes))


def _take(data: Any, key: str, where: str, kind: type[T]) -> T:
    """Return ``data[key]``, which is to be of a type."""
    place = f"{where}.{key}" if where else key
    if not isinstance(data, dict) or key not in data:
        raise _WrongError(f"{place} is missing")
    value = data[key]
    if not isinstance(value, kind):
        raise _WrongError(f"{place} is {value!r:.40}, not {_KINDS[kind]}")
    return value


def _each(data: Any, key: str, where: str, read: Callable[[Any, str], T]) -> tuple[T, ...]:
    place = f"{where}.{key}" if where else key
    items = _take(data, key, where, list)
    return tuple(read(item, f"{place}[{number}]") for number, item in enumerate(items))


def _pair(value: Any, where: str, read: Callable[[Any, str], T]) -> tuple[T, T]:
    if not isinstance(value, list) or len(value) != 2:
        raise _WrongError(f"{where} has {value!r:.40}, not a pair")
    return read(value[0], where), read(value[1], where)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _WrongError(f"{where} is {value!r:.40}, not a string")
    return value


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _WrongError(f"{where} is {value!r:.40}, not a whole number above 0")
    return value


def _figure(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise _WrongError(f"{where} is {value!r:.40}, not a number of 0 or more")
    return float(value)


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
}


# Into JSON


def _plain(tuning: Tuning) -> dict[str, Any]:
    levels = tuning.levels
    parts = {"within": levels.within, "across": levels.across}
    memory = {} if levels.memory is None else {"memory": _rounded(levels.memory, FITTED)}
    return {
        "world": asdict(tuning.world),
        "measured": tuning.measured,
        "hosts": list(tuning.hosts),
        "levels": {
            **memory,
            **{name: _rounded(level) for name, level in parts.items()},
            "check": [_round(seconds) for seconds in levels.check],
        },
        "margins": {name: _rounded(margin, FITTED) for name, margin in tuning.margins.items()},
        "segments": [list(pair) for pair in tuning.segments],
        "bucket_bytes": tuning.bucket_bytes,
        "seconds": {
            kind: {name: _rows(cells) for name, cells in ways.items()}
            for kind, ways in tuning.grid.items()
        },
    }


def _rows(cells: Sequence[Cell]) -> dict[str, list[float]]:
    return {str(cell.nbytes): [_round(cell.seconds), _round(cell.margin)] for cell in cells}


def _rounded(level: Level, figures: Sequence[str] = MESSAGES) -> dict[str, float]:
    return {name: _round(getattr(level, name)) for name in figures}


def _round(value: float) -> float:
    return float(f"{value:.4g}")
