"""Session files: read a file's header, and write one from a snapshot in memory."""

from __future__ import annotations

import ctypes as C
import os
from pathlib import Path

from edge_stream.native import bindings


def peek_session(path: str | Path) -> tuple[bindings.SessionInfo, bytes]:
    """A session file's header and the caller's bytes, both verified. The cached keys and values are not read.

    Raises SessionError.
    """
    native, name, info = bindings.library(), os.fsencode(path), bindings.SessionInfo()
    bindings.check(native.es_session_peek(name, C.byref(info), None, 0))
    user = C.create_string_buffer(max(1, info.n_user))
    bindings.check(native.es_session_peek(name, C.byref(info), user, info.n_user))
    return info, user.raw[: info.n_user]


class Snapshot:
    """A session in memory. Use it from one thread at a time; free it with `close` or a `with` block."""

    def __init__(self, handle: C.c_void_p) -> None:
        self._native, self._handle = bindings.library(), handle

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        return int(self._native.es_snapshot_size(self._handle))

    def write(self, path: str | Path) -> None:
        """Write the session file atomically. Raises SessionError."""
        bindings.check(self._native.es_snapshot_write(self._handle, os.fsencode(path)))

    def close(self) -> None:
        """Free the memory."""
        self._native.es_snapshot_free(self._handle)
        self._handle = C.c_void_p()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
