"""The tokenizer of an MLC model: its files, and what mlc-chat-config.json says about them.

MLC's runtime reads tokenizer.json in preference to tokenizer.model (mlc-llm, cpp/tokenizers/tokenizers.cc), so a model
that has only the latter, or only tekken.json, gets a tokenizer.json built from its vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edge_stream.converters import chat_templates
from edge_stream.errors import EdgeStreamError
from edge_stream.text import parse_json

if TYPE_CHECKING:
    from edge_stream.converters.source import Source

# the files that mlc_llm gen_config copies
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
)


def collect(source: Source) -> tuple[dict[str, bytes], list[str]]:
    """Contents by name, in the order of FILES, and notes. Raises EdgeStreamError if there is no tokenizer."""
    files: dict[str, bytes] = {}
    notes = []
    for name in FILES:
        content = source.tokenizer_files.get(name)
        if content is not None:
            files[name] = content if isinstance(content, bytes) else content.read_bytes()
    if "tokenizer.json" not in files:
        from edge_stream.converters import tokenizer_files

        rebuilt = tokenizer_files.rebuild(source.vocab(), source.chat_templates, source.config)
        files = rebuilt | files
        notes.append("tokenizer.json is rebuilt from the model's vocabulary")
    _check_added(files["tokenizer.json"])
    notes += _keep_templates(source.chat_templates, files)
    return {name: files[name] for name in FILES if name in files}, notes


def _keep_templates(templates: Mapping[str, str], files: dict[str, bytes]) -> list[str]:
    """Put templates from other files into tokenizer_config.json, where MLC's engine here finds them; returns notes."""
    settings = _parse(files.get("tokenizer_config.json", b"{}"))
    if chat_templates.of_config(settings, "tokenizer_config.json") != templates:
        settings["chat_template"] = chat_templates.as_config(templates)
        files["tokenizer_config.json"] = json.dumps(settings, ensure_ascii=False, indent=1).encode(
            "utf-8", errors="surrogatepass"
        )
    others = ", ".join(name for name in templates if name != chat_templates.DEFAULT)
    if not others:
        return []
    return [f"mlc-chat-config.json holds one chat template: {others} stay in tokenizer_config.json only"]


def _check_added(content: bytes) -> None:
    added = _parse(content).get("added_tokens") or []
    texts = [token.get("content") for token in added if isinstance(token, Mapping)]
    for text in texts:
        if texts.count(text) > 1:
            raise EdgeStreamError(
                f"tokenizer.json has the added token {text!r} twice, which MLC's tokenizer does not accept"
            )


def info(content: bytes) -> dict[str, Any]:
    """tokenizer_info of a tokenizer.json, as mlc-llm's Tokenizer::DetectTokenizerInfo detects it."""
    tokenizer = _parse(content)
    kinds = {step.get("type") for step in _steps(tokenizer.get("decoder"), "decoders")}
    method = "byte_fallback" if "ByteFallback" in kinds else "byte_level" if "ByteLevel" in kinds else "raw"
    prepends = any(
        step.get("type") == "Prepend" and step.get("prepend") == "▁"
        for step in _steps(tokenizer.get("normalizer"), "normalizers")
    )
    metaspaces = any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme") in ("always", "first")
        for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    )
    strips = any(
        step.get("type") == "Strip" and step.get("content") == " " and step.get("start") == 1
        for step in _steps(tokenizer.get("decoder"), "decoders")
    )
    return {
        "token_postproc_method": method,
        "prepend_space_in_encode": prepends or metaspaces,
        "strip_space_in_decode": strips,
    }


def special_tokens(source: Source, files: Mapping[str, bytes]) -> tuple[dict[str, str], dict[str, int]]:
    """Texts and ids of the model's bos, eos and pad tokens."""
    texts: dict[str, str] = {}
    ids: dict[str, int] = {}
    settings = _parse(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    tokenizer = _parse(files["tokenizer.json"])
    known = {t.get("content"): t.get("id") for t in tokenizer.get("added_tokens") or [] if isinstance(t, Mapping)}
    vocab = tokenizer.get("model", {}).get("vocab")
    known = (vocab if isinstance(vocab, dict) else {}) | known
    for name in ("bos", "eos", "pad"):
        text = settings.get(f"{name}_token")
        text = text.get("content") if isinstance(text, Mapping) else text
        if isinstance(text, str):
            texts[name] = text
        number = known.get(text) if isinstance(text, str) else None
        number = source.config.get(f"{name}_token_id") if number is None else number
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < source.model.n_vocab:
            ids[name] = number
    return texts, ids


def adds_bos(files: Mapping[str, bytes]) -> bool:
    """Whether plain text begins with the bos token."""
    settings = _parse(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    return settings.get("add_bos_token") is True


def _steps(part: Any, key: str) -> list[Mapping[str, Any]]:
    if not isinstance(part, Mapping):
        return []
    return [s for s in part.get(key, []) if isinstance(s, Mapping)] if part.get("type") == "Sequence" else [part]


def _parse(content: bytes) -> dict[str, Any]:
    try:
        value = parse_json(content)
    except ValueError as error:
        raise EdgeStreamError(f"a tokenizer file is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise EdgeStreamError("a tokenizer file is not a JSON object")
    return value
