"""Streaming defaults written by `edge-stream convert`: edge_stream.n_keep and n_ctx in GGUF, MLC's keys in a folder."""

from __future__ import annotations

import ctypes as C
import os
from pathlib import Path

from edge_stream.models.names import MLC_CONFIG
from edge_stream.native import bindings
from edge_stream.text import parse_json

_KEYS = ("n_keep", "n_ctx")
_MLC_KEYS = {"n_keep": "attention_sink_size", "n_ctx": "sliding_window_size"}


def read_model_defaults(path: Path) -> dict[str, int]:
    """The file's defaults by unprefixed name; {} for other files and unreadable ones."""
    if path.is_dir():
        return _read_folder(path)
    library = bindings.library()
    library.es_log_set(False)  # whoever loads the file reports what is wrong with it
    found: dict[str, int] = {}
    for name in _KEYS:
        value = C.c_uint32()
        if library.es_model_file_number(os.fsencode(path), f"edge_stream.{name}".encode(), C.byref(value)):
            found[name] = value.value
    return found


def _read_folder(path: Path) -> dict[str, int]:
    try:
        config = parse_json((path / MLC_CONFIG).read_text(encoding="utf-8"))
        found = {name: config.get(key) for name, key in _MLC_KEYS.items()}
    except (OSError, ValueError, AttributeError):
        return {}
    return {n: v for n, v in found.items() if isinstance(v, int) and v >= 0}
