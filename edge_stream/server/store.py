"""Sessions on disk: one folder per model and cache, one file per conversation, names of our own making only."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError, SessionError
from edge_stream.native import bindings
from edge_stream.server.recognition import Entry
from edge_stream.session_file import peek_session

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.session_file import Snapshot

log = logging.getLogger("edge_stream.server")

_FORMAT = 1
_SUFFIX = ".session"
_SAVED = ".saved"
_DAMAGED = ".damaged"
_MAX_COPIES = 2  # sessions in memory: one that is written, one that waits


class SessionStore:
    """A locked folder of session files, written by a thread of its own in the order given.

    max_bytes: of everything under `root`, other models' folders and states saved by name included. Raises
    EdgeStreamError if the folder cannot be had.
    """

    def __init__(self, folder: Path, engine: Engine, max_bytes: int) -> None:
        # llama.cpp's state of a sequence fits caches of the same shape only
        backend, o = engine.backend, engine.backend.options
        shape = f"c{o.n_ctx}-np{o.n_parallel}-{o.cache_type_k}-{o.cache_type_v}-fa-{o.flash_attn}"
        self.root = folder
        self.folder = folder / f"{backend.facts.weights_tag:016x}-{shape}-{backend.sink_move}"
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise EdgeStreamError(f"sessions cannot be kept in {self.folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise EdgeStreamError(
                f"another server keeps its sessions in {self.folder}: give this one its own --session-dir"
            ) from None
        for left_over in self.folder.glob("*.tmp-*"):  # of a process that was killed while it saved
            left_over.unlink(missing_ok=True)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writes: dict[Future[None], tuple[Path, int]] = {}  # those going on: file, bytes

    def path(self, conversation_id: str) -> Path:
        """The file of a conversation (its id is ours, 32 hex digits)."""
        return self.folder / (conversation_id + _SUFFIX)

    def named_path(self, name: str) -> Path:
        """The file of a state that a client gave a name: the name itself never becomes part of a path."""
        return self.folder / f"slot-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}{_SAVED}"

    def scan(self) -> Iterator[tuple[str, dict[str, Any], int, float]]:
        """(id, facts, bytes, time of last use) of every sound session. Damaged ones are set aside."""
        for file in sorted(self.folder.glob("*" + _SUFFIX), key=lambda f: f.stat().st_mtime):
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
        """Keep a damaged file under another name, where it is not tried again."""
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
        """Whether a write would begin, or be the next one: no more sessions than that are copied to memory."""
        self._writes = {write: file for write, file in self._writes.items() if not write.done()}
        return len(self._writes) < _MAX_COPIES

    def wait(self) -> None:
        """Until `can_write`."""
        while not self.can_write:
            wait(self._writes, return_when=FIRST_COMPLETED)

    def flush(self) -> None:
        """Until everything given to `write` is on disk."""
        wait(self._writes)

    def write(self, snapshot: Snapshot, path: Path) -> Future[None]:
        """Have a session written, and its memory freed. What goes wrong is logged, and is the future's exception."""

        size = (path, snapshot.n_bytes)

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
        """(bytes, time of last use) of every file under the root, as they are when all writes have ended."""
        found = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                file = Path(folder, name)
                with suppress(OSError):  # deleted meanwhile
                    stat = file.stat()
                    if stat.st_size and ".tmp-" not in name:
                        found[file] = (stat.st_size, stat.st_mtime)
        found |= {file: (size, time.time()) for write, (file, size) in self._writes.items() if not write.done()}
        return found

    def n_saved(self) -> int:
        """States that clients gave names."""
        return sum(file.suffix == _SAVED and file.parent == self.folder for file in self.files())

    def may_delete(self, file: Path) -> bool:
        """Whether a file is a conversation's, or damaged, and no other running server's."""
        return file.suffix in (_SUFFIX, _DAMAGED) and (file.parent == self.folder or not _is_locked(file.parent))

    @staticmethod
    def is_damaged(file: Path) -> bool:
        """Whether a file was set aside."""
        return file.suffix == _DAMAGED

    def close(self) -> None:
        """Finish what is being written, and let another server have the folder."""
        self._pool.shutdown()
        os.close(self._lock)


def is_damage(error: EdgeStreamError) -> bool:
    """Whether a session's content is wrong, as opposed to what a later attempt may overcome (no memory, no handles)."""
    return error.status == bindings.FORMAT


def _is_locked(folder: Path) -> bool:
    """Whether a running server keeps its sessions in a folder."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def pack(facts: dict[str, Any], entries: list[Entry]) -> bytes:
    """A conversation's facts and log as the caller's bytes of a session."""
    rows = [[e.key.hex(), e.n_past, e.tokens_hash.hex(), e.kind, e.pending, e.ended, e.n_bytes] for e in entries]
    return json.dumps({"format": _FORMAT, **facts, "entries": rows}).encode()


def unpack(data: bytes, file: Path) -> dict[str, Any]:
    """The other way. Raises SessionError."""
    try:
        facts = json.loads(data)
        if facts["format"] > _FORMAT:
            raise SessionError(f"{file} was written by a newer edge-stream")
        facts["entries"] = [
            Entry(
                bytes.fromhex(key), int(n_past), bytes.fromhex(tokens), str(kind), tuple(pending), bool(ended), int(n)
            )
            for key, n_past, tokens, kind, pending, ended, n in facts["entries"]
        ]
        whole = all(isinstance(facts[name], int) for name in ("n_past", "n_window", "n_turns")) and facts["entries"]
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise SessionError(f"{file} is a session, but not of a server's conversation")
    return facts  # type: ignore[no-any-return]
