"""Staging: output is written to a hidden folder beside the target, renamed at the end, removed on failure.

The folder is locked while its process lives. A killed process (`kill -9`, a power cut) cannot remove it; the next
conversion to the same target finds it unlocked and does.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_stream.errors import EdgeStreamError
from edge_stream.output.files import abandoned, sync_folder, target_of
from edge_stream.paths import possible

_OLD = "model"  # a folder that is being replaced, in a hidden one
_SPARE = 64 << 20  # room for metadata, and for the file system's own needs


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A new folder `.NAME.partial-XXXX` beside the target, always removed at the end."""
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        put_back(target)
        for left in abandoned(parent, f".{target.name}.partial-"):
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=parent))
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise EdgeStreamError(f"cannot write to {parent}: {error.strerror}") from error
    try:
        yield folder
    except OSError as error:
        reason = error.strerror or str(error)  # numpy's short write has no strerror
        raise EdgeStreamError(f"cannot write {target.name}: {reason}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def check_absent(path: Path, overwrite: bool) -> None:
    """Raise EdgeStreamError if path exists, unless it may be replaced."""
    if not overwrite and (possible(path).exists() or path.is_symlink()):
        raise EdgeStreamError(f"{path} exists already: choose another name, or --overwrite to replace it")


def publish(files: list[Path], folder: Path, overwrite: bool) -> list[Path]:
    """Sync files of a staging folder to disk and move them into place, the first of several parts last."""
    for file in files:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    for file in files:
        check_absent(folder / file.name, overwrite)
    targets = [target_of(folder / file.name) for file in files]
    for file, target in reversed(list(zip(files, targets, strict=True))):
        os.replace(file, target)
    for parent in {target.parent for target in targets}:
        sync_folder(parent)
    return targets


def sync_tree(folder: Path) -> None:
    """Make a folder and all in it survive a loss of power."""
    for inner, _, names in os.walk(folder):
        for name in names:
            with (Path(inner) / name).open("rb+") as file:
                os.fsync(file.fileno())
        sync_folder(Path(inner))


def publish_folder(folder: Path, out: Path, overwrite: bool = True) -> None:
    """Sync a folder and move it into place. One that is there is in its place afterwards, and is never gone meanwhile.

    overwrite: without it a folder with content at `out` is an OSError.
    """
    sync_tree(folder)
    if overwrite and out.exists():
        _swap(folder, out)
    else:
        os.replace(folder, out)
    sync_folder(out.parent)


def _swap(folder: Path, out: Path) -> None:
    """`exchange`. On file systems that cannot do that (NFS) in three steps, between which `put_back` helps."""
    try:
        return exchange(folder, out)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
            raise
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    try:
        os.rename(out, aside / _OLD)
        try:
            os.rename(folder, out)
        except OSError:
            os.rename(aside / _OLD, out)
            raise
        os.rename(aside / _OLD, folder)
    finally:
        with suppress(OSError):
            aside.rmdir()


def put_back(out: Path) -> None:
    """Restore, or remove, what is left of a process that was killed while it replaced the folder `out`."""
    if not out.parent.is_dir():
        return
    for aside in abandoned(out.parent, f".{out.name}.old-"):
        if not out.exists() and (aside / _OLD).exists():
            os.replace(aside / _OLD, out)
        shutil.rmtree(aside, ignore_errors=True)


def exchange(a: Path, b: Path) -> None:
    """Let two files or folders of one file system change places, in one step. OSError if that is not possible."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin":
        failed = libc.renamex_np(*names, ctypes.c_uint(2))  # RENAME_SWAP
    elif not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(b))
    else:
        here = ctypes.c_int(-100)  # AT_FDCWD
        failed = libc.renameat2(here, names[0], here, names[1], ctypes.c_uint(2))  # RENAME_EXCHANGE
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(b))


def check_space(target: Path, need: int) -> None:
    """Raise EdgeStreamError if the target's disk has fewer than `need` bytes free."""
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need + _SPARE > free:
        raise EdgeStreamError(
            f"{target.name} needs {(need + _SPARE) / 2**20:,.0f} MiB in {folder}, {free / 2**20:,.0f} MiB are free"
        )
