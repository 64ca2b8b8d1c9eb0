"""Streaming defaults written by `edge-stream convert`: edge_stream.n_keep and n_ctx in GGUF, MLC's keys in a folder."""

from __future__ import annotations

import ctypes as C
import json
import os
from pathlib import Path

from edge_stream.models.names import MLC_CONFIG
from edge_stream.native import bindings, libraries

_KEYS = ("n_keep", "n_ctx")
_MLC_KEYS = {"n_keep": "attention_sink_size", "n_ctx": "sliding_window_size"}
_UINT32 = 4  # enum gguf_type


class _InitParams(C.Structure):
    """struct gguf_init_params of ggml's gguf.h."""

    _fields_ = (("no_alloc", C.c_bool), ("ctx", C.c_void_p))


def read_model_defaults(path: Path) -> dict[str, int]:
    """The file's defaults by unprefixed name; {} for other files and unreadable ones.

    Of a GGUF file only the header is read, with ggml's own parser.
    """
    if path.is_dir():
        return _read_folder(path)
    bindings.library().es_log_set(False)  # whoever loads the file reports what is wrong with it
    library = C.CDLL(str(libraries.llama_dir() / libraries._lib_name("llama")))
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


def _read_folder(path: Path) -> dict[str, int]:
    try:
        config = json.loads((path / MLC_CONFIG).read_text(encoding="utf-8"))
        found = {name: config.get(key) for name, key in _MLC_KEYS.items()}
    except (OSError, ValueError, AttributeError):
        return {}
    return {n: v for n, v in found.items() if isinstance(v, int) and v >= 0}
