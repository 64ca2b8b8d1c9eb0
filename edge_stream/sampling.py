"""Sampling settings, and the native sampler made from them."""

from __future__ import annotations

import ctypes as C
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from edge_stream.errors import EdgeStreamError
from edge_stream.native import bindings, chat_bindings
from edge_stream.vocabulary import Vocabulary

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; names, order and defaults are llama.cpp's. temp <= 0 is greedy; seed -1 is random."""

    seed: int = -1
    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str | None = None
    json_schema: str | Mapping[str, Any] | None = None
    chat: str | None = None  # chat.core.ChatRequest.sampling, instead of a grammar


_NUMBERS = [f.name for f in fields(Sampling) if f.type in ("int", "float") and f.name != "seed"]


def make_sampler(vocabulary: Vocabulary, sampling: Sampling, ignore_eos: bool) -> C.c_void_p:
    """A new es_sampler, to be freed with es_sampler_free. Raises EdgeStreamError for invalid settings."""
    lib = bindings.library()
    params = lib.es_sampler_default_params()
    params.seed = sampling.seed & 0xFFFFFFFF if sampling.seed >= 0 else _RANDOM_SEED
    for name in _NUMBERS:
        setattr(params, name, getattr(sampling, name))
    bias = dict(sampling.logit_bias)
    if ignore_eos:
        bias |= dict.fromkeys(vocabulary.eog_tokens, float("-inf"))
    if bias:
        array = (bindings.LogitBias * len(bias))(*(bindings.LogitBias(*item) for item in bias.items()))
        params.logit_bias, params.n_logit_bias = array, len(bias)
    if sampling.grammar and sampling.json_schema:
        raise EdgeStreamError("give a grammar or a JSON schema, not both")
    grammar = sampling.grammar or (schema_grammar(sampling.json_schema) if sampling.json_schema else None)
    if grammar:
        params.grammar = grammar.encode()
    if sampling.chat:
        params.chat = sampling.chat.encode()
    handle = C.c_void_p()
    bindings.check(lib.es_sampler_init(vocabulary.model, params, C.byref(handle)))
    return handle


def check_sampling(vocabulary: Vocabulary, sampling: Sampling) -> None:
    """Raise EdgeStreamError for invalid settings. Thread-safe."""
    bindings.library().es_sampler_free(make_sampler(vocabulary, sampling, False))


def schema_grammar(schema: str | Mapping[str, Any]) -> str:
    """A JSON schema as a GBNF grammar, by llama.cpp's converter. Raises EdgeStreamError for what it cannot express."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    out = C.c_char_p()
    bindings.check(chat_bindings.library().es_schema_to_grammar(text.encode(errors="replace"), C.byref(out)))
    return (out.value or b"").decode()
