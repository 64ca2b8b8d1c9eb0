"""Paths that a user or a file names: one that no file can have is refused before anything is done with it."""

from __future__ import annotations

from pathlib import Path

from edge_stream.errors import EdgeStreamError


def given_path(name: str | Path) -> Path:
    """A path with ~ expanded. Raises EdgeStreamError if it cannot be looked at: too long, a folder that is closed."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except RuntimeError as error:  # ~somebody, who is not there
        raise EdgeStreamError(f"{name}: there is no such user") from error
    except OSError as error:
        raise EdgeStreamError(f"{name}: {error.strerror}") from error
    return path
