"""Replacing files atomically, and what may be replaced: regular files. A link stays one; a device or a pipe is kept."""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edge_stream.errors import EdgeStreamError
from edge_stream.paths import possible


def check_writable(path: Path, *, streams: bool = False) -> None:
    """Raise EdgeStreamError if path cannot be written. For checks before long work. streams: is_stream will do, too."""
    if streams and is_stream(path):
        return
    folder = target_of(path).parent
    if not folder.is_dir():
        raise EdgeStreamError(f"cannot write {path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise EdgeStreamError(f"cannot write {path}: no permission to write in {folder}")


def target_of(path: Path) -> Path:
    """The regular file, there or not yet, that a path leads to through links. Raises EdgeStreamError for all else."""
    if possible(path).is_dir():
        raise EdgeStreamError(f"cannot write {path}: it is a folder")
    target = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise EdgeStreamError(f"cannot write {path}: it is not a regular file")
    if target.is_symlink():
        raise EdgeStreamError(f"cannot write {path}: its links form a loop")
    return target


def is_stream(path: Path) -> bool:
    """Whether path is a device of characters or a pipe, or this process's output: written to as it is, not replaced."""
    try:
        found = path.stat()
        ours = any(os.path.samestat(found, os.fstat(number)) for number in (1, 2))
    except OSError:
        return False
    return ours or stat.S_ISCHR(found.st_mode) or stat.S_ISFIFO(found.st_mode)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power: a rename is durable only then. OSError if it cannot be."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def abandoned(parent: Path, prefix: str) -> list[Path]:
    """Files and folders with this prefix that no live process has locked."""
    found = []
    for path in parent.iterdir():
        if not path.name.startswith(prefix) or path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        with suppress(OSError):  # in use, or not ours
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(path)
            finally:
                os.close(lock)
    return found


def replace_file(path: str | Path, write: Callable[[str], object]) -> None:
    """Let write(name) fill a temporary file, then rename it to path, or copy it into a stream (see is_stream).

    On EdgeStreamError a file is unchanged. The temporary file of a process that was killed is removed by the next one.
    """
    import shutil  # both slow to import, and many a command replaces no file
    import tempfile

    path = Path(path)
    stream = is_stream(path)
    target = path if stream else target_of(path)
    handle, temporary = -1, None
    try:
        # matplotlib chooses the format by the suffix
        folder, prefix = None if stream else target.parent, f".{target.name}.tmp-"
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=prefix, suffix=target.suffix)
        with suppress(OSError):  # without locks, or where names cannot be listed, nothing counts as abandoned
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in abandoned(folder, prefix) if folder else ():
                left.unlink(missing_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            if stream:
                sys.stdout.flush()
                with path.open("ab") as sink:
                    shutil.copyfileobj(file, sink)
                return
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it 0600
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise EdgeStreamError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
            os.close(handle)


def replace_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file with replace_file."""
    replace_file(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
