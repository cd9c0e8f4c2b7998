"""Quantities as people write them: ``2us``, ``100Gbit/s``, ``64KiB``; in and out."""

from __future__ import annotations

import argparse
import re
from math import isfinite

_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-zA-Z/%]*)\s*", re.IGNORECASE)

_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_BINARY = {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}
_SIZES = {
    prefix + unit: factor
    for prefix, factor in (_PREFIXES | _BINARY).items()
    for unit in ("", "b")
    if prefix + unit
} | {"": 1.0}


def parse_seconds(text: str) -> float:
    """Return a duration such as ``"2us"``, ``"1.5 ms"`` or ``"3"``, in seconds."""
    return _parse(text, _SECONDS, "a time such as 2us, 1.5ms or 3s")


def parse_size(text: str) -> float:
    """Return a number of bytes such as ``"100MB"`` (10**8), ``"64KiB"`` or ``"4"``."""
    return _parse(text, _SIZES, "a number of bytes such as 4, 64KiB or 100MB")


def parse_count(text: str) -> float:
    """Return a count such as ``"25M"`` (25 * 10**6), ``"1.5G"`` or ``"4096"``."""
    return _parse(text, _PREFIXES, "a number such as 4096, 25M or 1.5G")


def parse_rate(text: str) -> float:
    """Return bytes a second, of ``"100Gbit/s"``, ``"12.5GB/s"`` or ``"10GiB/s"``."""
    bits = {prefix + "bit/s": factor / 8 for prefix, factor in _PREFIXES.items()}
    nbytes = {prefix + "b/s": factor for prefix, factor in (_PREFIXES | _BINARY).items()}
    rate = _parse(text, bits | nbytes, "a bandwidth such as 100Gbit/s or 12.5GB/s")
    if rate == 0:
        raise argparse.ArgumentTypeError(f"{text} is no bandwidth: it must be above 0")
    return rate


def parse_share(text: str) -> float:
    """Return a share such as ``"0.1"`` or ``"10%"``."""
    return _parse(text, {"": 1.0, "%": 0.01}, "a share such as 0.1 or 10%")


def _parse(text: str, units: dict[str, float], expected: str) -> float:
    match = _NUMBER.fullmatch(text)
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None or not isfinite(float(match[1])):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return float(match[1]) * factor


def format_seconds(seconds: float) -> str:
    """Return such as ``"12.3 us"``."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.2f} {unit}"
    return f"{seconds / 1e-6:.1f} us"


def format_size(nbytes: float) -> str:
    """Return such as ``"64 KiB"`` where that is exact, else such as ``"100 MB"``."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor and nbytes % factor == 0:
            return f"{nbytes / factor:g} {unit}"
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.4g} {unit}"
    return f"{nbytes:g} B"
