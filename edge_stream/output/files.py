"""Atomic replacement of files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from edge_stream.errors import EdgeStreamError


def check_writable(path: Path) -> None:
    """Raise EdgeStreamError if path cannot be written. For checks before long work."""
    folder = path.parent
    if not folder.is_dir():
        raise EdgeStreamError(f"cannot write {path}: the folder {folder} does not exist")
    if path.is_dir():
        raise EdgeStreamError(f"cannot write {path}: it is a folder")
    if not os.access(folder, os.W_OK):
        raise EdgeStreamError(f"cannot write {path}: no permission to write in {folder}")


def replace_file(path: str | Path, write: Callable[[str], object]) -> None:
    """Let write(name) fill a temporary file, then rename it to path. On EdgeStreamError path is unchanged."""
    target = Path(path)
    temporary = None
    try:
        # matplotlib chooses the format by the suffix
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=target.suffix)
        os.close(handle)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it 0600
        os.replace(temporary, target)
    except OSError as error:
        raise EdgeStreamError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def replace_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file with replace_file."""
    replace_file(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
