"""ctypes declarations of the parts of native/include/edge_stream_app.h that Python uses. No logic."""

from __future__ import annotations

import ctypes as C
from functools import lru_cache
from typing import Any

from edge_stream.native import bindings, libraries


class ModelParams(C.Structure):
    """es_app_model_params."""

    _fields_ = [
        ("n_gpu_layers", C.c_int32),
        ("use_mmap", C.c_bool),
        ("on_progress", C.c_void_p),
        ("user", C.c_void_p),
    ]


class ModelInfo(C.Structure):
    """es_app_model_info."""

    _fields_ = [
        ("name", C.c_char * 128),
        ("n_params", C.c_uint64),
        ("n_bytes", C.c_uint64),
        ("fingerprint", C.c_uint64),
        ("tag", C.c_uint64),
        ("n_vocab", C.c_uint32),
        ("n_ctx_train", C.c_uint32),
        ("n_ctx", C.c_uint32),
        ("n_keep", C.c_uint32),
        ("has_chat_template", C.c_bool),
        ("has_sink_bank", C.c_bool),
    ]


class SessionParams(C.Structure):
    """es_app_session_params."""

    _fields_ = [
        ("n_ctx", C.c_uint32),
        ("n_keep", C.c_uint32),
        ("n_batch", C.c_uint32),
        ("n_threads", C.c_uint32),
        ("cache_type_k", C.c_char_p),
        ("cache_type_v", C.c_char_p),
        ("flash_attn", C.c_int32),
        ("chat", C.c_bool),
        ("chat_template", C.c_char_p),
        ("system", C.c_char_p),
        ("tools", C.c_char_p),
        ("thinking", C.c_int32),
    ]


class Memory(C.Structure):
    """es_app_memory."""

    _fields_ = [
        ("weights", C.c_uint64),
        ("cache", C.c_uint64),
        ("sinks", C.c_uint64),
        ("compute", C.c_uint64),
        ("total", C.c_uint64),
        ("n_ctx", C.c_uint32),
        ("n_keep", C.c_uint32),
    ]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "es_app_model_default_params": (ModelParams, []),
    "es_app_model_load": (C.c_int32, [C.c_char_p, ModelParams, C.POINTER(C.c_void_p)]),
    "es_app_model_free": (None, [C.c_void_p]),
    "es_app_model_get_info": (C.c_int32, [C.c_void_p, C.POINTER(ModelInfo)]),
    "es_app_model_can_chat": (C.c_bool, [C.c_void_p, C.c_char_p, C.c_char_p, C.c_size_t]),
    "es_app_session_default_params": (SessionParams, []),
    "es_app_memory_need": (C.c_int32, [C.c_char_p, ModelParams, SessionParams, C.POINTER(Memory)]),
}


@lru_cache(maxsize=1)
def library() -> Any:
    """libedge_stream, with the facade's signatures declared."""
    libraries.llama()  # the facade binds to it
    lib = bindings.library()
    for name, (restype, argtypes) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib
