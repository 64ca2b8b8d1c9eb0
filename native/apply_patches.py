"""Apply unified diffs by what they say, not by where they say it.

The lines that a hunk expects (context and removed ones) must stand in the file exactly once; line numbers are ignored.
So a patch survives lines moving, and never lands in a second place that looks alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_HEADER = re.compile(r"@@ -\d+(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class PatchError(Exception):
    """A patch cannot be read, or does not fit."""


@dataclass
class Hunk:
    patch: str  # the patch's file name
    file: str  # path of the file that it changes, from the root
    number: int  # within the file, from 1
    line: int  # where the patch expects the new lines, from 1
    creates: bool  # the file is a new one
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    found: int = 0  # where the new lines are, from 1; set when applied

    def __str__(self) -> str:
        return f"{self.patch}, hunk {self.number} of {self.file}"


def parse(patch: Path) -> list[Hunk]:
    """The hunks of a unified diff whose paths have one leading folder (`a/`, `b/`). Raises PatchError."""
    hunks: list[Hunk] = []
    file, creates, number = "", False, 0
    lines = iter(patch.read_text(encoding="utf-8").split("\n"))
    for line in lines:
        if line.startswith("--- "):
            creates = line.split()[1] == "/dev/null"
        elif line.startswith("+++ "):
            file, number = line.split()[1].partition("/")[2], 0
        elif match := _HEADER.match(line):
            number += 1
            hunk = Hunk(patch.name, file, number, int(match[2]), creates)
            n_old, n_new = int(match[1] or 1), int(match[3] or 1)
            while len(hunk.old) < n_old or len(hunk.new) < n_new:
                text = next(lines, "\\")
                sign = text[:1] or " "  # editors strip the blank of an empty context line
                if sign in " -":
                    hunk.old.append(text[1:])
                if sign in " +":
                    hunk.new.append(text[1:])
                if sign not in " +-" or len(hunk.old) > n_old or len(hunk.new) > n_new:
                    raise PatchError(f"{hunk}: its lines are not as many as its header says")
            hunks.append(hunk)
    if not hunks:
        raise PatchError(f"{patch.name}: no hunk in it")
    return hunks


def _places(lines: list[str], part: list[str]) -> list[int]:
    """Where `part` stands in `lines`, from 0."""
    return [i for i in range(len(lines) - len(part) + 1) if lines[i : i + len(part)] == part]


def _place(lines: list[str], hunk: Hunk) -> int:
    """Where the lines that the hunk expects stand in `lines`, from 0. Raises PatchError if it is not one place."""
    places = _places(lines, hunk.old)
    if hunk.new and _places(lines, hunk.new) and (not places or len(hunk.new) > len(hunk.old)):
        raise PatchError(f"{hunk}: already applied")
    if len(places) != 1:
        first = next((line.strip() for line in hunk.old if line.strip()), "")
        raise PatchError(
            f"{hunk}: the {len(hunk.old)} lines that it expects ({first}) stand in {len(places)} places, not 1"
        )
    return places[0]


def apply(patches: Iterable[Path], root: Path) -> list[Hunk]:
    """Apply patches in order to the files under `root`: all of them or none.

    Returns the hunks. Raises PatchError with a line for each hunk that does not fit.
    """
    texts: dict[Path, list[str]] = {}
    errors: list[str] = []
    hunks = [hunk for patch in patches for hunk in parse(patch)]
    for hunk in hunks:
        path = root / hunk.file
        try:
            if hunk.creates == (path in texts or path.exists()):
                raise PatchError(f"{hunk}: the file is {'already' if hunk.creates else 'not'} there")
            if hunk.creates:
                texts[path] = [""]
            elif path not in texts:
                texts[path] = path.read_bytes().decode("utf-8").split("\n")
            at = 0 if hunk.creates else _place(texts[path], hunk)
            texts[path][at : at + len(hunk.old)] = hunk.new
            hunk.found = at + 1
        except PatchError as error:
            errors.append(str(error))
    if errors:
        raise PatchError("\n".join(errors))
    for path, lines in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("\n".join(lines).encode("utf-8"))
    return hunks
