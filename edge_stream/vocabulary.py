"""Text to tokens and back, with llama.cpp's tokenizer. MLC folders get a vocabulary-only llama.cpp model."""

from __future__ import annotations

import ctypes as C
from functools import cached_property

from edge_stream.native import bindings, libraries


class Vocabulary:
    """The vocabulary of a llama_model, which must outlive it."""

    def __init__(self, model: int) -> None:
        self.model = model  # llama_model *
        self._llama = libraries.llama()
        self._vocab = self._llama.llama_model_get_vocab(model)

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Tokens of a text. special: parse text such as `<|im_end|>` as control tokens."""
        data = text.encode("utf-8", errors="surrogatepass")
        size = len(data) + 2
        while True:
            buffer = (C.c_int32 * size)()
            n = self._llama.llama_tokenize(self._vocab, data, len(data), buffer, size, add_bos, special)
            if n >= 0:
                return buffer[:n]
            size = -n

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token; control tokens are empty unless special."""
        size = 64
        while True:
            buffer = C.create_string_buffer(size)
            n = self._llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def is_eog(self, token: int) -> bool:
        """True for tokens that end a generation (EOS, end of turn)."""
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def eog_tokens(self) -> tuple[int, ...]:
        """All tokens that end a generation."""
        native = bindings.library()
        tokens = (C.c_int32 * native.es_vocab_eog(self._vocab, None, 0))()
        native.es_vocab_eog(self._vocab, tokens, len(tokens))
        return tuple(tokens)

    @cached_property
    def size(self) -> int:
        """Number of tokens."""
        return int(self._llama.llama_vocab_n_tokens(self._vocab))

    @cached_property
    def bos(self) -> int:
        """Beginning of sequence, -1 if there is none."""
        return int(self._llama.llama_vocab_bos(self._vocab))

    @cached_property
    def eos(self) -> int:
        """End of sequence, -1 if there is none."""
        return int(self._llama.llama_vocab_eos(self._vocab))

    @cached_property
    def fim_tokens(self) -> dict[str, int]:
        """Tokens for filling in, of those the model has: prefix, suffix, middle, repository, file."""
        names = {"prefix": "pre", "suffix": "suf", "middle": "mid", "repository": "rep", "file": "sep"}
        tokens = {name: int(getattr(self._llama, f"llama_vocab_fim_{c}")(self._vocab)) for name, c in names.items()}
        return {name: token for name, token in tokens.items() if token >= 0}

    @cached_property
    def add_bos(self) -> bool:
        """True if the model expects BOS at the start of a text."""
        return bool(self._llama.llama_vocab_get_add_bos(self._vocab))

    @cached_property
    def chat_template(self) -> str | None:
        """The model's own chat template (Jinja), if it has one."""
        template = self._llama.llama_model_chat_template(self.model, None)
        return template.decode(errors="replace") if template else None
