"""Mistral's tekken.json as a tokenizer.json.

tekken.json (mistral-common) lists byte strings by rank. Merges are implicit: of all neighbours, the pair that makes the
token of lowest rank is merged first. So the last merge of a token joins the two parts that remain when only lower ranks
are merged. Ids are ranks, offset by the number of special tokens.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from edge_stream.converters.text import quoted
from edge_stream.converters.vocab_bpe import byte_alphabet
from edge_stream.errors import EdgeStreamError


def as_tokenizer_json(tekken: Any) -> dict[str, Any]:
    """The equivalent parts of tokenizer.json. Raises EdgeStreamError if the file is not as expected."""
    try:
        config = tekken["config"]
        n_special = int(config["default_num_special_tokens"])
        n_words = int(config["default_vocab_size"]) - n_special
        raw = [base64.b64decode(word["token_bytes"], validate=True) for word in tekken["vocab"][:n_words]]
        named = tekken.get("special_tokens") or _early_special_tokens()
        special = {int(t["rank"]): str(t["token_str"]) for t in named}
        pattern = str(config["pattern"])
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise EdgeStreamError("tekken.json is not in Mistral's format") from error
    ranks = {word: rank for rank, word in enumerate(raw)}
    if len(ranks) != len(raw) or not all(bytes([b]) in ranks for b in range(256)):
        raise EdgeStreamError("tekken.json has a word twice, or lacks one of the 256 bytes")
    letters = byte_alphabet()

    def text(word: bytes) -> str:
        return "".join(letters[b] for b in word)

    merges = [[text(a), text(b)] for a, b in (_last_pair(w, ranks) for w in raw if len(w) > 1)]
    for i in range(n_special):
        special.setdefault(i, f"<SPECIAL_{i}>")
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    return {
        "added_tokens": [{"id": i, "content": special[i], "special": True} for i in range(n_special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        },
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {text(word): n_special + rank for word, rank in ranks.items()},
            "merges": merges,
        },
    }


def _early_special_tokens() -> list[dict[str, Any]]:
    """The first version of the format does not list special tokens; text needs these three."""
    return [{"rank": i, "token_str": text} for i, text in enumerate(("<unk>", "<s>", "</s>"))]


def _last_pair(word: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts joined by a word's last merge."""
    limit = ranks[word]
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 2:
        best, at = limit, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], limit)
            if rank < best:
                best, at = rank, i
        if at < 0:
            raise EdgeStreamError(f"tekken.json has a word that cannot be merged: {quoted(word)}")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
