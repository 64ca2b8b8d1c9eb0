"""ctypes declarations of native/include/edge_stream_recall.h: types and signatures. No logic."""

from __future__ import annotations

import ctypes as C
from functools import lru_cache
from typing import Any

from edge_stream.native import bindings

TEXT, USER, ASSISTANT = range(3)  # es_log_kind


class LogStats(C.Structure):
    """es_log_stats."""

    _fields_ = [
        ("n_turns", C.c_int64),
        ("n_entries", C.c_int64),
        ("n_dropped", C.c_int64),
        ("n_bytes", C.c_uint64),
    ]


class LogHit(C.Structure):
    """es_log_hit."""

    _fields_ = [
        ("turn", C.c_int64),
        ("kind", C.c_int32),
        ("when", C.c_int64),
        ("score", C.c_double),
        ("coverage", C.c_double),
        ("belongs", C.c_int32),
        ("text", C.c_char_p),
    ]


@lru_cache(maxsize=1)
def library() -> Any:
    """The library with the functions of edge_stream_recall.h declared."""
    lib: Any = bindings.library()
    out = C.POINTER(C.c_void_p)
    for name, result, arguments in (
        ("es_log_open", C.c_int32, (C.c_char_p, C.c_uint64, out)),
        ("es_log_close", None, (C.c_void_p,)),
        ("es_log_append", C.c_int32, (C.c_void_p, C.c_int64, C.c_int32, C.c_int64, C.c_char_p, C.c_size_t)),
        ("es_log_sync", C.c_int32, (C.c_void_p,)),
        ("es_log_truncate", C.c_int32, (C.c_void_p, C.c_int64)),
        ("es_log_fork", C.c_int32, (C.c_void_p, C.c_char_p, C.c_int64, out)),
        ("es_log_forget", C.c_int32, (C.c_void_p, C.c_int64)),
        ("es_log_get_stats", LogStats, (C.c_void_p,)),
        ("es_log_search", C.c_size_t,
         (C.c_void_p, C.c_char_p, C.c_size_t, C.c_int64, C.POINTER(LogHit), C.c_size_t)),
        ("es_log_recall", C.c_bool, (C.c_void_p, C.c_char_p, C.c_size_t, C.c_int64, C.POINTER(LogHit))),
    ):  # fmt: skip
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, result
    return lib
