"""SentencePiece BPE with byte fallback, from tokenizer.model or an equivalent tokenizer.json.

llama.cpp merges by score: of all neighbours that make a piece, those that make the piece of highest score first. It
does not normalise text, except for the leading space.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edge_stream.converters.text import quoted
from edge_stream.converters.vocab import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocab,
    check_id,
    empty_vocab,
    merge_pair,
    words_and_merges,
)
from edge_stream.errors import EdgeStreamError

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_UNREACHABLE = -1e9  # score of a piece that no merge makes: a single character, or unused


def from_model_file(path: Path, tokenizer: dict[str, Any] | None, n_vocab: int) -> Vocab:
    """The vocabulary of a tokenizer.model. Raises EdgeStreamError if it is not SentencePiece BPE, or normalises."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise EdgeStreamError(f"{path.name} is not a SentencePiece model") from error
    n_pieces = processor.GetPieceSize()
    tokens, types = empty_vocab(n_vocab)
    scores = [-10000.0] * n_vocab
    for i in range(n_pieces):
        text = processor.IdToPiece(i)
        check_id(i, text, n_vocab)
        tokens[i], scores[i] = text, processor.GetScore(i)
        types[i] = NORMAL
        for is_kind, kind in (
            (processor.IsUnknown, UNKNOWN),
            (processor.IsControl, CONTROL),
            (processor.IsUnused, UNUSED),
            (processor.IsByte, BYTE),
        ):
            if is_kind(i):
                types[i] = kind
    _check_bpe(path, tokens, types, scores)
    probe = processor.Normalize("ﬁ  e\u0301")
    if probe.lstrip("▁").replace("▁", " ") != "ﬁ  e\u0301":
        raise EdgeStreamError(f"{path.name} normalises text before tokenisation, which llama.cpp does not")
    vocab = Vocab("llama", "default", tokens, types, scores, add_space_prefix=probe.startswith("▁"))
    _note_first_only(vocab, tokenizer)
    return vocab


def from_tokenizer_json(tokenizer: dict[str, Any], n_vocab: int) -> Vocab:
    """The vocabulary of a tokenizer.json equivalent to SentencePiece BPE: a piece's score is minus its merge's rank."""
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        kind = model.get("type") if isinstance(model, dict) else None
        raise EdgeStreamError(
            f"tokenizer.json holds a {quoted(kind)} tokenizer: supported are byte-level BPE and BPE with byte fallback"
        )
    words, merges = words_and_merges(model)
    tokens, types = empty_vocab(n_vocab)
    scores = [_UNREACHABLE] * n_vocab
    unknown = model.get("unk_token")
    for text, token_id in words.items():
        i = check_id(token_id, text, n_vocab)
        if tokens[i]:
            raise EdgeStreamError(f"tokenizer.json gives {quoted(tokens[i])} and {quoted(text)} the same id {i}")
        tokens[i] = text
        types[i] = UNKNOWN if text == unknown else BYTE if _BYTE_PIECE.fullmatch(text) else NORMAL
    for rank, merge in enumerate(merges):
        union = words["".join(merge_pair(merge, words))]
        scores[union] = max(scores[union], float(-rank))
    prefix = _space_prefix(tokenizer)
    vocab = Vocab("llama", "default", tokens, types, scores, add_space_prefix=prefix)
    _note_first_only(vocab, tokenizer)
    return vocab


# Gemma 4's marks of thoughts and tool calls, which a parser of the text has to see
_VISIBLE = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')


def as_ranked(vocab: Vocab, tokenizer: dict[str, Any], kind: str) -> None:
    """Turn it into a vocabulary that is merged by rank, as tokenizer.json says it, not by the score of the result."""
    vocab.kind = vocab.pre = kind
    words, merges = words_and_merges(tokenizer["model"])
    vocab.merges = [" ".join(merge_pair(merge, words)) for merge in merges]
    vocab.scores = [-1000.0] * len(vocab.tokens)  # required, unused
    vocab.visible = _VISIBLE


def _check_bpe(path: Path, tokens: list[str], types: list[int], scores: list[float]) -> None:
    """BPE scores are whole numbers (minus the rank of the merge), a unigram model's are log-probabilities."""
    fractional = sum(s != round(s) for s, t in zip(scores, types, strict=True) if t == NORMAL)
    if fractional:
        raise EdgeStreamError(f"{path.name} is a unigram model; llama.cpp's `llama` tokenizer is for BPE models")
    n_bytes = sum(t == BYTE for t in types)
    if n_bytes not in (0, 256):
        raise EdgeStreamError(f"{path.name} has {n_bytes} byte tokens, not 256")
    if not any(t in (NORMAL, USER_DEFINED) for t in types):
        raise EdgeStreamError(f"{path.name} has no tokens")


def _space_prefix(tokenizer: dict[str, Any]) -> bool:
    """Whether text gets a leading space. Raises EdgeStreamError for normalisers other than SentencePiece's."""
    prefix = False
    normalizer = tokenizer.get("normalizer")
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "Prepend" and step.get("prepend") == "▁":
            prefix = True
        elif not (kind == "Replace" and step.get("content") == "▁" and step.get("pattern") == {"String": " "}):
            raise EdgeStreamError(f"tokenizer.json normalises text ({quoted(kind)}), which llama.cpp does not support")
    pre = tokenizer.get("pre_tokenizer")
    if isinstance(pre, dict) and pre.get("type") == "Metaspace":
        scheme = pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never")
        prefix = prefix or scheme in ("always", "first")
    elif isinstance(pre, dict) and not (pre.get("type") == "Split" and pre.get("pattern") == {"String": " "}):
        raise EdgeStreamError(
            f"tokenizer.json has a pre-tokenizer ({quoted(pre.get('type'))}) that llama.cpp does not support"
        )
    return prefix


def _note_first_only(vocab: Vocab, tokenizer: dict[str, Any] | None) -> None:
    pre = (tokenizer or {}).get("pre_tokenizer")
    if isinstance(pre, dict) and pre.get("prepend_scheme") == "first" and vocab.add_space_prefix:
        vocab.notes.append("the tokenizer puts a space only before the text, llama.cpp also after each special token")
