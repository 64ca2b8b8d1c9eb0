"""ctypes declarations of native/include/edge_stream.h: types, signatures, and `check`. No logic."""

from __future__ import annotations

import ctypes as C
from functools import lru_cache
from typing import Any

from edge_stream.errors import EdgeStreamError, SessionError, UnsupportedModelError
from edge_stream.native import libraries
from edge_stream.native.libraries import edge_stream_library

OK, INVALID, UNSUPPORTED, MEMORY, DECODE, STOPPED, IO, NO_SPACE, FORMAT, VERSION, MODEL, INTERNAL = range(0, -12, -1)

SINK_MOVES = {"auto": 0, "bank": 1, "redecode": 2}
SINK_MOVE_NAMES = {value: name for name, value in SINK_MOVES.items()} | {3: "none"}

token_p = C.POINTER(C.c_int32)
float_p = C.POINTER(C.c_float)
LogitsCallback = C.CFUNCTYPE(C.c_bool, C.c_void_p, C.c_int64, float_p)
NO_CALLBACK: Any = LogitsCallback()


class StreamParams(C.Structure):
    """es_stream_params."""

    _fields_ = [
        ("seq_id", C.c_int32),
        ("scratch_seq_id", C.c_int32),
        ("n_ctx", C.c_uint32),
        ("n_keep", C.c_uint32),
        ("n_slide", C.c_uint32),
        ("n_chunk", C.c_uint32),
        ("n_boundary", C.c_uint32),
        ("rebase_at", C.c_int32),
        ("sink_move", C.c_int32),
        ("model_tag", C.c_uint64),
        ("n_draft", C.c_uint32),
        ("n_draft_min", C.c_uint32),
        ("n_match", C.c_uint32),
        ("n_recall_bytes", C.c_uint64),
    ]


class StreamStats(C.Structure):
    """es_stream_stats."""

    _fields_ = [
        ("n_past", C.c_int64),
        ("n_evicted", C.c_int64),
        ("n_slides", C.c_int64),
        ("n_rebases", C.c_int64),
        ("t_slide_us", C.c_int64),
        ("t_rebase_us", C.c_int64),
        ("t_decode_us", C.c_int64),
        ("n_ctx", C.c_uint32),
        ("n_keep", C.c_uint32),
        ("n_sinks", C.c_uint32),
        ("n_window", C.c_uint32),
        ("n_chunk", C.c_uint32),
        ("n_slide", C.c_uint32),
        ("pos_next", C.c_int32),
        ("pos_sinks", C.c_int32),
        ("sink_move", C.c_int32),
        ("n_drafts", C.c_int64),
        ("n_drafted", C.c_int64),
        ("n_accepted", C.c_int64),
        ("n_recalled", C.c_uint32),
        ("n_recall_max", C.c_uint32),
    ]


class DecoderStep(C.Structure):
    """es_decoder_step."""

    _fields_ = [
        ("tokens", token_p),
        ("n_tokens", C.c_uint32),
        ("n_ctx", C.c_uint32),
        ("n_keep", C.c_uint32),
        ("n_sinks", C.c_uint32),
        ("n_window", C.c_uint32),
        ("pos_sinks", C.c_int32),
        ("all_logits", C.c_bool),
        ("n_recalled", C.c_uint32),
        ("recalls", C.c_bool),
    ]


step_p = C.POINTER(DecoderStep)
DecodeFunction = C.CFUNCTYPE(C.c_void_p, C.c_void_p, step_p)
RebaseFunction = C.CFUNCTYPE(C.c_bool, C.c_void_p, step_p, C.c_int32)
StateSizeFunction = C.CFUNCTYPE(C.c_size_t, C.c_void_p, step_p)
StateGetFunction = C.CFUNCTYPE(C.c_bool, C.c_void_p, step_p, C.c_void_p, C.c_size_t)
StateSetFunction = C.CFUNCTYPE(C.c_bool, C.c_void_p, step_p, C.c_void_p, C.c_size_t)


class Decoder(C.Structure):
    """es_decoder."""

    _fields_ = [
        ("user", C.c_void_p),
        ("n_cells", C.c_uint32),
        ("n_batch", C.c_uint32),
        ("decode", DecodeFunction),
        ("rebase", RebaseFunction),
        ("state_size", StateSizeFunction),
        ("state_get", StateGetFunction),
        ("state_set", StateSetFunction),
        ("can_recall", C.c_bool),
    ]


class Proof(C.Structure):
    """es_proof."""

    _fields_ = [
        ("distance", C.c_int32),
        ("positions", C.c_double),
        ("move", C.c_double),
        ("rebase", C.c_double),
        ("noise", C.c_double),
        ("spread", C.c_double),
        ("bound", C.c_double),
        ("parallel", C.c_bool),
    ]


class LogitBias(C.Structure):
    """es_logit_bias."""

    _fields_ = [("token", C.c_int32), ("bias", C.c_float)]


class SamplerParams(C.Structure):
    """es_sampler_params."""

    _fields_ = [
        ("seed", C.c_uint32),
        ("temp", C.c_float),
        ("top_k", C.c_int32),
        ("top_p", C.c_float),
        ("min_p", C.c_float),
        ("typical_p", C.c_float),
        ("top_n_sigma", C.c_float),
        ("min_keep", C.c_int32),
        ("xtc_probability", C.c_float),
        ("xtc_threshold", C.c_float),
        ("dynatemp_range", C.c_float),
        ("dynatemp_exponent", C.c_float),
        ("repeat_penalty", C.c_float),
        ("repeat_last_n", C.c_int32),
        ("frequency_penalty", C.c_float),
        ("presence_penalty", C.c_float),
        ("dry_multiplier", C.c_float),
        ("dry_base", C.c_float),
        ("dry_allowed_length", C.c_int32),
        ("dry_penalty_last_n", C.c_int32),
        ("mirostat", C.c_int32),
        ("mirostat_tau", C.c_float),
        ("mirostat_eta", C.c_float),
        ("adaptive_target", C.c_float),
        ("adaptive_decay", C.c_float),
        ("n_ctx", C.c_uint32),
        ("logit_bias", C.POINTER(LogitBias)),
        ("n_logit_bias", C.c_size_t),
        ("dry_sequence_breakers", C.POINTER(C.c_char_p)),
        ("n_dry_sequence_breakers", C.c_size_t),
        ("samplers", C.c_char_p),
        ("grammar", C.c_char_p),
        ("grammar_root", C.c_char_p),
        ("chat", C.c_char_p),
    ]


class GeneratedToken(C.Structure):
    """es_token."""

    _fields_ = [
        ("token", C.c_int32),
        ("logprob", C.c_float),
        ("is_eog", C.c_bool),
        ("piece", C.c_void_p),
        ("n_piece", C.c_size_t),
        ("n_past", C.c_int64),
        ("n_cached", C.c_uint32),
    ]


class Candidate(C.Structure):
    """es_candidate."""

    _fields_ = [("token", C.c_int32), ("probability", C.c_float)]


class Loop(C.Structure):
    """es_loop."""

    _fields_ = [("period", C.c_uint32), ("n_tokens", C.c_uint32)]


class SessionInfo(C.Structure):
    """es_session_info."""

    _fields_ = [
        ("version", C.c_uint32),
        ("n_ctx", C.c_uint32),
        ("n_keep", C.c_uint32),
        ("type_k", C.c_int32),
        ("type_v", C.c_int32),
        ("n_past", C.c_int64),
        ("fingerprint", C.c_uint64),
        ("model_tag", C.c_uint64),
        ("n_user", C.c_uint64),
    ]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "es_version": (C.c_char_p, []),
    "es_status_name": (C.c_char_p, [C.c_int32]),
    "es_last_error": (C.c_char_p, []),
    "es_log_set": (None, [C.c_bool]),
    "es_log_last_error": (C.c_char_p, []),
    "es_bank_available": (C.c_bool, []),
    "es_model_can_stream": (C.c_bool, [C.c_void_p, C.c_char_p, C.c_size_t]),
    "es_model_can_shift": (C.c_bool, [C.c_void_p, C.c_char_p, C.c_size_t]),
    "es_model_file_check": (C.c_bool, [C.c_char_p, C.c_char_p, C.c_size_t]),
    "es_model_file_number": (C.c_bool, [C.c_char_p, C.c_char_p, C.POINTER(C.c_uint32)]),
    "es_vocab_eog": (C.c_int32, [C.c_void_p, C.POINTER(C.c_int32), C.c_int32]),
    "es_model_fingerprint": (C.c_uint64, [C.c_void_p]),
    "es_model_bytes_per_token": (C.c_uint64, [C.c_void_p, C.c_int32, C.c_int32]),
    "es_context_memory": (None, [C.c_void_p, C.POINTER(C.c_uint64), C.POINTER(C.c_uint64)]),
    "es_model_device": (C.c_void_p, [C.c_void_p, C.c_int32]),
    "es_stream_default_params": (StreamParams, []),
    "es_stream_init": (C.c_int32, [C.c_void_p, StreamParams, C.POINTER(C.c_void_p)]),
    "es_stream_set_draft": (C.c_int32, [C.c_void_p, C.c_void_p]),
    "es_stream_init_decoder": (C.c_int32, [C.c_void_p, Decoder, StreamParams, C.POINTER(C.c_void_p)]),
    "es_stream_prove": (C.c_int32, [C.c_void_p, C.POINTER(Proof)]),
    "es_stream_proof_distance": (C.c_int32, [C.c_void_p]),
    "es_stream_free": (None, [C.c_void_p]),
    "es_stream_feed": (C.c_int32, [C.c_void_p, token_p, C.c_size_t, LogitsCallback, C.c_void_p]),
    "es_streams_feed": (C.c_int32, [C.POINTER(C.c_void_p), token_p, C.c_size_t]),
    "es_stream_logits": (float_p, [C.c_void_p]),
    "es_stream_get_stats": (C.c_int32, [C.c_void_p, C.POINTER(StreamStats)]),
    "es_stream_tokens": (C.c_size_t, [C.c_void_p, token_p, C.c_size_t]),
    "es_stream_mark": (C.c_int32, [C.c_void_p]),
    "es_stream_rewind": (C.c_int32, [C.c_void_p, C.c_size_t]),
    "es_stream_recall": (C.c_int32, [C.c_void_p, token_p, C.c_size_t]),
    "es_stream_unrecall": (C.c_int32, [C.c_void_p]),
    "es_stream_rebase": (C.c_int32, [C.c_void_p]),
    "es_stream_set_n_past": (C.c_int32, [C.c_void_p, C.c_int64]),
    "es_stream_reset": (C.c_int32, [C.c_void_p]),
    "es_sampler_default_params": (SamplerParams, []),
    "es_sampler_init": (C.c_int32, [C.c_void_p, SamplerParams, C.POINTER(C.c_void_p)]),
    "es_sampler_free": (None, [C.c_void_p]),
    "es_sampler_choose": (C.c_int32, [C.c_void_p, C.c_void_p, C.c_bool, C.c_bool, C.POINTER(GeneratedToken)]),
    "es_stream_next": (C.c_int32, [C.c_void_p, C.c_void_p, C.c_bool, C.c_bool, C.POINTER(GeneratedToken)]),
    "es_loop_guard_init": (C.c_int32, [C.POINTER(C.c_void_p)]),
    "es_loop_guard_free": (None, [C.c_void_p]),
    "es_loop_guard_add": (Loop, [C.c_void_p, C.c_int32]),
    "es_stream_unloop": (C.c_int32, [C.c_void_p, Loop, C.POINTER(C.c_size_t)]),
    "es_sampler_accept": (C.c_int32, [C.c_void_p, C.c_int32]),
    "es_sampler_candidates": (C.c_int32, [C.c_void_p, C.POINTER(Candidate), C.c_int32]),
    "es_sampler_seed": (C.c_uint32, [C.c_void_p]),
    "es_session_save": (
        C.c_int32,
        [C.c_void_p, C.c_void_p, C.c_int32, C.c_int32, C.c_char_p, C.c_char_p, C.c_size_t],
    ),
    "es_snapshot_init": (
        C.c_int32,
        [C.c_void_p, C.c_void_p, C.c_int32, C.c_int32, C.c_char_p, C.c_size_t, C.POINTER(C.c_void_p)],
    ),
    "es_snapshot_size": (C.c_uint64, [C.c_void_p]),
    "es_snapshot_write": (C.c_int32, [C.c_void_p, C.c_char_p]),
    "es_snapshot_free": (None, [C.c_void_p]),
    "es_session_peek": (C.c_int32, [C.c_char_p, C.POINTER(SessionInfo), C.c_void_p, C.c_size_t]),
    "es_sampler_begin": (C.c_int32, [C.c_void_p, C.c_void_p]),
    "es_session_load": (C.c_int32, [C.c_void_p, C.c_int32, C.c_int32, C.c_char_p]),
}


@lru_cache(maxsize=1)
def library() -> Any:
    """libedge_stream, with every function's signature declared."""
    lib, llama = edge_stream_library(), libraries.llama()
    loading: dict[str, tuple[Any, list[Any]]] = {
        "es_model_load": (C.c_void_p, [C.c_char_p, llama.llama_model_params]),
        "es_context_init": (C.c_void_p, [C.c_void_p, llama.llama_context_params]),
    }
    for name, (restype, argtypes) in (_SIGNATURES | loading).items():
        function = getattr(lib, name)
        function.restype = restype
        function.argtypes = argtypes
    return lib


def check(status: int) -> None:
    """Raise the exception for a status code, with this thread's last error message. Nothing for OK."""
    if status == OK:
        return
    message = library().es_last_error().decode(errors="replace")
    if status == UNSUPPORTED:
        raise UnsupportedModelError(message, status)
    if status in (IO, NO_SPACE, FORMAT, VERSION, MODEL):
        raise SessionError(message, status)
    raise EdgeStreamError(message, status)
