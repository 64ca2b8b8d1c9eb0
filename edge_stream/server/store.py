"""Sessions on disk: one folder per model and cache, one file per conversation, names of our own making only."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError, SessionError
from edge_stream.server.recognition import Entry
from edge_stream.session_file import peek_session

if TYPE_CHECKING:
    from edge_stream.engine import Engine

log = logging.getLogger("edge_stream.server")

_FORMAT = 1
_SUFFIX = ".session"


class SessionStore:
    """A locked folder of session files whose total size is bounded. Raises EdgeStreamError if it cannot be had."""

    def __init__(self, folder: Path, engine: Engine, max_bytes: int) -> None:
        # llama.cpp's state of a sequence fits caches of the same shape only
        backend, o = engine.backend, engine.backend.options
        shape = f"c{o.n_ctx}-np{o.n_parallel}-{o.cache_type_k}-{o.cache_type_v}-fa-{o.flash_attn}"
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

    def path(self, conversation_id: str) -> Path:
        """The file of a conversation (its id is ours, 32 hex digits)."""
        return self.folder / (conversation_id + _SUFFIX)

    def named_path(self, name: str) -> Path:
        """The file of a state that a client gave a name: the name itself never becomes part of a path."""
        return self.folder / f"slot-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}.saved"

    def scan(self) -> Iterator[tuple[str, dict[str, Any], int, float]]:
        """(id, facts, bytes, time of last use) of every sound session; damaged ones are reported and left alone."""
        for file in sorted(self.folder.glob("*" + _SUFFIX), key=lambda f: f.stat().st_mtime):
            try:
                facts = self.read(file)
            except SessionError as error:
                log.warning("%s", error)
                continue
            stat = file.stat()
            yield file.name.removesuffix(_SUFFIX), facts, stat.st_size, stat.st_mtime

    @staticmethod
    def read(file: Path) -> dict[str, Any]:
        """The facts in a session file. Raises SessionError."""
        return unpack(peek_session(file)[1], file)

    def close(self) -> None:
        """Let another server have the folder."""
        os.close(self._lock)


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
