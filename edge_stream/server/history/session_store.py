"""Sessions on disk: one folder per model and cache, one file per session, no file name chosen by a client."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError, SessionError
from edge_stream.native import bindings
from edge_stream.server.history.prefix_matching import Entry
from edge_stream.session_file import peek_session

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.session_file import Snapshot

log = logging.getLogger("edge_stream.server")

_FORMAT = 3
_SUFFIX = ".session"
_SAVED = ".saved"
_DAMAGED = ".damaged"
_OURS = re.compile(r"[0-9a-f]{32}\.session(\.damaged)?|slot-[0-9a-f]{32}\.saved")
_LOCK_TRIES, _LOCK_PAUSE = 20, 0.05  # seconds
_MAX_COPIES = 2  # sessions in memory: one that is written, one that waits


class SessionStore:
    """A locked folder of session files, written in order by a thread of its own.

    max_bytes: of the files of all servers under `root`, other models' and states saved by name included. Raises
    EdgeStreamError if the folder cannot be used. chat_tag: of what conversations are rendered with, "" for the model's
    own template: histories of another one do not match.
    """

    def __init__(self, folder: Path, engine: Engine, max_bytes: int, chat_tag: str = "") -> None:
        # llama.cpp's state of a sequence fits caches of the same shape only
        backend, o = engine.backend, engine.backend.options
        shape = f"c{o.n_ctx}-np{o.n_parallel}-{o.cache_type_k}-{o.cache_type_v}-fa-{o.flash_attn}"
        self.root = folder
        self.folder = (
            folder / f"{backend.facts.weights_tag:016x}-{shape}-{backend.sink_move}{chat_tag and '-' + chat_tag}"
        )
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise EdgeStreamError(f"sessions cannot be kept in {self.folder}: {error.strerror}") from error
        for _ in range(_LOCK_TRIES):  # a server that makes room holds it for a moment
            with suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_LOCK_PAUSE)
        else:
            os.close(self._lock)
            raise EdgeStreamError(
                f"another server keeps its sessions in {self.folder}: give this one its own --session-dir"
            )
        for left_over in self.folder.glob("*.tmp-*"):  # from a process that was killed while it saved
            left_over.unlink(missing_ok=True)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writes: dict[Future[None], tuple[Path, int]] = {}  # not ended yet: file, bytes

    def path(self, session_id: str) -> Path:
        """The file of a session, whose id is 32 hex digits of ours."""
        return self.folder / (session_id + _SUFFIX)

    def named_path(self, name: str) -> Path:
        """The file of a state that a client named: the name itself never becomes part of a path."""
        return self.folder / f"slot-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}{_SAVED}"

    def scan(self) -> Iterator[tuple[str, dict[str, Any], int, float]]:
        """(id, facts, bytes, time of last use) of every intact session. Damaged ones are set aside."""
        for file in sorted(self.folder.glob("*" + _SUFFIX), key=lambda f: f.stat().st_mtime):
            if not _OURS.fullmatch(file.name):
                continue
            try:
                facts = self.read(file)
            except SessionError as error:
                log.warning("%s", error)
                if is_damage(error):
                    self.set_aside(file)
                continue
            stat = file.stat()
            yield file.name.removesuffix(_SUFFIX), facts, stat.st_size, stat.st_mtime

    @staticmethod
    def read(file: Path) -> dict[str, Any]:
        """The facts in a session file. Raises SessionError."""
        return unpack(peek_session(file)[1], file)

    def set_aside(self, file: Path) -> None:
        """Rename a damaged file, so that it is kept and not tried again."""
        aside = file.with_name(file.name + _DAMAGED)
        try:
            file.replace(aside)
            log.error("a damaged session was set aside as %s", aside)
        except OSError as error:
            log.error("a damaged session could not be set aside: %s", error)

    #
    # writing
    #

    @property
    def can_write(self) -> bool:
        """Whether a write would start now or be the next one: no more sessions than that are copied to memory."""
        self._writes = {write: file for write, file in self._writes.items() if not write.done()}
        return len(self._writes) < _MAX_COPIES

    def wait(self) -> None:
        """Until `can_write`."""
        while not self.can_write:
            wait(self._writes, return_when=FIRST_COMPLETED)

    def flush(self, path: Path) -> None:
        """Until what was given to `write` for a path is on disk."""
        wait([write for write, (file, _) in self._writes.items() if file == path])

    def write(self, snapshot: Snapshot, path: Path) -> Future[None]:
        """Have a session written, and its memory freed. An error is logged, and is the future's exception."""
        size = path, snapshot.n_bytes  # the snapshot is closed by another thread

        def work() -> None:
            try:
                with snapshot:
                    snapshot.write(path)
            except Exception as error:
                log.error("a conversation could not be saved: %s", error)
                raise

        future = self._pool.submit(work)
        self._writes[future] = size
        return future

    #
    # space
    #

    def files(self) -> dict[Path, tuple[int, float]]:
        """(bytes, time of last use) of every server's files, as they will be when all writes have ended.

        Those are in folders with a lock, and have names that a server gives; any other file is somebody else's.
        """
        writes = list(self._writes.items())  # another thread may ask
        found = {}
        for folder in [lock.parent for lock in self.root.glob("*/lock")]:
            for name in os.listdir(folder) if os.access(folder, os.R_OK) else ():
                with suppress(OSError):  # deleted meanwhile
                    if _OURS.fullmatch(name):
                        stat = (folder / name).stat()
                        found[folder / name] = (stat.st_size, stat.st_mtime)
        found |= {file: (size, time.time()) for write, (file, size) in writes if not write.done()}
        return found

    def n_saved(self) -> int:
        """How many states clients have saved by name."""
        return sum(file.suffix == _SAVED and file.parent == self.folder for file in self.files())

    def excess(
        self, path: Path, n_bytes: int, in_use: Collection[Path], order: Mapping[Path, tuple[bool, float]]
    ) -> list[Path] | None:
        """The files to delete before n_bytes fit at a path; None if they never would.

        First those set aside, then by `order`, which is by time of last use for files that it lacks. States saved by
        name and files of other running servers stay, and so do files in use: with these, max_bytes may be exceeded
        until the next write. A session that is alone may be larger than max_bytes.
        """
        files = self.files()
        files.pop(path, None)
        excess = sum(size for size, _ in files.values()) + n_bytes - self.max_bytes
        if excess <= 0:
            return []
        others = {file.parent for file in files} - {self.folder}
        locked = {folder for folder in others if _is_locked(folder)}
        kept = [file for file in files if file.suffix == _SAVED or file.parent in locked]
        if kept and sum(files[file][0] for file in kept) + n_bytes > self.max_bytes:
            return None
        deletable = files.keys() - in_use - set(kept)
        chosen = []
        for file in sorted(
            deletable, key=lambda file: (file.suffix != _DAMAGED, order.get(file, (False, files[file][1])))
        ):
            if excess <= 0:
                break
            excess -= files[file][0]
            chosen.append(file)
        return chosen

    def delete(self, file: Path) -> None:
        """Delete a file. Raises OSError, also if a server runs in its folder, which is not ours."""
        with nullcontext() if file.parent == self.folder else _held(file.parent):
            file.unlink(missing_ok=True)

    def delete_after_writes(self, file: Path) -> Future[None]:
        """Delete a file of ours once all current writes have ended. An error is logged."""

        def work() -> None:
            try:
                self.delete(file)
            except OSError as error:
                log.error("%s could not be deleted: %s", file, error)

        return self._pool.submit(work)

    def close(self) -> None:
        """Finish writing and unlock the folder."""
        self._pool.shutdown()
        os.close(self._lock)


def is_damage(error: EdgeStreamError) -> bool:
    """Whether a session's content is wrong, as opposed to errors that may pass (no memory, no file handles)."""
    return error.status == bindings.FORMAT


def _is_locked(folder: Path) -> bool:
    """Whether a running server keeps its sessions in a folder."""
    try:
        with _held(folder):
            return False
    except OSError:
        return True


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, so that no server starts in it. Raises OSError if one runs there."""
    lock = os.open(folder / "lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def pack(facts: dict[str, Any]) -> bytes:
    """A session's facts, its log's entries among them, as the caller's bytes of a session file."""
    rows = [
        [e.key.hex(), e.n_past, e.tokens_hash.hex(), e.kind, e.pending, e.n_bytes, e.recalled, e.n_gone]
        for e in facts["entries"]
    ]
    return json.dumps({"format": _FORMAT, **facts, "entries": rows}).encode()


def unpack(data: bytes, file: Path) -> dict[str, Any]:
    """The facts in a session file's bytes. Raises SessionError."""
    try:
        facts = json.loads(data)
        if facts["format"] > _FORMAT:
            raise SessionError(f"{file} was written by a newer edge-stream")
        # format 1 has a column that is no longer used
        columns = (lambda row: [*row[:5], row[-1]]) if facts["format"] == 1 else list
        facts["entries"] = [
            Entry(bytes.fromhex(key), int(n_past), bytes.fromhex(tokens), str(kind), tuple(pending), *rest)
            for key, n_past, tokens, kind, pending, *rest in map(columns, facts["entries"])
        ]
        whole = all(isinstance(facts[name], int) for name in ("n_past", "n_window", "n_turns")) and facts["entries"]
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise SessionError(f"{file} is a session, but not one of a server")
    return facts  # type: ignore[no-any-return]
