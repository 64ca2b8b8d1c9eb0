"""What a session file says of itself, without the cache that is in it."""

from __future__ import annotations

import ctypes as C
import os
from pathlib import Path

from edge_stream import _native


def peek_session(path: str | Path) -> tuple[_native.SessionInfo, bytes]:
    """Facts of a session file and its caller's bytes, both verified; the cache in it is not read.

    Raises SessionError.
    """
    native, name, info = _native.library(), os.fsencode(path), _native.SessionInfo()
    _native.check(native.es_session_peek(name, C.byref(info), None, 0))
    user = C.create_string_buffer(max(1, info.n_user))
    _native.check(native.es_session_peek(name, C.byref(info), user, info.n_user))
    return info, user.raw[: info.n_user]
