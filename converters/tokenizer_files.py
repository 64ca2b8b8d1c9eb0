"""Rebuild tokenizer.json and tokenizer_config.json from a GGUF vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edge_stream.converters import chat_templates, vocab_bpe
from edge_stream.converters.text import quoted
from edge_stream.converters.vocab import CONTROL, UNKNOWN, USER_DEFINED, Vocab
from edge_stream.errors import EdgeStreamError

_SPACE = "▁"


def rebuild(vocab: Vocab, templates: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> content. Raises EdgeStreamError for an unknown pre-tokenizer."""
    tokenizer = _byte_level(vocab) if vocab.kind == "gpt2" else _sentencepiece(vocab)
    added = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for i, (text, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added} | tokenizer
    tokenizer["post_processor"] = _post_processor(vocab)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocab.add_bos,
        "add_eos_token": vocab.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("max_position_embeddings"),
    }
    settings |= {f"{name}_token": vocab.tokens[i] for name, i in vocab.special.items() if name not in ("eot", "eom")}
    if templates:
        settings["chat_template"] = chat_templates.as_config(templates)
    return {"tokenizer.json": _json(tokenizer), "tokenizer_config.json": _json(settings)}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", errors="surrogatepass")


def _byte_level(vocab: Vocab) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    for word in vocab_bpe.expression(vocab.pre):
        if word.startswith("split:"):
            pattern = {"Regex": word.removeprefix("split:")}
            steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
        elif word == "digits":
            steps.append({"type": "Digits", "individual_digits": True})
        else:
            steps.append(_bytes_step(use_regex=word == "gpt2"))
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": _bytes_step(use_regex=True),
        "model": _bpe(vocab, [m.split(" ") for m in vocab.merges], ignore_merges=vocab_bpe.ignores_merges(vocab.pre)),
    }


def _bytes_step(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sentencepiece(vocab: Vocab) -> dict[str, Any]:
    """BPE with byte fallback. Merges are all pairs of pieces that make another piece, by its score, best first."""
    ids = {text: i for i, text in enumerate(vocab.tokens) if vocab.types[i] not in (CONTROL, UNKNOWN)}
    ranked: list[tuple[float, int, list[str]]] = []
    for text, i in ids.items():
        if vocab.types[i] == 1:
            ranked += [
                (-vocab.scores[i], i, [text[:k], text[k:]])
                for k in range(1, len(text))
                if text[:k] in ids and text[k:] in ids
            ]
    ranked.sort(key=lambda item: item[:2])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = [{"type": "Prepend", "prepend": _SPACE}, replace] if vocab.add_space_prefix else [replace]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if vocab.add_space_prefix else []
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    unknown = next((t for t, k in zip(vocab.tokens, vocab.types, strict=True) if k == UNKNOWN), None)
    model = _bpe(vocab, [pair for _, _, pair in ranked], ignore_merges=False)
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model | {"byte_fallback": True, "fuse_unk": True, "unk_token": unknown},
    }


def _bpe(vocab: Vocab, merges: list[list[str]], *, ignore_merges: bool) -> dict[str, Any]:
    words: dict[str, int] = {}
    for i, text in enumerate(vocab.tokens):
        if text in words:
            raise EdgeStreamError(f"the vocabulary has token {quoted(text)} twice: tokenizer.json cannot be rebuilt")
        words[text] = i
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": words,
        "merges": merges,
    }


def _post_processor(vocab: Vocab) -> dict[str, Any] | None:
    around: dict[str, str] = {n: vocab.tokens[vocab.special[n]] for n in ("bos", "eos") if n in vocab.special}
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    used = []
    if vocab.add_bos and "bos" in around:
        single.insert(0, {"SpecialToken": {"id": around["bos"], "type_id": 0}})
        used.append("bos")
    if vocab.add_eos and "eos" in around:
        single.append({"SpecialToken": {"id": around["eos"], "type_id": 0}})
        used.append("eos")
    if not used:
        return None
    tokens = {around[n]: {"id": around[n], "ids": [vocab.special[n]], "tokens": [around[n]]} for n in used}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
