"""The header of a GGUF file, read with ggml's own parser: texts, and names of tensors."""

from __future__ import annotations

import ctypes as C
import os
from pathlib import Path
from typing import Any

from edge_stream.native import libraries

_STRING = 8  # enum gguf_type


class _InitParams(C.Structure):
    """struct gguf_init_params of ggml's gguf.h."""

    _fields_ = (("no_alloc", C.c_bool), ("ctx", C.c_void_p))


class GgufHeader:
    """A context manager. A file that cannot be read has nothing: whoever loads it reports what is wrong."""

    def __init__(self, path: Path) -> None:
        self._path, self._library = path, _library()
        self._file: int | None = None

    def __enter__(self) -> GgufHeader:
        if hasattr(self._library, "gguf_init_from_file"):  # some builds do not export ggml's functions
            init = self._function("init_from_file", C.c_void_p, C.c_char_p, _InitParams)
            self._file = init(os.fsencode(self._path), _InitParams(True, None))
        return self

    def __exit__(self, *_error: object) -> None:
        if self._file:
            self._function("free", None, C.c_void_p)(self._file)
        self._file = None

    def text(self, key: str) -> str | None:
        """A string; None if there is none of this name."""
        if not self._file:
            return None
        at = self._function("find_key", C.c_int64, C.c_void_p, C.c_char_p)(self._file, key.encode())
        if at < 0 or self._function("get_kv_type", C.c_int, C.c_void_p, C.c_int64)(self._file, at) != _STRING:
            return None
        value = self._function("get_val_str", C.c_char_p, C.c_void_p, C.c_int64)(self._file, at)
        return str(value, errors="replace")

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        if not self._file:
            return False
        return bool(self._function("find_tensor", C.c_int64, C.c_void_p, C.c_char_p)(self._file, name.encode()) >= 0)

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        found = getattr(self._library, f"gguf_{name}")
        found.restype, found.argtypes = result, list(arguments)
        return found


def _library() -> C.CDLL:
    return C.CDLL(str(libraries.llama_dir() / libraries._lib_name("llama")))
