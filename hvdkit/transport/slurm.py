"""Slurm's way to write a list of hosts: ``node[01-03,7],gpu5`` is node01, node02, node03, ..."""

from __future__ import annotations

import re
from itertools import product

_PARTS = re.compile(r"\[([^\]]*)\]|([^\[\],]+)|(,)")


def expand_hosts(text: str) -> list[str]:
    """Return the hosts of a list that Slurm has shortened.

    Raises:
        ValueError: `text` is no such list.
    """
    hosts: list[str] = []
    choices: list[list[str]] = []
    at = 0
    for part in _PARTS.finditer(f"{text},"):
        if part.start() != at:
            break
        at = part.end()
        if part[3]:
            hosts += ["".join(chosen) for chosen in product(*choices)] if choices else []
            choices = []
        else:
            choices.append([part[2]] if part[2] else _numbers(part[1]))
    if at <= len(text) or not hosts:
        raise ValueError(f"{text!r} is no list of hosts")
    return hosts


def _numbers(text: str) -> list[str]:
    """Return what ``01-03,7`` stands for; leading zeros stay."""
    found: list[str] = []
    for span in text.split(","):
        first, dash, last = span.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"[{text}] has no numbers in it")
        numbers = range(int(first), int(last if dash else first) + 1)
        found += [str(number).zfill(len(first)) for number in numbers]
    return found
