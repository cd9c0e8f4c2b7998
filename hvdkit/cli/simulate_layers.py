"""A model as a list of layers: on the command line, or in a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdkit.cli.units import parse_count, parse_seconds, parse_size
from hvdkit.errors import ArgumentError
from hvdkit.simulation.job import Layer

#: The columns of a line of text, and the keys of an object in JSON.
FIELDS = ("name", "parameters", "forward", "backward", "activation")

FORMAT = """\
layers: their parameters, as 1M,2M,4M, or a file.  In a file of text a line is a layer, with columns
  NAME PARAMETERS [FORWARD [BACKWARD [ACTIVATION]]]
such as "fc1 16.8M 1.2ms 2.4ms 8MB": the times of a microbatch, and the bytes of the layer's output;
"-" stands for what is not known, and # begins a comment.  A file that ends in .json is a list of
objects with these names as keys, whose numbers may be plain: seconds and bytes.

Where the forward time is not known, it is 2 x parameters x --samples / --flops; where the backward
time is not, twice the forward time."""


@dataclass(frozen=True, slots=True)
class Device:
    """What computes.

    Args:
        flops: floating-point operations a second, as far as they are reached; None: unknown.
        samples: of a microbatch, each of which meets every parameter once: a text's tokens.
    """

    flops: float | None
    samples: float


def read_layers(text: str, device: Device) -> tuple[Layer, ...]:
    """Return the layers that `text` lists, or the file of that name.

    Raises:
        ArgumentError: there are none, one cannot be read, or the time of one is not known.
    """
    path = Path(text)
    if path.suffix == ".json" or path.is_file():
        rows = _rows_of_file(path)
    else:
        rows = [
            {"name": f"layer {number}", "parameters": part}
            for number, part in enumerate(text.split(","))
        ]
    if not rows:
        raise ArgumentError(f"{text} has no layers")
    return tuple(_layer(row, device) for row in rows)


def _rows_of_file(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ArgumentError(f"cannot read the layers in {path}: {exc}") from exc
    if path.suffix == ".json":
        return _rows_of_json(path, text)
    rows = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) > len(FIELDS) or len(words) == 1:
            raise ArgumentError(f"{path}: {line.strip()!r} is not {' '.join(FIELDS).upper()}")
        if words:
            rows.append(dict(zip(FIELDS, words, strict=False)))
    return rows


def _rows_of_json(path: Path, text: str) -> Sequence[Mapping[str, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as exc:
        raise ArgumentError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ArgumentError(f"{path} is not a list of objects, one a layer")
    for row in rows:
        unknown = [key for key in row if key not in FIELDS]
        if unknown or "parameters" not in row:
            wrong = f"has {unknown[0]!r}" if unknown else "has no 'parameters'"
            raise ArgumentError(f"{path}: a layer {wrong}; the keys are {', '.join(FIELDS)}")
    return [{"name": f"layer {number}"} | row for number, row in enumerate(rows)]


def _layer(row: Mapping[str, Any], device: Device) -> Layer:
    name = str(row["name"])
    parameters = _number(row, "parameters", parse_count)
    forward = _number(row, "forward", parse_seconds)
    backward = _number(row, "backward", parse_seconds)
    activation = _number(row, "activation", parse_size)
    assert parameters is not None
    if forward is None:
        if device.flops is None:
            raise ArgumentError(
                f"how long layer {name!r} computes is not known: give its forward time in a file, "
                "or --flops"
            )
        forward = 2 * parameters * device.samples / device.flops
    return Layer(
        name=name,
        parameters=round(parameters),
        forward=forward,
        backward=2 * forward if backward is None else backward,
        activation=activation or 0.0,
    )


def _number(row: Mapping[str, Any], field: str, parse: Callable[[str], float]) -> float | None:
    """Return a field in its unit; None if it is not known, which the parameters must be."""
    value = row.get(field, "-")
    if value in ("-", None) and field != "parameters":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    try:
        return parse(str(value))
    except argparse.ArgumentTypeError as exc:
        raise ArgumentError(f"layer {row['name']!r}: its {field}: {exc}") from exc
