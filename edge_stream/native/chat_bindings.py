"""ctypes declarations of native/include/edge_stream_chat.h: types and signatures. No logic."""

from __future__ import annotations

import ctypes as C
from functools import lru_cache
from typing import Any

from edge_stream.native import bindings, libraries

_out = C.POINTER(C.c_void_p)
_text = C.POINTER(C.c_char_p)


#: es_chat_progress
Progress = C.CFUNCTYPE(C.c_bool, C.c_void_p, C.c_uint64, C.c_uint64)
#: es_answer_end
OPEN, WHOLE, CUT, TAKEN_BACK = range(4)


class Place(C.Structure):
    """es_chat_place."""

    _fields_ = [("n_messages", C.c_int32), ("n_tokens", C.c_int32)]


@lru_cache(maxsize=1)
def library() -> Any:
    """The library with the functions of edge_stream_chat.h declared."""
    libraries.llama()
    lib: Any = bindings.library()
    for name, arguments in {
        "es_chat_init": (C.c_void_p, C.c_char_p, _out),
        "es_chat_request_init": (C.c_void_p, C.c_char_p, _out),
        "es_chat_request_info": (C.c_void_p, _text),
        "es_chat_request_prompt": (C.c_void_p, _text),
        "es_chat_request_head": (C.c_void_p, _text),
        "es_chat_plan": (
            C.c_void_p, C.POINTER(Place), C.c_size_t, bindings.token_p, C.c_size_t, C.c_size_t, _text,
        ),
        "es_chat_parser_init": (C.c_void_p, C.c_char_p, _out),
        "es_chat_parser_push": (C.c_void_p, C.c_char_p, C.c_size_t, C.c_bool, _text),
        "es_chat_parser_message": (C.c_void_p, _text),
        "es_schema_to_grammar": (C.c_char_p, _text),
        "es_conversation_init": (C.c_void_p, C.c_void_p, C.c_char_p, _out),
        "es_conversation_n_keep": (C.c_void_p, C.c_char_p, C.c_uint32, C.c_int32, C.POINTER(C.c_uint32)),
        "es_conversation_say": (C.c_void_p, C.c_char_p, C.c_char_p, Progress, C.c_void_p),
        "es_conversation_regenerate": (C.c_void_p, C.c_char_p, Progress, C.c_void_p),
        "es_conversation_continue": (C.c_void_p, C.c_char_p, Progress, C.c_void_p),
        "es_conversation_info": (C.c_void_p, _text),
        "es_conversation_push": (C.c_void_p, C.c_char_p, C.c_size_t, C.c_int32, _text),
        "es_conversation_end": (C.c_void_p, C.c_int32),
        "es_conversation_set_log": (C.c_void_p, C.c_void_p, C.c_uint32),
        "es_conversation_clear": (C.c_void_p,),
        "es_conversation_messages": (C.c_void_p, _text),
        "es_conversation_to_json": (C.c_void_p, _text),
        "es_conversation_from_json": (C.c_void_p, C.c_char_p, C.c_char_p),
    }.items():  # fmt: skip
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, C.c_int32
    for name in ("es_chat_free", "es_chat_request_free", "es_chat_parser_free", "es_conversation_free"):
        function = getattr(lib, name)
        function.argtypes, function.restype = (C.c_void_p,), None
    lib.es_chat_info.argtypes, lib.es_chat_info.restype = (C.c_void_p,), C.c_char_p
    return lib
