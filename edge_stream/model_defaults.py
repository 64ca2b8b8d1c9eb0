"""Streaming defaults inside a GGUF file, written by `edge-stream convert`: edge_stream.n_keep, edge_stream.n_ctx."""

from __future__ import annotations

import ctypes as C
import os
from pathlib import Path

from edge_stream import _libs

_KEYS = ("n_keep", "n_ctx")
_UINT32 = 4  # enum gguf_type


class _InitParams(C.Structure):
    """struct gguf_init_params of ggml's gguf.h."""

    _fields_ = (("no_alloc", C.c_bool), ("ctx", C.c_void_p))


def read_model_defaults(path: Path) -> dict[str, int]:
    """The defaults that the file has, by their name without prefix; {} for other files, and for unreadable ones.

    Reads the header only, with ggml's own parser.
    """
    _libs.llama()
    library = C.CDLL(str(_libs.llama_dir() / _libs._lib_name("llama")))
    try:
        init, find, kind = library.gguf_init_from_file, library.gguf_find_key, library.gguf_get_kv_type
        value, free = library.gguf_get_val_u32, library.gguf_free
    except AttributeError:  # a build that does not export ggml's functions
        return {}
    init.restype, init.argtypes = C.c_void_p, [C.c_char_p, _InitParams]
    find.restype, find.argtypes = C.c_int64, [C.c_void_p, C.c_char_p]
    kind.restype, kind.argtypes = C.c_int, [C.c_void_p, C.c_int64]
    value.restype, value.argtypes = C.c_uint32, [C.c_void_p, C.c_int64]
    free.restype, free.argtypes = None, [C.c_void_p]
    header = init(os.fsencode(path), _InitParams(True, None))
    if not header:
        return {}
    try:
        found = {name: find(header, f"edge_stream.{name}".encode()) for name in _KEYS}
        return {n: int(value(header, i)) for n, i in found.items() if i >= 0 and kind(header, i) == _UINT32}
    finally:
        free(header)
