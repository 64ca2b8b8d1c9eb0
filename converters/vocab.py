"""The tokenizer in GGUF's terms: tokens, scores or merges, special tokens.

llama.cpp calls the two supported kinds `llama` (SentencePiece BPE with byte fallback, merged by score) and
`gpt2` (byte-level BPE, merged by rank, with a named pre-tokenizer). Keys: docs/gguf.md of ggml.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edge_stream.converters.text import quoted
from edge_stream.errors import EdgeStreamError
from edge_stream.families import find_family

if TYPE_CHECKING:
    import gguf

# gguf.TokenType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL = ("bos", "eos", "unk", "pad")
# tokens at which llama.cpp ends an answer because of their text (llama-vocab.cpp)
_KNOWN_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "[e~["),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>"),
    )
)
_SPACE = "▁"  # SentencePiece's visible space


@dataclass
class Vocab:
    """The keys tokenizer.ggml.*. Lists are indexed by token id and as long as the model's vocabulary."""

    kind: str  # llama or gpt2
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)  # llama only
    merges: list[str] = field(default_factory=list)  # gpt2 only
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, unk, pad, eot, eom -> id
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool | None = None  # llama only
    visible: tuple[str, ...] = ()  # added tokens that are text, though the tokenizer calls them special
    notes: list[str] = field(default_factory=list)  # how llama.cpp will tokenise differently

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys to a GGUF writer."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        add = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
            "eot": writer.add_eot_token_id,
            "eom": writer.add_eom_token_id,
        }
        for name, token in self.special.items():
            add[name](token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before the tokenizer runs."""

    id: int
    text: str
    special: bool
    strips: bool = False  # also consumes adjacent spaces


class TokenizerSource(Protocol):
    """The parts of a source that read_vocab needs."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        ...

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json."""
        ...

    @property
    def tokenizer_config(self) -> Mapping[str, Any]:
        """tokenizer_config.json."""
        ...

    @property
    def tokenizer_files(self) -> Mapping[str, Path]:
        """The tokenizer files that exist."""
        ...

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding."""
        ...


def read_vocab(source: TokenizerSource) -> Vocab:
    """The vocabulary of a checkpoint folder. Raises EdgeStreamError if llama.cpp has no equivalent."""
    try:
        return _read_vocab(source)
    except (TypeError, AttributeError, KeyError, ValueError) as error:  # JSON of unexpected structure
        files = ", ".join(f for f in source.tokenizer_files if f.endswith(".json"))
        raise EdgeStreamError(f"the tokenizer's files are damaged, or of an unknown kind ({files})") from error


def _read_vocab(source: TokenizerSource) -> Vocab:
    from edge_stream.converters import vocab_bpe, vocab_spm
    from edge_stream.converters.hf_source import read_json

    files = source.tokenizer_files
    if "tokenizer.json" in files:
        tokenizer = read_json(files["tokenizer.json"])
    elif "tekken.json" in files and "tokenizer.model" not in files:
        from edge_stream.converters import tekken

        tokenizer = tekken.as_tokenizer_json(read_json(files["tekken.json"]))
    else:
        tokenizer = None
    if tokenizer is not None and not isinstance(tokenizer, dict):
        raise EdgeStreamError("tokenizer.json is not a JSON object")
    added = _added_tokens(source, tokenizer)
    if "tokenizer.model" in files and not vocab_bpe.is_byte_level(tokenizer):
        vocab = vocab_spm.from_model_file(files["tokenizer.model"], tokenizer, source.n_vocab)
    elif tokenizer is None:
        raise EdgeStreamError(
            "the checkpoint has no tokenizer: it needs tokenizer.json, tokenizer.model or tekken.json"
        )
    elif vocab_bpe.is_byte_level(tokenizer):
        vocab = vocab_bpe.from_tokenizer_json(tokenizer, source.n_vocab)
    else:
        vocab = vocab_spm.from_tokenizer_json(tokenizer, source.n_vocab)
        family = find_family(source.config.get("model_type"))
        if family is not None and family.gguf.tokenizer:
            vocab_spm.as_ranked(vocab, tokenizer, family.gguf.tokenizer)
    _place_added(vocab, added)
    for i, text in enumerate(vocab.tokens):
        if not text:  # the embedding is larger than the tokenizer
            vocab.tokens[i], vocab.types[i] = f"[PAD{i}]", UNUSED
    _special_tokens(vocab, source, added)
    _add_flags(vocab, source, tokenizer)
    prefix = source.tokenizer_config.get("add_prefix_space")
    if vocab.kind == "llama" and isinstance(prefix, bool):
        vocab.add_space_prefix = prefix
    return vocab


def empty_vocab(n_vocab: int) -> tuple[list[str], list[int]]:
    """Tokens and types, to be filled in."""
    return [""] * n_vocab, [UNUSED] * n_vocab


def check_id(token_id: object, text: str, n_vocab: int) -> int:
    """Return a token id after checking that the embedding has a row for it. Raises EdgeStreamError."""
    if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
        raise EdgeStreamError(f"the tokenizer gives token {quoted(text)} the id {quoted(token_id)}")
    if token_id >= n_vocab:
        raise EdgeStreamError(
            f"the tokenizer has token {quoted(text)} with id {token_id}, but config.json has vocab_size {n_vocab}"
        )
    return token_id


def words_and_merges(model: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Vocabulary and merges of a BPE model in tokenizer.json; only their JSON types are checked."""
    words, merges = model.get("vocab"), model.get("merges")
    if not isinstance(words, dict) or not isinstance(merges, list) or not words:
        raise EdgeStreamError("tokenizer.json has no vocab or no merges")
    return words, merges


def merge_pair(merge: Any, words: Mapping[str, Any]) -> list[str]:
    """The two parts of a merge. Raises EdgeStreamError if they do not make a token."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
        raise EdgeStreamError(f"tokenizer.json has a merge that is not a pair: {quoted(merge)}")
    if pair[0] + pair[1] not in words:
        raise EdgeStreamError(
            f"tokenizer.json merges {quoted(pair[0])} and {quoted(pair[1])} to something that is no token"
        )
    return pair


def _added_tokens(source: TokenizerSource, tokenizer: dict[str, Any] | None) -> list[AddedToken]:
    """Added tokens from all files that may list them; tokenizer.json takes precedence."""
    from edge_stream.converters.hf_source import read_json

    found: dict[int, AddedToken] = {}

    def add(token_id: object, text: object, token: Mapping[str, Any]) -> None:
        try:
            number = int(str(token_id))
        except ValueError:
            number = -1
        if not isinstance(text, str) or not text or number < 0:
            raise EdgeStreamError(f"the tokenizer's added token {quoted(text)} has no valid id or text")
        strips = bool(token.get("lstrip")) or bool(token.get("rstrip"))
        found[number] = AddedToken(number, text, bool(token.get("special")) or _looks_special(text), strips)

    if "added_tokens.json" in source.tokenizer_files:
        older = read_json(source.tokenizer_files["added_tokens.json"])
        for text, token_id in older.items() if isinstance(older, dict) else ():
            add(token_id, text, {})
    decoder = source.tokenizer_config.get("added_tokens_decoder")
    for token_id, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict):
            add(token_id, token.get("content"), token)
    for token in (tokenizer or {}).get("added_tokens") or ():
        if not isinstance(token, dict):
            raise EdgeStreamError("tokenizer.json: added_tokens does not hold JSON objects")
        add(token.get("id"), token.get("content"), token)
    return [found[i] for i in sorted(found)]


def _looks_special(text: str) -> bool:
    """Recognise control tokens that a checkpoint does not mark as such."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    marks = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(text.startswith(a) and text.endswith(b) for a, b in marks)


def _place_added(vocab: Vocab, added: Sequence[AddedToken]) -> None:
    beyond = [t for t in added if t.id >= len(vocab.tokens)]
    if beyond:
        vocab.notes.append(
            f"{len(beyond)} added tokens have no row in the embedding and are left out ({quoted(beyond[0].text)})"
        )
    strips = [t.text for t in added if t.strips and t.id < len(vocab.tokens)]
    if strips:  # llama.cpp does this only for models named Phi-3, and only on the right-hand side
        vocab.notes.append(
            f"spaces beside {quoted(strips[0])} (and {len(strips) - 1} more) belong to it, but not in llama.cpp"
        )
    for token in added:
        if token.id >= len(vocab.tokens) or vocab.types[token.id] in (UNKNOWN, BYTE):
            continue
        vocab.tokens[token.id] = token.text if token.special else token.text.replace(_SPACE, " ")
        special = token.special and token.text not in vocab.visible
        vocab.types[token.id] = CONTROL if special else USER_DEFINED
        if vocab.scores:
            vocab.scores[token.id] = -1000.0


def _special_tokens(vocab: Vocab, source: TokenizerSource, added: Sequence[AddedToken]) -> None:
    """bos, eos, unk, pad: named by tokenizer_config.json, else numbered by config.json or generation_config.json."""
    ids = {text: i for i, text in reversed(list(enumerate(vocab.tokens)))} | {t.text: t.id for t in added}
    for name in _SPECIAL:
        text = source.tokenizer_config.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        token = ids.get(text) if isinstance(text, str) else None
        for config in (source.config, source.generation_config):
            if token is None:
                number = config.get(f"{name}_token_id")
                number = number[0] if isinstance(number, list) and number else number
                token = number if isinstance(number, int) and not isinstance(number, bool) else None
        if token is not None and 0 <= token < len(vocab.tokens):
            vocab.special[name] = token
        elif token is not None and name in ("bos", "eos"):
            raise EdgeStreamError(
                f"{name}_token_id = {token} is not a token of the vocabulary ({len(vocab.tokens)} tokens)"
            )
    ends = source.generation_config.get("eos_token_id")
    others = [t for t in ends if isinstance(t, int) and 0 <= t < len(vocab.tokens)] if isinstance(ends, list) else []
    others = [t for t in others if t != vocab.special.get("eos") and vocab.tokens[t] not in _KNOWN_ENDS]
    vocab.special |= dict(zip(("eot", "eom"), others, strict=False))
    if len(others) > 2:
        vocab.notes.append(f"llama.cpp does not end an answer at {quoted(vocab.tokens[others[2]])}")


def _add_flags(vocab: Vocab, source: TokenizerSource, tokenizer: dict[str, Any] | None) -> None:
    """Whether text gets BOS and EOS: by flag, else tokenizer.json's template, else the default of the kind."""
    template = _template(tokenizer)
    defaults = {"bos": vocab.kind == "llama", "eos": False}
    values = {}
    for name in ("bos", "eos"):
        flag = source.tokenizer_config.get(f"add_{name}_token")
        if isinstance(flag, bool):
            values[name] = flag
        elif template is not None:
            text = vocab.tokens[vocab.special[name]] if name in vocab.special else None
            values[name] = text is not None and text in template
        else:
            values[name] = defaults[name] and name in vocab.special
    vocab.add_bos, vocab.add_eos = values["bos"], values["eos"]


def _template(tokenizer: dict[str, Any] | None) -> list[str] | None:
    """Special tokens that tokenizer.json's post-processor adds to a single text; None without a tokenizer.json."""
    if tokenizer is None:
        return None
    post = tokenizer.get("post_processor")
    steps = post.get("processors", [post]) if isinstance(post, dict) else []
    found: list[str] = []
    for step in steps if isinstance(steps, list) else []:
        if isinstance(step, dict) and step.get("type") == "TemplateProcessing":
            for item in step.get("single") or ():
                if isinstance(item, dict) and isinstance(item.get("SpecialToken"), dict):
                    found.append(str(item["SpecialToken"].get("id")))
    return found
