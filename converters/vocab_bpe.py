"""Byte-level BPE (as in GPT-2) from tokenizer.json, and llama.cpp's name for its pre-tokenizer.

llama.cpp does not run tokenizer.json's regular expression but its own, selected by `tokenizer.ggml.pre`. The name is
derived from the pre-tokenizer's structure, independently of the vocabulary. An unknown structure is refused, since a
wrong pre-tokenizer makes a model slightly and silently worse.
"""

from __future__ import annotations

from typing import Any

from edge_stream.converters.text import quoted
from edge_stream.converters.vocab import NORMAL, Vocab, check_id, empty_vocab, merge_pair, words_and_merges
from edge_stream.errors import EdgeStreamError

# Building blocks of recent expressions, which end with runs of other characters, line ends, spaces.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"  # marks are parts of words
_OTHER_MARKED = r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
_OTHER = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_OTHER_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"

# structure of the pre-tokenizer (see _signature), tokenizer.json's ignore_merges -> tokenizer.ggml.pre
_LLAMA3 = f"split:{_CONTRACTIONS}|{_WORD}|\\p{{N}}{{1,3}}{_OTHER}{_SPACES}"
_TEKKEN = f"split:{_CASED[0]}|{_CASED[1]}|\\p{{N}}{_OTHER_SLASH}{_SPACES}"
_NAMES: dict[tuple[str, bool], str] = {
    (f"{_LLAMA3} bytes", True): "llama-bpe",
    (f"{_LLAMA3} bytes", False): "dbrx",  # the same expression, merges not ignored (Phi-4)
    (f"split:{_CONTRACTIONS}|{_WORD}|\\p{{N}}{_OTHER}{_SPACES} bytes", False): "qwen2",
    (f"split:{_CONTRACTIONS}|{_MARKED}|\\p{{N}}{_OTHER_MARKED}{_SPACES} bytes", False): "qwen35",
    (f"{_TEKKEN} bytes", True): "tekken",
    (
        f"split:{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\\p{{N}}{{1,3}}{_OTHER_SLASH}{_SPACES} bytes",
        False,
    ): "gpt-4o",  # Phi-4-mini
    ("digits gpt2", False): "smollm",
    ("gpt2", False): "gpt-2",
}
# the same tokenizer under other names: llama-vocab.cpp gives them the same expressions, merges ignored or not, and
# special tokens around a text
_ALIASES: dict[str, tuple[str, ...]] = {
    "llama-bpe": (*("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),),
    "dbrx": ("smaug-bpe",),
    "qwen2": (*("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),),
    "gpt-4o": ("llama4", "kanana2", "talkie", "minimax-m2"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "gpt-2": (
        *("phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert"),
        *("exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling"),
    ),
}
_CANONICAL = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}


def expression(pre: str) -> list[str]:
    """The structure behind a name, in _signature's notation, for rebuilding tokenizer.json."""
    for (signature, _), name in _NAMES.items():
        if name == _CANONICAL.get(pre, pre):
            if signature.startswith("split:"):
                return [signature.removesuffix(" bytes"), "bytes"]
            return signature.split()
    raise EdgeStreamError(f"the pre-tokenizer {quoted(pre)} has no known tokenizer.json equivalent")


def ignores_merges(pre: str) -> bool:
    """Whether a word that is itself a token skips the merges."""
    return any(name == _CANONICAL.get(pre, pre) and ignore for (_, ignore), name in _NAMES.items())


def adds_bos(pre: str) -> bool:
    """Whether llama.cpp puts BOS before a text if the model does not say (llama-vocab.cpp)."""
    return _CANONICAL.get(pre, pre) in ("llama-bpe", "tekken")


def byte_alphabet() -> dict[int, str]:
    """GPT-2's letter for each byte: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def is_byte_level(tokenizer: dict[str, Any] | None) -> bool:
    """Whether a tokenizer.json is byte-level BPE, as opposed to SentencePiece's kind."""
    model = (tokenizer or {}).get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        return False
    steps = _steps((tokenizer or {}).get("pre_tokenizer"))
    return any(step.get("type") == "ByteLevel" for step in steps)


def from_tokenizer_json(tokenizer: dict[str, Any], n_vocab: int) -> Vocab:
    """The vocabulary of a byte-level tokenizer.json; added tokens are placed by the caller."""
    model = tokenizer["model"]
    words, merges = words_and_merges(model)
    tokens, types = empty_vocab(n_vocab)
    added = {t.get("content") for t in tokenizer.get("added_tokens") or () if isinstance(t, dict)}
    for text, token_id in words.items():
        if text in added and isinstance(token_id, int) and token_id >= n_vocab:
            continue
        i = check_id(token_id, text, n_vocab)
        if tokens[i]:
            raise EdgeStreamError(f"tokenizer.json gives {quoted(tokens[i])} and {quoted(text)} the same id {i}")
        tokens[i], types[i] = text, NORMAL
    vocab = Vocab("gpt2", pre_name(tokenizer), tokens, types, merges=[" ".join(merge_pair(m, words)) for m in merges])
    if ignores_merges(vocab.pre) != bool(model.get("ignore_merges")):
        vocab.notes.append(f"the tokenizer differs from llama.cpp's {vocab.pre} in ignore_merges")
    if vocab.pre in ("tekken", "gpt-4o"):
        vocab.notes.append(
            "the tokenizer splits words where case changes, llama.cpp only for ASCII letters; "
            "it also splits words at combining marks (of Hindi, Thai, Burmese), which the tokenizer does not"
        )
    if "NFC" in _normalizers(tokenizer):
        vocab.notes.append(
            "the tokenizer normalises text to Unicode NFC first, llama.cpp does not: decomposed letters differ"
        )
    return vocab


def pre_name(tokenizer: dict[str, Any]) -> str:
    """The value of tokenizer.ggml.pre. Raises EdgeStreamError for an unknown structure."""
    unknown = set(_normalizers(tokenizer)) - {"NFC"}
    if unknown:
        raise EdgeStreamError(
            f"tokenizer.json normalises text ({quoted(', '.join(sorted(unknown)))}), which llama.cpp does not support"
        )
    signature = _signature(_steps(tokenizer.get("pre_tokenizer")))
    ignore = bool(tokenizer["model"].get("ignore_merges"))
    name = _NAMES.get((signature, ignore)) or _NAMES.get((signature, not ignore))
    if name is None:
        known = ", ".join(_NAMES.values())
        raise EdgeStreamError(
            f"tokenizer.json has a pre-tokenizer that is none of those known here ({known}): {quoted(signature, 200)}"
        )
    return name


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    if not isinstance(pre_tokenizer, dict):
        return []
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _signature(steps: list[dict[str, Any]]) -> str:
    """A pre-tokenizer as text: `split:<expression>`, `digits`, `gpt2` (ByteLevel's own expression), `bytes`."""
    words = []
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            words.append("gpt2" if step.get("use_regex", True) else "bytes")
        elif kind == "Digits" and step.get("individual_digits"):
            words.append("digits")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step.get("pattern")
            words.append(f"split:{pattern.get('Regex') if isinstance(pattern, dict) else pattern}")
        elif kind == "Split" and step.get("behavior") == "Removed" and step.get("invert"):
            pattern = step.get("pattern")  # the same, expressed inversely
            words.append(f"split:{pattern.get('Regex') if isinstance(pattern, dict) else pattern}")
        else:
            words.append(f"{kind}({', '.join(f'{k}={v}' for k, v in sorted(step.items()) if k != 'type')})")
    return " ".join(words)


def _normalizers(tokenizer: dict[str, Any]) -> list[str]:
    normalizer = tokenizer.get("normalizer")
    if not isinstance(normalizer, dict):
        return []
    steps = normalizer.get("normalizers", [normalizer])
    return [str(step.get("type")) for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
