"""Sampling settings, and the native sampler made from them."""

from __future__ import annotations

import ctypes as C
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from edge_stream.errors import EdgeStreamError, not_utf8
from edge_stream.native import bindings, chat_bindings
from edge_stream.vocabulary import Vocabulary

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED


#: llama.cpp's letters of samplers (--sampler-seq); the last two are off unless they are named.
LETTERS = {
    "e": "penalties", "d": "dry", "s": "top_n_sigma", "k": "top_k", "y": "typ_p", "p": "top_p", "m": "min_p",
    "x": "xtc", "t": "temperature", "i": "infill", "a": "adaptive_p",
}  # fmt: skip
SAMPLERS = tuple(LETTERS.values())[:9]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; names, order and defaults are llama.cpp's. temp <= 0 is greedy; seed -1 is random.

    es_sampler_params in edge_stream_types.h says what switches each sampler off. repeat_last_n and dry_penalty_last_n:
    -1 is the context's size. samplers: their names in order (SAMPLERS has the usual ones).
    """

    seed: int = -1
    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    min_keep: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    samplers: Sequence[str] = SAMPLERS
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str | None = None
    json_schema: str | Mapping[str, Any] | None = None
    chat: str | None = None  # chat.core.ChatRequest.sampling, instead of a grammar


#: The settings that are numbers, but for the seed: fields of es_sampler_params with the same names.
NUMBERS = [f.name for f in fields(Sampling) if f.type in ("int", "float") and f.name != "seed"]


def samplers_of(letters: str) -> tuple[str, ...]:
    """Names of samplers, from letters such as edskypmxt. Raises EdgeStreamError."""
    unknown = next((letter for letter in letters if letter not in LETTERS), None)
    if unknown is not None:
        raise EdgeStreamError(f"there is no sampler with the letter {unknown!r}, only {''.join(LETTERS)}")
    return tuple(LETTERS[letter] for letter in letters)


def make_sampler(vocabulary: Vocabulary, sampling: Sampling, n_ctx: int, ignore_eos: bool = False) -> C.c_void_p:
    """A new es_sampler, to be freed with es_sampler_free. Raises EdgeStreamError for invalid settings."""
    lib = bindings.library()
    params = lib.es_sampler_default_params()
    params.seed = sampling.seed & 0xFFFFFFFF if sampling.seed >= 0 else _RANDOM_SEED
    params.n_ctx = n_ctx
    for name in NUMBERS:
        setattr(params, name, getattr(sampling, name))
    breakers = [_bytes(text, "dry_sequence_breakers") for text in sampling.dry_sequence_breakers]
    params.dry_sequence_breakers, params.n_dry_sequence_breakers = (
        (C.c_char_p * len(breakers))(*breakers),
        len(breakers),
    )
    params.samplers = _bytes(";".join(sampling.samplers), "samplers")
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
        params.grammar = _bytes(grammar, "grammar")
    if sampling.chat:
        params.chat = sampling.chat.encode()
    handle = C.c_void_p()
    bindings.check(lib.es_sampler_init(vocabulary.model, params, C.byref(handle)))
    return handle


def _bytes(text: str, name: str) -> bytes:
    """A text for C. Raises EdgeStreamError if it would be cut short, or cannot be UTF-8."""
    if "\0" in text:
        raise EdgeStreamError(f"{name}: a text with a null character")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EdgeStreamError(f"{name}: {not_utf8(error)}") from error


def check_sampling(vocabulary: Vocabulary, sampling: Sampling, n_ctx: int) -> None:
    """Raise EdgeStreamError for invalid settings. Thread-safe."""
    bindings.library().es_sampler_free(make_sampler(vocabulary, sampling, n_ctx))


def schema_grammar(schema: str | Mapping[str, Any]) -> str:
    """A JSON schema as a GBNF grammar, by llama.cpp's converter. Raises EdgeStreamError for what it cannot express."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    out = C.c_char_p()
    bindings.check(chat_bindings.library().es_schema_to_grammar(text.encode(errors="replace"), C.byref(out)))
    return (out.value or b"").decode()
