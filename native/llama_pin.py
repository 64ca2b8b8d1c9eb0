"""The llama-cpp-python that everything is built from: pyproject.toml is the one place that names it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
# expressions, since Python 3.10 has no TOML reader
_FIELDS = {
    "version": r'^    "llama-cpp-python==(.+)",$',
    "sha256": r'^llama-cpp-python-sha256 = "(.+)"$',
    "commit": r'^llama-cpp-commit = "(.+)"$',
}


class Pin(NamedTuple):
    version: str
    sha256: str  # of the source distribution
    commit: str  # llama.cpp's, nine digits


def read(pyproject: Path = PYPROJECT) -> Pin:
    """The pin in `pyproject`. Raises ValueError if a part of it is not there exactly once."""
    found = {name: re.findall(rule, pyproject.read_text(), re.MULTILINE) for name, rule in _FIELDS.items()}
    for name, values in found.items():
        if len(values) != 1:
            raise ValueError(f"{pyproject}: the {name} of llama-cpp-python stands there {len(values)} times, not once")
    return Pin(**{name: values[0] for name, values in found.items()})


def write(pin: Pin, pyproject: Path = PYPROJECT) -> None:
    """Change the pin in `pyproject`, all of it or nothing."""
    text = pyproject.read_text()
    for old, new, rule in zip(read(pyproject), pin, _FIELDS.values(), strict=True):
        line = re.search(rule, text, re.MULTILINE)[0]
        text = text.replace(line, line.replace(old, new))
    partial = pyproject.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, pyproject)
