"""Paths that a user or a file names: one that no file can have is refused before anything is done with it."""

from __future__ import annotations

from pathlib import Path

from edge_stream.errors import EdgeStreamError, without_middle

_SHOWN = 240  # characters


def shown(path: str | Path) -> str:
    """A path for a message: a terminal's few lines at most."""
    return without_middle(str(path), _SHOWN)


def possible(path: Path) -> Path:
    """The path. Raises EdgeStreamError if it cannot be looked at: a name that is too long, a folder that is closed."""
    try:
        path.exists()
    except OSError as error:
        raise EdgeStreamError(f"{shown(path)}: {error.strerror}") from error
    return path


def given_path(name: str) -> Path:
    """A path that a user gave, with ~ expanded. Raises EdgeStreamError if it is not `possible`."""
    try:
        return possible(Path(name).expanduser())
    except RuntimeError as error:  # ~somebody, who is not there
        raise EdgeStreamError(f"{shown(name)}: there is no such user") from error
